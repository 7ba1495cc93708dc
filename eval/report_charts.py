"""The charts of the report: how a method is drawn, and from figures of a run to SVG.

Invariant: a method looks the same in every chart of a page, and shapes tell methods apart where colours do not. With
more methods than can be told apart the others stay in the background, in grey, and have their places in the tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.plots import Series, line_chart, marker, ticks
from eval.report_svg import Mark, radar, scatter
from eval.tasks import PLAIN

N_DEPTHS = 12
"""Drawn: what copies from its context may draft forty tokens, which would leave a head's five no room."""

N_FOCUS = 6
"""Methods with a colour of their own: classes m0, m1, .. of the page, and as many shapes."""

Cells = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Look:
    """How a method is drawn: its class, its shape, and whether it is one of those in colour."""

    css: str
    shape: int
    focus: bool

    @property
    def key(self) -> str:
        """The point as it stands in a legend."""
        return f'<svg class="key" viewBox="0 0 12 12" aria-hidden="true">{marker(self.shape, 6, 6, self.css)}</svg>'


def looks(methods: Mapping[str, Any], primary: str) -> dict[str, Look]:
    """Of every method: the primary is the first, then come the fastest; plain decoding is always grey."""
    rivals = [name for name in methods if name not in (PLAIN, primary)]
    rivals.sort(key=lambda name: -(methods[name]["overall"]["speedup"] or 0.0))
    first = [name for name in (primary, *rivals) if name != PLAIN][:N_FOCUS]
    chosen = {name: Look(f"m{place}", place, True) for place, name in enumerate(first)}
    others = {name: Look("m-rest", 0, False) for name in methods if name not in chosen}
    return chosen | others | {PLAIN: Look("m-plain", N_FOCUS, True)}


def _in_order(seen: Mapping[str, Look], names: Sequence[str]) -> list[str]:
    """Of `names` those in colour first, as their colours come."""
    return sorted(names, key=lambda name: (not seen[name].focus, seen[name].css))


def topic_radar(methods: Mapping[str, Any], seen: Mapping[str, Look], names: Sequence[str], small: bool = False) -> str:
    """Speedup by topic, one line a method; "" with fewer than three topics.

    Args:
        methods: of a cell.
        seen: see `looks`.
        names: of the methods to draw; of a small chart one.
        small: of one method, without words.
    """
    topics = list(methods[PLAIN]["topics"])
    if len(topics) < 3:
        return ""
    values = {name: [methods[name]["topics"][topic]["speedup"] for topic in topics] for name in methods}
    top = max((value for name in methods if name != PLAIN for value in values[name] if value), default=1.0)
    lines = [
        Series(
            name,
            seen[name].css,
            [(float(axis), value) for axis, value in enumerate(values[name]) if value is not None],
            marker=seen[name].shape,
            faint=not (seen[name].focus or small),
        )
        for name in _in_order(seen, names)
    ]
    label = f"speedup by topic of {', '.join(names)}"
    return radar([line for line in lines if line.points], topics, ticks(max(top, 1.0), 4), label, small=small)


def depth_chart(methods: Mapping[str, Any], seen: Mapping[str, Look], names: Sequence[str]) -> str:
    """Share of the drafting rounds that accepted at least k tokens, by k; "" when nothing was ever accepted."""
    lines = [
        Series(
            name,
            seen[name].css,
            [(float(k), y) for k, y in enumerate(methods[name]["overall"]["accept_by_depth"][:N_DEPTHS], start=1)],
            marker=seen[name].shape,
            faint=not seen[name].focus,
        )
        for name in _in_order(seen, names)
    ]
    deepest = max((len(line.points) for line in lines), default=0)
    if deepest == 0:
        return ""
    depths = [float(depth) for depth in range(1, max(deepest, 2) + 1)]
    return line_chart(lines, "draft depth k", "share of drafting rounds", depths, [0, 0.2, 0.4, 0.6, 0.8, 1])


def batch_chart(cells: Cells, seen: Mapping[str, Look], names: Sequence[str], temperature: float) -> str:
    """Speedup against batch size at one temperature, the primary's with intervals; "" with one batch size.

    Args:
        cells: of the sweep.
        seen, names: see `topic_radar`.
        temperature: of the cells to draw.
    """
    mine = sorted((c for c in cells if c["temperature"] == temperature), key=lambda c: c["batch_size"])
    sizes = [math.log2(cell["batch_size"]) for cell in mine]
    if len(mine) < 2:
        return ""
    lines, top = [], 1.0
    for name in _in_order(seen, names):
        rows = [cell["methods"][name]["overall"] for cell in mine]
        known = [(x, row) for x, row in zip(sizes, rows) if row["speedup"] is not None]
        spans = [None if row["speedup_lo"] is None else (row["speedup_lo"], row["speedup_hi"]) for _, row in known]
        spans = spans if name == mine[0]["primary"] else []
        points = [(x, row["speedup"]) for x, row in known]
        look = seen[name]
        lines.append(Series(name, look.css, points, False, look.shape, spans, faint=not look.focus))
        top = max([top, *(y for _, y in points), *(span[1] for span in spans if span is not None)])
    words = [f"{cell['batch_size']}" for cell in mine]
    return line_chart(lines, "batch size", "speedup", sizes, ticks(top), words, (1.0, "break-even"))


def trade_off(cells: Cells, seen: Mapping[str, Look], temperature: float) -> str:
    """Tokens per second against the median request's seconds, a point for every method and batch size."""
    mine = sorted((c for c in cells if c["temperature"] == temperature), key=lambda c: c["batch_size"])
    marks = []
    for name in _in_order(seen, list(mine[-1]["methods"])):
        look = seen[name]
        for cell in reversed(mine):
            row, batch = cell["methods"][name]["overall"], cell["batch_size"]
            seconds, rate = row["latency_p50_s"], row["tokens_per_s"]
            if not seconds or not rate:
                continue
            label = name if cell is mine[-1] else f"{batch}" if look.css in ("m0", "m-plain") else ""
            title = f"{name}, batch size {batch}: {seconds:.3g} s, {rate:.3g} tokens/s"
            size = 4.5 if look.focus else 3.0
            marks.append(Mark(title, label, look.css, look.shape, seconds, rate, name if len(mine) > 1 else "", size))
    return scatter(marks, "median seconds of a request", "tokens per second")


def dependence_chart(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Acceptance by decile of visual dependence, one line a checkpoint; places without an offered token are left out.

    Args:
        rows: of `dependence.json`, overall or of a topic.
        names: of the checkpoints, which have the page's colours in their order.
    """
    lines = [
        Series(
            name,
            f"m{place % N_FOCUS}",
            [
                (float(row["decile"]), row["checkpoints"][name]["acceptance"])
                for row in rows
                if row["checkpoints"][name]["acceptance"] is not None
            ],
            marker=place,
        )
        for place, name in enumerate(names)
    ]
    deciles = [float(row["decile"]) for row in rows]
    return line_chart(lines, "decile of visual dependence", "acceptance", deciles, [0, 0.2, 0.4, 0.6, 0.8, 1])
