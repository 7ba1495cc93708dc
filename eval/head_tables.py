"""Heads side by side: from the summaries of their evaluations to rows, and to Markdown, CSV, JSON and plots.

Invariant: a figure is copied from a `summary.json`, never computed here; one that a run lacks is a dash, not 0.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from eval.plots import Series, standalone
from eval.summary import OVERALL

FIGURES = ("mat", "speedup", "speedup_lo", "speedup_hi", "exact_match", "n_requests")
N_DEPTHS = 12


def row(label: str, summary: Mapping[str, Any], method: str, more: Mapping[str, Any]) -> dict[str, Any]:
    """One head's figures, overall and by topic.

    Args:
        label: what it is called in the table.
        summary: of the evaluation it was a method of.
        method: its name there.
        more: tree, training steps and seconds.
    """
    mine = summary["methods"][method]
    picked = {topic: {key: figures[key] for key in FIGURES} for topic, figures in mine["topics"].items()}
    overall = {key: mine["overall"][key] for key in FIGURES}
    depths = mine["overall"]["accept_by_depth"][:N_DEPTHS]
    unreliable = summary.get("contention", {}).get("unreliable", False)
    return {
        "head": label, OVERALL: overall, "topics": picked, "accept_by_depth": depths, "unreliable": unreliable, **more,
    }  # fmt: skip


def markdown(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of MAT and speedup, a line a head: overall with its interval, then MAT / speedup of each topic."""
    topics = _topics(rows)
    head = ["head", "tree", "steps", "MAT", "speedup [95%]", "exact_match", *topics]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for entry in rows:
        all_of_it = entry[OVERALL]
        span = f"{_n(all_of_it['speedup'])} [{_n(all_of_it['speedup_lo'])}, {_n(all_of_it['speedup_hi'])}]"
        cells = [entry["head"], entry.get("tree") or "-", _whole(entry.get("steps")), _n(all_of_it["mat"]), span]
        cells.append(_n(all_of_it["exact_match"], 3))
        for topic in topics:
            figures = entry["topics"].get(topic)
            cells.append(f"{_n(figures['mat'])} / {_n(figures['speedup'])}" if figures else "-")
        lines.append(f"| {' | '.join(cells)} |")
    note = "\n\nTopics: MAT / speedup."
    if slow := [entry["head"] for entry in rows if entry.get("unreliable")]:
        note += f" Other processes ran meanwhile, so times are unreliable: {', '.join(slow)}."
    return f"**{title}**\n\n" + "\n".join(lines) + note + "\n"


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per head and topic, `overall` among them."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["head", "tree", "steps", "topic", *FIGURES])
    for entry in rows:
        for topic, figures in {OVERALL: entry[OVERALL], **entry["topics"]}.items():
            said = ["" if figures[key] is None else figures[key] for key in FIGURES]
            writer.writerow([entry["head"], entry.get("tree") or "", entry.get("steps") or "", topic, *said])
    return out.getvalue()


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
            span = f"[{cell['gain_lo']:+.3f}, {cell['gain_hi']:+.3f}]"
            words.append(f"decile {entry['decile']} {cell['gain']:+.3f} {span}")
    return ", ".join(words) or "nothing was offered"


def _topics(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(topic for entry in rows for topic in entry["topics"]))


def _n(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _whole(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
