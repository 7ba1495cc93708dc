"""Small line charts as inline SVG, coloured by CSS variables so that one drawing serves the light and dark page.

Invariant: pure strings from numbers; no scripts, no fonts, no links. Every label passes through `escape`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 12, 40


@dataclass(frozen=True)
class Series:
    """One line: its name, its CSS class (colour), and points in data units, x ascending."""

    name: str
    css: str
    points: Sequence[tuple[float, float]]
    steps: bool = False
    """Draw as a staircase (distribution functions), without markers."""


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


def line_chart(
    series: Sequence[Series], x_label: str, y_label: str, x_ticks: Sequence[float], y_ticks: Sequence[float]
) -> str:
    """Draw lines over two labelled axes.

    Args:
        series: the lines; points beyond the last tick are clamped to it.
        x_label, y_label: what the axes show, with the unit.
        x_ticks, y_ticks: ascending; the first and last are the ends of the axes.

    Returns:
        An `<svg>` element that scales to the width of its container.
    """
    x_lo, x_hi, y_lo, y_hi = x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1]

    def px(x: float) -> float:
        return LEFT + (min(max(x, x_lo), x_hi) - x_lo) / (x_hi - x_lo) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (min(max(y, y_lo), y_hi) - y_lo) / (y_hi - y_lo) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} by {escape(x_label)}">',
    ]
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in x_ticks:
        parts.append(f'<text class="tick" x="{px(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:g}</text>')
    parts.append(
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    for one in series:
        parts += _line(one, [(px(x), py(y)) for x, y in one.points])
    parts.append("</svg>")
    return "".join(parts)


def _line(one: Series, pixels: Sequence[tuple[float, float]]) -> list[str]:
    """The path of one series and, unless it is a staircase, a marker with a tooltip at every point."""
    if not pixels:
        return []
    path = f"M{pixels[0][0]:.1f},{pixels[0][1]:.1f}"
    for x, y in pixels[1:]:
        path += f"H{x:.1f}V{y:.1f}" if one.steps else f"L{x:.1f},{y:.1f}"
    parts = [f'<path class="line {escape(one.css)}" d="{path}"><title>{escape(one.name)}</title></path>']
    if not one.steps:
        for (x, y), (_, value) in zip(pixels, one.points):
            parts.append(
                f'<circle class="dot {escape(one.css)}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
                f"<title>{escape(one.name)}: {value:.3f}</title></circle>"
            )
    return parts


LIGHT = ("#2563eb", "#d9620b", "#0f8a6d", "#9333c8", "#c29a12", "#c0266b", "#0891b2", "#6b7d1a", "#7a4a2b")
"""Colours of the classes m0, m1, .. where a chart stands alone; the report's page has its own, for both backgrounds."""
_ROW = 16
_DARK = (
    "@media(prefers-color-scheme:dark){.page{fill:#14171b}text{fill:#a3abb6}.title{fill:#eceff3}.grid{stroke:#30363d}"
    ".line,.dot,.key{filter:brightness(1.35)}}"
)
"""For readers with a dark page."""


def standalone(
    title: str, series: Sequence[Series], x_label: str, y_label: str, x_ticks: Sequence[float], y_ticks: Sequence[float]
) -> str:
    """A chart as a file of its own: colours, title and legend come with it, for light and dark pages.

    Args:
        title: above the chart.
        series: of the classes m0, m1, ..; the other arguments are those of `line_chart`.

    Returns:
        An `<svg>` document.
    """
    chart = line_chart(series, x_label, y_label, x_ticks, y_ticks)
    inner = chart[chart.index(">") + 1 : -len("</svg>")]
    colours = "".join(f".m{k}{{--m:{colour}}}" for k, colour in enumerate(LIGHT))
    style = (
        "text{font:11.5px system-ui,sans-serif;fill:#5c6470}.grid{stroke:#dfe3e8}.title{font-weight:600;fill:#17191d}"
        ".line{fill:none;stroke:var(--m);stroke-width:2.2;stroke-linejoin:round}.dot,.key{fill:var(--m)}" + colours
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
