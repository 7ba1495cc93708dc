"""Heads side by side: from the summaries of their evaluations to rows, and to Markdown, CSV, JSON and plots.

Invariant: a figure is copied from a `summary.json`, never computed here; one that a run lacks is a dash, not 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from eval import tables
from eval.plots import LIGHT, Series, standalone, ticks
from eval.report_charts import N_DEPTHS
from eval.summary import OVERALL, gained, number
from eval.tables import whole

FIGURES = ("mat", "speedup", "speedup_lo", "speedup_hi", "decode_speedup", "decode_speedup_lo", "decode_speedup_hi",
           "exact_match", "n_requests")  # fmt: skip
FACTS = ("tree", "steps")
"""What stands beside a head's name, where it has it."""


def row(label: str, summary: Mapping[str, Any], method: str, more: Mapping[str, Any]) -> dict[str, Any]:
    """One head's figures, overall and by topic.

    Args:
        label: what it is called in the table.
        summary: of the evaluation it was a method of.
        method: its name there.
        more: tree, training steps and seconds, or whatever else the tables' facts are.
    """
    mine = summary["methods"][method]
    picked = {topic: {key: figures.get(key) for key in FIGURES} for topic, figures in mine["topics"].items()}
    overall = {key: mine["overall"].get(key) for key in FIGURES}
    depths = mine["overall"]["accept_by_depth"][:N_DEPTHS]
    unreliable = summary.get("contention", {}).get("unreliable", False)
    return {
        "head": label, OVERALL: overall, "topics": picked, "accept_by_depth": depths, "unreliable": unreliable,
        "valid": summary.get("valid", True), **more,
    }  # fmt: skip


def markdown(title: str, rows: Sequence[Mapping[str, Any]], facts: Sequence[str] = FACTS) -> str:
    """A table of MAT and speedup, a line a head: overall with its interval, then MAT / speedup of each topic.

    Args:
        title: above it.
        rows: as `row` makes them.
        facts: of the rows, beside the name.
    """
    topics = _topics(rows)
    lines = []
    for entry in rows:
        all_of_it = entry[OVERALL]
        span = f"{number(all_of_it['speedup'])} [{number(all_of_it['speedup_lo'])}, {number(all_of_it['speedup_hi'])}]"
        cells = [entry["head"], *(_said(entry.get(fact)) for fact in facts), number(all_of_it["mat"]), span]
        cells.append(number(all_of_it["exact_match"], 3))
        for topic in topics:
            figures = entry["topics"].get(topic)
            cells.append(f"{number(figures['mat'])} / {number(figures['speedup'])}" if figures else "-")
        lines.append(cells)
    grid = tables.markdown(["head", *facts, "MAT", "speedup [95%]", "exact_match", *topics], lines)
    note = "\nTopics: MAT / speedup."
    if slow := [entry["head"] for entry in rows if entry.get("unreliable")]:
        note += f" Other processes ran meanwhile, so times are unreliable: {', '.join(slow)}."
    if not all(entry.get("valid", True) for entry in rows):
        note += f" {tables.INVALID}."
    return f"**{title}**\n\n{grid}{note}\n"


def as_csv(rows: Sequence[Mapping[str, Any]], facts: Sequence[str] = FACTS) -> str:
    """One line per head and topic, `overall` among them."""
    lines = [
        [entry["head"], *(entry.get(fact) for fact in facts), topic, *(figures.get(key) for key in FIGURES)]
        for entry in rows
        for topic, figures in {OVERALL: entry[OVERALL], **entry["topics"]}.items()
    ]
    return tables.as_csv(["head", *facts, "topic", *FIGURES], lines)


def depth_plot(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Share of the drafting rounds that accepted at least k tokens, a line a head, as an SVG document."""
    lines = [
        Series(entry["head"], f"m{k % 9}", [(float(d), y) for d, y in enumerate(entry["accept_by_depth"], start=1)])
        for k, entry in enumerate(rows)
        if entry["accept_by_depth"]
    ]
    deepest = max((len(line.points) for line in lines), default=1)
    depths = [float(depth) for depth in range(deepest + 1)]
    return standalone(title, lines, "draft depth k", "share of drafting rounds", depths, [0, 0.2, 0.4, 0.6, 0.8, 1])


def speedup_plot(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Speedups with their intervals, a bar a line, as an SVG document; plain decoding is the line at 1."""
    height, left, width = 22, 170, 420
    top = 34
    end = ticks(max((entry[OVERALL]["speedup_hi"] or entry[OVERALL]["speedup"] or 1.0 for entry in rows), default=1.0))

    def x(value: float) -> float:
        return left + value / end[-1] * (width - left - 14)

    bottom = top + height * len(rows)
    parts = [f'<text class="title" x="10" y="16">{escape(title)}</text>']
    for value in end:
        parts.append(f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text x="{x(value):.1f}" y="{bottom + 14}" text-anchor="middle">{value:g}</text>')
    for place, entry in enumerate(rows):
        figures, y = entry[OVERALL], top + height * place + height / 2
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(entry["head"])}</text>')
        if figures["speedup"] is None:
            continue
        size = f'width="{x(figures["speedup"]) - left:.1f}" height="{height - 8}"'
        said = f"{entry['head']}: {figures['speedup']:.2f}x"
        parts.append(
            f'<rect class="bar" x="{left}" y="{y - height / 2 + 4:.1f}" {size}><title>{escape(said)}</title></rect>'
        )
        if figures["speedup_lo"] is not None:
            ends = f'x1="{x(figures["speedup_lo"]):.1f}" x2="{x(figures["speedup_hi"]):.1f}"'
            parts.append(f'<line class="span" {ends} y1="{y:.1f}" y2="{y:.1f}"/>')
    parts.append(f'<line class="one" x1="{x(1):.1f}" x2="{x(1):.1f}" y1="{top}" y2="{bottom}"/>')
    parts.append(
        f'<text x="{(left + width) / 2}" y="{bottom + 30}" text-anchor="middle">speedup over plain decoding</text>'
    )
    style = (
        "text{font:11.5px system-ui,sans-serif;fill:#5c6470}.title{font-weight:600;fill:#17191d}.grid{stroke:#dfe3e8}"
        f".bar{{fill:{LIGHT[0]};opacity:.55}}.span{{stroke:#17191d;stroke-width:2}}"
        ".one{stroke:#17191d;stroke-dasharray:3 3}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 38}"><style>{style}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def gains(found: Mapping[str, Any], twin: str) -> str:
    """What seeing is worth in words, from `dependence.json`: the lowest, middle and highest decile of dependence.

    Args:
        twin: name of the blind checkpoint.
    """
    words = []
    for place in (0, 4, 9):
        entry = found[OVERALL][place]
        cell = entry["checkpoints"][twin]
        if "gain" in cell:
            words.append(f"decile {entry['decile']} {gained(cell)}")
    return ", ".join(words) or "nothing was offered"


def _topics(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(topic for entry in rows for topic in entry["topics"]))


def _said(value: Any) -> str:
    return whole(value) if isinstance(value, int) or value is None else str(value)
