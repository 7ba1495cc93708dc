"""Longer answers: captions, worked problems with lettered options, and the turns of conversations."""

import random
from collections.abc import Sequence

from mmspec.synth.lexicon import COLOURS, NUMBERS, POSITIONS, ROWS, SHAPES, article, counted, listed, plural
from mmspec.synth.questions import Turn
from mmspec.synth.scene import Item, Scene
from mmspec.synth.wording import Wording

LETTERS = "ABCD"
_PLACE_IN_ROW = {
    "left": "on the left",
    "middle": "in the middle",
    "center": "in the center",
    "right": "on the right",
}


def item_facts(scene: Scene) -> tuple[tuple[str, str], ...]:
    """What a full description must name: each item's colour, shape and place, each word, each bar's value."""
    facts = [("shape", i.name) for i in scene.items] + [("position", i.position) for i in scene.items]
    facts += [("word", s.word) for s in scene.signs]
    facts += [("bar", f"{b.colour} {b.value}") for b in scene.bars]
    return tuple(facts)


def describe(scene: Scene, w: Wording) -> str:
    """A description of about 40 target tokens, in reading order."""
    if scene.bars:
        return _describe_chart(scene, w)
    parts = []
    if scene.signs:
        parts.append(
            w.say(
                "[The image shows|This is|The picture shows] [a scene|a drawing] with {n}.",
                n=_sign_count(scene),
            )
        )
        for sign in scene.signs:
            parts.append(
                w.say(
                    '[The {row} row has|In the {row} row there is] {colour} sign that [says|reads] "{word}".',
                    row=ROWS[sign.row],
                    colour=article(sign.colour),
                    word=sign.word,
                )
            )
    else:
        parts.append(
            w.say(
                "[The image shows|This picture shows|The picture contains|I can see] {n} "
                "[on a light background|in different places].",
                n=counted(len(scene.items), "coloured shape"),
            )
        )
    spots = [w.say("{name} [in|in|at] the {position}", name=article(i.name), position=i.position) for i in scene.items]
    parts.append(w.say("[There is|You can see|It has] {spots}.", spots=listed(spots)))
    return " ".join(parts)


def _sign_count(scene: Scene) -> str:
    return f"{counted(len(scene.signs), 'sign')} and {counted(len(scene.items), 'shape')}"


def _describe_chart(scene: Scene, w: Wording) -> str:
    opening = w.say(
        "[The image shows|This is|The picture shows] a bar chart with {n} bars.", n=NUMBERS[len(scene.bars)]
    )
    values = listed([w.say("the {c} bar [is at|reaches|is at] {v}", c=b.colour, v=b.value) for b in scene.bars])
    return f"{opening} " + w.say("[From left to right|Going from left to right|In order], {values}.", values=values)


def closing(scene: Scene, w: Wording) -> str:
    """A last sentence for a caption."""
    if scene.bars:
        top = max(scene.bars, key=lambda b: b.value)
        return w.say("[The {c} bar is the tallest|The tallest bar is {c}][.| of all.]", c=top.colour)
    return w.say(
        "[The shapes are [simple|plain] and [easy to see|clear].|The background is [plain|light] and [bright|empty]."
        "|The [overall |]style is [simple|flat] and [clean|clear].]"
    )


def caption(scene: Scene, rng: random.Random) -> Turn:
    """'Describe this image in detail.'"""
    w = Wording(rng)
    question = w.ask(
        (
            "Describe this image in detail.",
            "[Please describe|Describe] the [image|picture].",
            "What [is shown|can be seen] in this [image|picture]? [Describe it.|Give details.]",
            "[Write|Give me] a caption for this [image|picture].",
            "Explain what you see in the [image|picture].",
        )
    )
    return Turn(question, f"{describe(scene, w)} {closing(scene, w)}", item_facts(scene))


def _options(w: Wording, right: str, wrong: Sequence[str]) -> tuple[str, str, list[str]]:
    """Lettered options: their text, the right letter, and the options in order."""
    options = [right, *w.rng.sample(list(wrong), len(LETTERS) - 1)]
    w.rng.shuffle(options)
    text = " ".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=True))
    return text, LETTERS[options.index(right)], options


def _conclude(w: Wording, letter: str, right: str) -> str:
    return w.say(
        "[This matches option ({letter}).|Among the options, this is ({letter}).|That is option ({letter}).]"
        " [The answer is ({letter}) {right}.|So the answer is ({letter}) {right}.|Answer: ({letter}) {right}.]",
        letter=letter,
        right=right,
    )


def _number_options(right: int, low: int = 0) -> list[str]:
    return [str(n) for n in range(max(low, right - 3), right + 4) if n != right]


def add_up_shapes(scene: Scene, rng: random.Random) -> Turn:
    """'How many stars and rings are there together?', with options."""
    w = Wording(rng)
    present = list(dict.fromkeys(i.shape for i in scene.items))
    first = rng.choice(present)
    others = [s for s in present if s != first] or [s for s in SHAPES if s != first]
    second = rng.choice(others)
    groups = [[i for i in scene.items if i.shape == s] for s in (first, second)]
    total = len(groups[0]) + len(groups[1])
    text, letter, _ = _options(w, str(total), _number_options(total))
    question = w.ask(
        (
            "How many {a} and {b} are there [together|in total]? {options}",
            "What is the total number of {a} and {b}? {options}",
            "[Count|Add up] the {a} and the {b}. Which number do you get? {options}",
        ),
        a=plural(first),
        b=plural(second),
        options=text,
    )
    lines = [w.say("[Let us|I will|We can] [count|look at] [each kind|the two kinds] [in turn|step by step].")]
    for opener, shape, group in zip(("First", "Next"), (first, second), groups, strict=True):
        if group:
            spots = listed([w.say("[the {c} one in the {p}|{c} in the {p}]", c=i.colour, p=i.position) for i in group])
            lines.append(f"{opener}, the {plural(shape)}: {spots}, so {counted(len(group), shape)}.")
        else:
            lines.append(f"{opener}, the {plural(shape)}: there are none, so zero {plural(shape)}.")
    lines.append(
        w.say(
            "[Adding them up gives|Together this makes|The sum is] {x} plus {y} = {t}.",
            x=len(groups[0]),
            y=len(groups[1]),
            t=total,
        )
    )
    lines.append(_conclude(w, letter, str(total)))
    return Turn(question, " ".join(lines), (("count", f"({letter})"), ("count", str(total))))


def bar_arithmetic(scene: Scene, rng: random.Random) -> Turn:
    """'What is the range of the values?' or 'What is the sum of red and blue?', with options."""
    w = Wording(rng)
    values = {b.colour: b.value for b in scene.bars}
    high, low = max(scene.bars, key=lambda b: b.value), min(scene.bars, key=lambda b: b.value)
    as_sum = rng.random() < 0.5
    one, two = rng.sample(scene.bars, 2) if as_sum else (high, low)
    result = one.value + two.value if as_sum else one.value - two.value
    text, letter, _ = _options(w, str(result), _number_options(result))
    templates = (
        (
            "What is the sum of the {a} and the {b} bar? {options}",
            "[Add|Add up] the {a} and the {b} bar. {options}",
        )
        if as_sum
        else (
            "What is the difference between the tallest and the shortest bar? {options}",
            "What is the range of the values in this chart? {options}",
        )
    )
    question = w.ask(templates, a=one.colour, b=two.colour, options=text)
    lines = [w.say("[First|To begin|To start], [read|let us read] all the bars [in the chart|from left to right].")]
    lines.append(listed([f"{c} is {v}" for c, v in values.items()]).capitalize() + ".")
    if as_sum:
        lines.append(w.say("[We need|The question asks for] the sum of {a} and {b}.", a=one.colour, b=two.colour))
    else:
        lines.append(
            w.say(
                "The [tallest|highest] bar is {a} and the [shortest|lowest] bar is {b}.",
                a=one.colour,
                b=two.colour,
            )
        )
    lines.append(
        w.say(
            "[Now we compute|This gives|So we get] {x} {op} {y} = {t}.",
            x=one.value,
            op="plus" if as_sum else "minus",
            y=two.value,
            t=result,
        )
    )
    lines.append(_conclude(w, letter, str(result)))
    facts = (("bar", str(one.value)), ("bar", str(two.value)), ("bar", f"({letter})"))
    return Turn(question, " ".join(lines), facts)


def find_neighbour(scene: Scene, rng: random.Random) -> Turn:
    """'Which object comes right after the red star in reading order?', with options."""
    w = Wording(rng)
    index = rng.randrange(len(scene.items))
    start, goal = scene.items[index], scene.items[(index + 1) % len(scene.items)]
    wrong = [f"{c} {s}" for c in COLOURS for s in SHAPES]
    taken = {goal.name}
    near = [i.name for i in scene.items if i.name not in taken]
    far = rng.sample([name for name in wrong if name not in taken and name not in near], 3)
    text, letter, _ = _options(w, goal.name, (near + far)[:3])
    question = w.ask(
        (
            "Read the shapes row by row, from left to right. Which one comes after the {a}? {options}",
            "Going through the picture in reading order, what follows the {a}? {options}",
            "In reading order, which shape is next after the {a}? Start again at the top if needed. {options}",
        ),
        a=start.name,
        options=text,
    )
    order = [w.say("{name} [in|at] the {p}", name=article(i.name), p=i.position) for i in scene.items]
    lines = [
        w.say(
            "[Let us read|I read|We read] the [shapes|picture] [in order|row by row]: {order}.",
            order=listed(order),
        ),
        w.say(
            "[After|Right after] the {a}, the [next|following] [shape|one] is the {b}.",
            a=start.name,
            b=goal.name,
        ),
        _conclude(w, letter, goal.name),
    ]
    return Turn(question, " ".join(lines), (("shape", goal.name), ("shape", f"({letter})")))


def by_rows(scene: Scene, w: Wording) -> str:
    """The picture row by row, each row with its items or as empty."""
    lines = []
    for r, row in enumerate(ROWS):
        signs = [s for s in scene.signs if s.row == r]
        items: list[Item] = [i for i in scene.items if i.cell // 3 == r]
        if signs:
            what = f'{article(signs[0].colour)} sign with the word "{signs[0].word}"'
        elif items:
            what = listed([f"{article(i.name)} {_PLACE_IN_ROW[POSITIONS[i.cell].split()[-1]]}" for i in items])
        else:
            lines.append(w.say("The {row} row is empty.", row=row))
            continue
        lines.append(
            w.say(
                "[The {row} row has|In the {row} row there is|The {row} row shows] {what}.",
                row=row,
                what=what,
            )
        )
    return " ".join(lines)
