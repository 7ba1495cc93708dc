"""Two more kinds of chart as inline SVG: a radar over topics, and points over two logarithmic axes with labels.

Invariant: as `eval.plots`; and no two labels of a chart overlap: one that finds no free place is left to the tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from textwrap import wrap

from eval.plots import BOTTOM, LEFT, RIGHT, TOP, WIDTH, Series, axes, marker, opening

CHARACTER, LINE = 6.0, 13.0
"""Generous width and height of a character of a chart's labels, in its units."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


def radar(
    series: Sequence[Series],
    axes: Sequence[str],
    rings: Sequence[float],
    label: str,
    rule: float = 1.0,
    small: bool = False,
) -> str:
    """One closed line a series over axes in a circle.

    Args:
        series: points are (number of the axis, value); an axis without a value breaks the line.
        axes: names, clockwise from the top; at least three.
        rings: values of the circles, ascending from 0; larger values are clamped to the last.
        label: what the chart shows.
        rule: value of the dashed circle.
        small: without names and numbers.
    """
    radius = 62.0 if small else 118.0
    middle_x, middle_y = (70.0, 70.0) if small else (210.0, 162.0)

    def place(axis: float, value: float, beyond: float = 0.0) -> tuple[float, float]:
        angle = 2 * math.pi * axis / len(axes)
        far = radius * min(max(value, 0.0), rings[-1]) / rings[-1] + beyond
        return middle_x + far * math.sin(angle), middle_y - far * math.cos(angle)

    def ring(value: float) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(n, value) for n in range(len(axes))))

    parts = [opening(label, 2 * middle_x, 140 if small else 330)]
    parts += [f'<polygon class="grid" points="{ring(value)}"/>' for value in (rings[-1:] if small else rings[1:])]
    for number in range(len(axes)):
        x, y = place(number, rings[-1])
        parts.append(f'<line class="grid" x1="{middle_x}" y1="{middle_y}" x2="{x:.1f}" y2="{y:.1f}"/>')
    parts.append(f'<polygon class="rule" points="{ring(rule)}"/>')
    for one in sorted(series, key=lambda one: not one.faint):
        corners = [place(axis, value) for axis, value in one.points]
        d = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in corners) + ("z" if len(corners) == len(axes) else "")
        css = f"line {escape(one.css)}{' faint' if one.faint else ''}{' filled' if small else ''}"
        parts.append(f'<path class="{css}" d="{d}"><title>{escape(one.name)}</title></path>')
        if not (one.faint or small):
            parts += [
                marker(one.marker, x, y, one.css, f"{one.name}, {axes[int(axis)]}: {value:.2f}", 3.4)
                for (x, y), (axis, value) in zip(corners, one.points)
            ]
    if not small:
        for value in rings[1:]:
            _, y = place(0, value)
            parts.append(f'<text class="tick halo" x="{middle_x + 4}" y="{y + 11:.1f}">{value:g}</text>')
        parts += [_axis_name(name, *place(n, rings[-1], 10.0), middle_x, middle_y) for n, name in enumerate(axes)]
    return "".join((*parts, "</svg>"))


def _axis_name(name: str, x: float, y: float, middle_x: float, middle_y: float) -> str:
    """The name of a radar's axis at its end, in lines that grow away from the middle."""
    lines = wrap(name, 14, max_lines=3, placeholder=" …")
    anchor = "middle" if abs(x - middle_x) < 5 else "start" if x > middle_x else "end"
    top = y + 4 - LINE * (len(lines) - 1) * (1 if y < middle_y - 60 else 0 if y > middle_y + 60 else 0.5)
    spans = "".join(
        f'<tspan x="{x:.1f}" y="{top + LINE * n:.1f}">{escape(line)}</tspan>' for n, line in enumerate(lines)
    )
    return f'<text class="axis" text-anchor="{anchor}">{spans}</text>'


@dataclass(frozen=True)
class Mark:
    """A point with a label.

    Args:
        title: what the tooltip says.
        label: drawn where there is room, the first marks first; "": none.
        css, shape: its look, see `marker`.
        x, y: above 0.
        trail: marks of one trail are joined in their order.
        size: of the marker.
    """

    title: str
    label: str
    css: str
    shape: int
    x: float
    y: float
    trail: str = ""
    size: float = 4.5


def log_ticks(lo: float, hi: float) -> list[float]:
    """Round numbers between two others: 1, 2 and 5 times powers of ten, or closer ones where these are fewer than 3.

    >>> log_ticks(0.3, 2.5)
    [0.5, 1.0, 2.0]
    >>> log_ticks(0.5, 0.9)
    [0.5, 0.6, 0.7, 0.8, 0.9]
    """
    found: list[float] = []
    for factors in ((1, 2, 5), (1, 2, 3, 5, 7), (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)):
        powers = range(math.floor(math.log10(lo)) - 1, math.ceil(math.log10(hi)) + 1)
        steps = [round(factor * 10.0**power, 1 - power) for power in powers for factor in factors]
        found = [step for step in steps if lo * (1 - 1e-9) <= step <= hi * (1 + 1e-9)]
        if len(found) >= 3:
            break
    return found


def scatter(marks: Sequence[Mark], x_label: str, y_label: str, width: float = WIDTH, height: float = 300) -> str:
    """Points over two logarithmic axes; "" without points. Arguments as of `eval.plots.line_chart`."""
    if not marks:
        return ""
    (x_lo, x_hi), (y_lo, y_hi) = ((min(v) / 1.2, max(v) * 1.2) for v in ([m.x for m in marks], [m.y for m in marks]))
    left, right, top, bottom = LEFT, width - RIGHT, TOP, height - BOTTOM

    def px(x: float) -> float:
        return left + math.log(x / x_lo) / math.log(x_hi / x_lo) * (right - left)

    def py(y: float) -> float:
        return bottom - math.log(y / y_lo) / math.log(y_hi / y_lo) * (bottom - top)

    parts = [opening(f"{y_label} by {x_label}", width, height)]
    xs, ys = ([(px(x), f"{x:g}") for x in log_ticks(x_lo, x_hi)], [(py(y), f"{y:g}") for y in log_ticks(y_lo, y_hi)])
    parts += axes(x_label, y_label, xs, ys, width, height, upright=True)
    for trail in dict.fromkeys(mark.trail for mark in marks if mark.trail):
        members = [mark for mark in marks if mark.trail == trail]
        d = "M" + "L".join(f"{px(m.x):.1f},{py(m.y):.1f}" for m in members)
        parts.append(f'<path class="line trail {escape(members[0].css)}" d="{d}"/>')
    parts += [marker(m.shape, px(m.x), py(m.y), m.css, m.title, m.size) for m in reversed(marks)]
    places = label_places([(px(m.x), py(m.y), m.label) for m in marks], (left, top - 8, right + 10, bottom))
    parts += [
        f'<text class="name halo" x="{place[0]:.1f}" y="{place[1]:.1f}">{escape(mark.label)}</text>'
        for mark, place in zip(marks, places)
        if place is not None
    ]
    return "".join((*parts, "</svg>"))


def label_places(points: Sequence[tuple[float, float, str]], frame: Box) -> list[tuple[float, float] | None]:
    """Where each point's label can start, on its baseline, so that it hits no point, no other label and no border.

    Args:
        points: x, y and label; earlier ones choose first.
        frame: labels stay inside.
    """
    taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y, _ in points]
    found: list[tuple[float, float] | None] = []
    for own, (x, y, label) in enumerate(points):
        wide = CHARACTER * len(label)
        offsets = [
            (8, 4),
            (-8 - wide, 4),
            (-wide / 2, -9),
            (-wide / 2, 17),
            (7, -6),
            (7, 14),
            (-7 - wide, -6),
            (-7 - wide, 14),
        ]
        place = None
        for dx, dy in offsets if label else []:
            box = (x + dx, y + dy - LINE + 3, x + dx + wide, y + dy + 3)
            inside = frame[0] <= box[0] and frame[1] <= box[1] and box[2] <= frame[2] and box[3] <= frame[3]
            if inside and not any(_meet(box, other) for n, other in enumerate(taken) if n != own):
                place = (x + dx, y + dy)
                taken.append(box)
                break
        found.append(place)
    return found


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
