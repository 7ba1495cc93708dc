"""Small line charts as inline SVG, coloured by CSS variables so that one drawing serves the light and dark page.

Invariant: pure strings from numbers; no scripts, no fonts, no links. Every label passes through `escape`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 264
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 26, 40


@dataclass(frozen=True)
class Series:
    """One line: its name, its CSS class (colour), and points in data units, x ascending."""

    name: str
    css: str
    points: Sequence[tuple[float, float]]
    steps: bool = False
    """Draw as a staircase (distribution functions), without markers."""
    marker: int = 0
    """Shape of the points, see `marker`: told apart without colours too."""
    spans: Sequence[tuple[float, float] | None] = ()
    """Intervals of the points' y, drawn as whiskers."""
    faint: bool = False
    """In the background: a thin line without markers."""


def ticks(top: float, n: int = 5) -> list[float]:
    """0 and up to `n` round steps, the last at or above `top`.

    >>> ticks(3.4)
    [0.0, 1.0, 2.0, 3.0, 4.0]
    """
    if not (top > 0 and math.isfinite(top)):
        return [0.0, 1.0]
    rough = top / n
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    count = math.ceil(top / step - 1e-9)
    return [round(step * number, 10) for number in range(count + 1)]


def marker(shape: int, x: float, y: float, css: str, title: str = "", size: float = 4.0) -> str:
    """A point: disc, square, triangle, diamond, upturned triangle, cross, bar, and again from the start.

    Args:
        shape: which.
        x, y: its middle.
        css: its class.
        title: what it says when pointed at.
        size: about half its width.
    """
    r, far, arm = size * 0.88, size * 1.25, size * 0.35
    shapes = (
        f"M{x - size:.1f},{y:.1f}a{size},{size} 0 1 0 {2 * size},0a{size},{size} 0 1 0 {-2 * size},0z",
        f"M{x - r:.1f},{y - r:.1f}h{2 * r:.1f}v{2 * r:.1f}h{-2 * r:.1f}z",
        f"M{x:.1f},{y - far:.1f}L{x + far:.1f},{y + size:.1f}H{x - far:.1f}z",
        f"M{x:.1f},{y - far:.1f}L{x + far:.1f},{y:.1f}L{x:.1f},{y + far:.1f}L{x - far:.1f},{y:.1f}z",
        f"M{x:.1f},{y + far:.1f}L{x + far:.1f},{y - size:.1f}H{x - far:.1f}z",
        f"M{x - arm:.1f},{y - far:.1f}h{2 * arm:.1f}V{y - arm:.1f}H{x + far:.1f}v{2 * arm:.1f}H{x + arm:.1f}"
        f"V{y + far:.1f}h{-2 * arm:.1f}V{y + arm:.1f}H{x - far:.1f}v{-2 * arm:.1f}H{x - arm:.1f}z",
        f"M{x - far:.1f},{y - arm:.1f}h{2 * far:.1f}v{2 * arm:.1f}h{-2 * far:.1f}z",
    )
    said = f"<title>{escape(title)}</title>" if title else ""
    return f'<path class="dot {escape(css)}" d="{shapes[shape % len(shapes)]}">{said}</path>'


def opening(label: str, width: float, height: float) -> str:
    """The start of an `<svg>` that scales with its container and says what it shows."""
    words = escape(label)
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{words}"><title>{words}</title>'


def axes(
    x_label: str,
    y_label: str,
    xs: Sequence[tuple[float, str]],
    ys: Sequence[tuple[float, str]],
    width: float = WIDTH,
    height: float = HEIGHT,
    upright: bool = False,
) -> list[str]:
    """What stands around the data of a chart of this size, between LEFT, RIGHT, TOP and BOTTOM from its sides.

    Args:
        x_label, y_label: names of the axes.
        xs, ys: places of their ticks in the drawing, and what stands there.
        upright: grid lines at `xs` too.

    Returns:
        Elements of an `<svg>`.
    """
    right, bottom = width - RIGHT, height - BOTTOM
    parts = [f'<text class="axis" x="{LEFT - 6}" y="12" text-anchor="start">{escape(y_label)}</text>']
    for y, words in ys:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(words)}</text>')
    for x, words in xs:
        if upright:
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom:g}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 18:g}" text-anchor="middle">{escape(words)}</text>')
    middle = f'x="{(LEFT + right) / 2:g}" y="{height - 5:g}"'
    return [*parts, f'<text class="axis" {middle} text-anchor="middle">{escape(x_label)}</text>']


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_words: Sequence[str] = (),
    rule: tuple[float, str] | None = None,
) -> str:
    """Draw lines over two labelled axes.

    Args:
        series: the lines; points beyond the last tick are clamped to it.
        x_label, y_label: what the axes show, with the unit.
        x_ticks, y_ticks: ascending; the first and last are the ends of the axes.
        x_words: what stands at `x_ticks` (default: their numbers).
        rule: (y, words) of a dashed line from side to side.

    Returns:
        An `<svg>` element that scales to the width of its container.
    """
    x_lo, x_hi, y_lo, y_hi = x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1]

    def px(x: float) -> float:
        return LEFT + (min(max(x, x_lo), x_hi) - x_lo) / (x_hi - x_lo) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (min(max(y, y_lo), y_hi) - y_lo) / (y_hi - y_lo) * (HEIGHT - TOP - BOTTOM)

    named = zip(x_ticks, x_words or [f"{x:g}" for x in x_ticks], strict=True)
    parts = [opening(f"{y_label} by {x_label}", WIDTH, HEIGHT)]
    parts += axes(x_label, y_label, [(px(x), words) for x, words in named], [(py(y), f"{y:g}") for y in y_ticks])
    if rule is not None and y_lo <= rule[0] <= y_hi:
        at = py(rule[0])
        parts.append(
            f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}">'
            f"<title>{escape(rule[1])}</title></line>"
            f'<text class="tick halo" x="{WIDTH - RIGHT}" y="{at - 4:.1f}" text-anchor="end">{escape(rule[1])}</text>'
        )
    for one in sorted(series, key=lambda one: not one.faint):
        parts += _line(one, [(px(x), py(y)) for x, y in one.points])
        parts += [
            f'<path class="whisker {escape(one.css)}" d="M{px(x):.1f},{py(span[0]):.1f}V{py(span[1]):.1f}"/>'
            for (x, _), span in zip(one.points, one.spans)
            if span is not None
        ]
    parts.append("</svg>")
    return "".join(parts)


def _line(one: Series, pixels: Sequence[tuple[float, float]]) -> list[str]:
    """The path of one series and, unless it is a staircase or faint, a marker with a tooltip at every point."""
    if not pixels:
        return []
    path = f"M{pixels[0][0]:.1f},{pixels[0][1]:.1f}"
    for x, y in pixels[1:]:
        path += f"H{x:.1f}V{y:.1f}" if one.steps else f"L{x:.1f},{y:.1f}"
    css = f"line {escape(one.css)}{' faint' if one.faint else ''}"
    parts = [f'<path class="{css}" d="{path}"><title>{escape(one.name)}</title></path>']
    if not (one.steps or one.faint):
        parts += [
            marker(one.marker, x, y, one.css, f"{one.name}: {value:.3f}")
            for (x, y), (_, value) in zip(pixels, one.points)
        ]
    return parts


LIGHT = ("#2563eb", "#d9620b", "#0f8a6d", "#9333c8", "#c29a12", "#c0266b", "#0891b2", "#6b7d1a", "#7a4a2b")
"""Colours of the classes m0, m1, .. where a chart stands alone; the report's page has its own, for both backgrounds."""
N_COLOURS = len(LIGHT)
_ROW = 16
_DARK = (
    "@media(prefers-color-scheme:dark){.page{fill:#14171b}text{fill:#a3abb6}.title{fill:#eceff3}.grid{stroke:#30363d}"
    ".line,.dot,.key{filter:brightness(1.35)}}"
)
"""For readers with a dark page."""


def standalone(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_words: Sequence[str] = (),
) -> str:
    """A chart as a file of its own: colours, title and legend come with it, for light and dark pages.

    Args:
        title: above the chart.
        series: of the classes m0, m1, ..; the other arguments are those of `line_chart`.

    Returns:
        An `<svg>` document.
    """
    chart = line_chart(series, x_label, y_label, x_ticks, y_ticks, x_words)
    inner = chart[chart.index(">") + 1 : -len("</svg>")]
    colours = "".join(f".m{k}{{--m:{colour}}}" for k, colour in enumerate(LIGHT))
    style = (
        "text{font:11.5px system-ui,sans-serif;fill:#5c6470}.grid{stroke:#dfe3e8}.title{font-weight:600;fill:#17191d}"
        ".line,.whisker{fill:none;stroke:var(--m);stroke-width:2.2;stroke-linejoin:round}"
        ".whisker{stroke-width:1.2}.faint{stroke-width:1}.rule{stroke:#5c6470;stroke-dasharray:4 3}"
        ".dot,.key{fill:var(--m)}" + colours
    )
    legend = [
        f'<rect class="key {escape(one.css)}" x="{LEFT}" y="{22 + _ROW * k}" width="10" height="10" rx="2"/>'
        f'<text x="{LEFT + 16}" y="{31 + _ROW * k}">{escape(one.name)}</text>'
        for k, one in enumerate(series)
    ]
    style += ".page{fill:#fff}" + _DARK
    top = 24 + _ROW * len(series)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT + top}"><style>{style}</style>'
        f'<rect class="page" width="100%" height="100%"/><text class="title" x="{LEFT}" y="15">{escape(title)}</text>'
        f'{"".join(legend)}<g transform="translate(0,{top})">{inner}</g></svg>\n'
    )
