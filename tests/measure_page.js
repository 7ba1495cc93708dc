// What is wrong with a page's layout, in every state that its radio buttons can bring it to: a list of lines.
(page, view) => {
  const wrong = new Set(), tidy = text => text.trim().replace(/\s+/g, " ").slice(0, 60)
  const style = element => view.getComputedStyle(element)
  const scrolls = element => /auto|scroll|hidden/.test(style(element).overflowX)

  // The part of a box that its scrolling ancestors let through.
  const seen = (box, element) => {
    let [left, top, right, bottom] = [box.left, box.top, box.right, box.bottom]
    for (let parent = element; parent && parent !== page.body; parent = parent.parentElement) {
      if (parent !== element && parent instanceof view.SVGElement) continue
      if (!scrolls(parent)) continue
      const frame = parent.getBoundingClientRect()
      left = Math.max(left, frame.left); right = Math.min(right, frame.right)
      top = Math.max(top, frame.top); bottom = Math.min(bottom, frame.bottom)
    }
    return right > left && bottom > top ? {left, top, right, bottom} : null
  }

  const colour = text => {
    const numbers = text.match(/-?[\d.]+(e-?\d+)?/g).map(Number)
    if (text.startsWith("rgb")) return [...numbers.slice(0, 3).map(n => n / 255), numbers[3] ?? 1]
    if (text.startsWith("color(srgb")) return [...numbers.slice(0, 3), numbers[3] ?? 1]
    throw new Error("colour " + text)
  }
  const behind = element => {
    const layers = []
    for (let parent = element; parent; parent = parent.parentElement) layers.push(colour(style(parent).backgroundColor))
    return layers.reverse().reduce((below, [r, g, b, a]) => [r, g, b].map((c, n) => c * a + below[n] * (1 - a)), [1, 1, 1])
  }
  const light = ([r, g, b]) => {
    const [R, G, B] = [r, g, b].map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    return 0.2126 * R + 0.7152 * G + 0.0722 * B
  }
  const contrast = element => {
    const ink = colour(element instanceof view.SVGElement ? style(element).fill : style(element).color)
    const [a, b] = [light(ink), light(behind(element))].sort((x, y) => y - x)
    return (a + 0.05) / (b + 0.05)
  }

  const look = state => {
    if (page.documentElement.scrollWidth > view.innerWidth) wrong.add(`${state}: the page scrolls sideways`)
    const boxes = [], walker = page.createTreeWalker(page.body, view.NodeFilter.SHOW_TEXT)
    for (const element of page.body.querySelectorAll("*")) {
      if (!element.checkVisibility() || element.closest("svg")?.contains(element) && element.tagName !== "svg") continue
      const box = seen(element.getBoundingClientRect(), element)
      if (box && (box.right > view.innerWidth + 0.5 || box.left < -0.5)) {
        wrong.add(`${state}: ${element.tagName}.${element.className} reaches out of the page: ${tidy(element.textContent)}`)
      }
    }
    for (let node; (node = walker.nextNode());) {
      const element = node.parentElement
      if (!node.data.trim() || element.tagName === "title" || element.tagName === "STYLE" || !element.checkVisibility()) continue
      const range = page.createRange()
      range.selectNodeContents(node)
      for (const box of range.getClientRects()) {
        const part = seen(box, element)
        if (part) boxes.push({...part, node, text: tidy(node.data)})
        if (part && (part.right > view.innerWidth + 0.5 || part.left < -0.5)) wrong.add(`${state}: text is cut off: ${tidy(node.data)}`)
      }
      const ratio = contrast(element)
      if (ratio < 4.5) wrong.add(`${state}: contrast ${ratio.toFixed(2)}: ${tidy(node.data)}`)
    }
    boxes.sort((a, b) => a.top - b.top)
    boxes.forEach((one, n) => {
      for (const other of boxes.slice(n + 1)) {
        if (other.top > one.bottom - 3) break
        if (other.node === one.node) continue
        const wide = Math.min(one.right, other.right) - Math.max(one.left, other.left)
        if (wide > 1.5 && Math.min(one.bottom, other.bottom) - other.top > 3) wrong.add(`${state}: "${one.text}" and "${other.text}" overlap`)
      }
    })
    return boxes.length
  }

  for (const details of page.querySelectorAll("details")) details.open = true
  const dark = view.matchMedia("(prefers-color-scheme: dark)").matches
  const states = [], groups = new Set([...page.querySelectorAll("input[type=radio]")].map(input => input.name))
  for (const group of groups) {
    for (const input of page.getElementsByName(group)) {
      input.checked = true
      states.push([input.id, look(input.id)])
    }
  }
  return {wrong: [...wrong], states, dark, width: view.innerWidth}
}
