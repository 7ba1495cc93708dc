"""What the report's tables and bars show of one cell: figures of the summary, put in rows and scaled to their axes.

Invariant: everything shown is in `summary.json`; nothing is measured anew, and a figure that is not known is a dash.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.plots import ticks
from eval.summary import interval, number, warmth
from eval.tasks import PLAIN

PHASES = (
    ("draft_s", "draft"),
    ("verify_s", "verify (target)"),
    ("commit_s", "commit"),
    ("control_s", "control"),
)

COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("n_requests", "requests", 0),
    ("n_tokens", "tokens", 0),
    ("mat", "MAT", 2),
    ("mat_without_bonus", "MAT less bonus", 2),
    ("mat_untruncated", "untruncated", 2),
    ("speedup", "speedup", 2),
    ("decode_speedup", "decode only", 2),
    ("throughput_ratio", "throughput ratio", 2),
    ("latency_p50_s", "p50 s", 3),
    ("latency_p90_s", "p90 s", 3),
    ("latency_p99_s", "p99 s", 3),
    ("ttft_p50_s", "ttft s", 3),
    ("tokens_per_s", "tokens/s", 0),
    ("exact_match", "exact", 3),
    ("ties", "ties", 0),
    ("diverged", "diverged", 0),
    ("skip_rate", "skipped", 2),
    ("draft_efficiency", "accepted/drafted", 2),
    ("task_score", "task score", 2),
    ("energy_per_token_j", "J/token", 2),
    ("peak_bytes", "peak bytes", 0),
)
"""Figure, heading and digits of the table of all figures."""


def label(cell: Mapping[str, Any]) -> str:
    """A cell in words: `batch 4, greedy`."""
    return f"batch {cell['batch_size']}, {warmth(cell['temperature'])}"


def by_speedup(methods: Mapping[str, Any]) -> list[str]:
    """Names of the methods that draft, the fastest first."""
    return sorted(
        (name for name in methods if name != PLAIN), key=lambda name: -(methods[name]["overall"]["speedup"] or 0.0)
    )


def verdict(row: Mapping[str, Any]) -> tuple[str, str]:
    """Whether a method's answers are plain decoding's: a CSS class, and a word or two."""
    if row["exact_match"] is None:
        return "soft", "in distribution"
    if row["diverged"]:
        return "bad", f"{row['diverged']} diverged"
    return "good", f"{row['ties']} tie{'s' if row['ties'] > 1 else ''}" if row["ties"] else "identical"


def leaders(cell: Mapping[str, Any]) -> dict[str, Any]:
    """The chart of speedups: `ticks` with their place in percent, `one` (that of 1.0), and a row a method.

    Each row has its place and interval in percent of the axis, `mat`, `rate`, and the `verdict`.
    """
    methods = cell["methods"]
    names = by_speedup(methods)
    rows = [methods[name]["overall"] for name in names]
    axis = ticks(max((row[key] or 0.0 for row in rows for key in ("speedup", "speedup_hi")), default=1.0))
    scale = 100 / axis[-1]
    holm = {claim["method"]: claim["p_holm"] for claim in cell["claims"]["faster_than_plain"]}
    return {
        "ticks": [(tick, tick * scale) for tick in axis],
        "one": scale,
        "rows": [
            {
                "method": name,
                "width": (row["speedup"] or 0.0) * scale,
                "lo": None if row["speedup_lo"] is None else row["speedup_lo"] * scale,
                "span": None if row["speedup_lo"] is None else (row["speedup_hi"] - row["speedup_lo"]) * scale,
                "words": interval(row).replace("x", "×"),
                "p": holm.get(name),
                "mat": row["mat"],
                "rate": row["tokens_per_s"],
                "verdict": verdict(row),
            }
            for name, row in zip(names, rows)
        ],
    }


def heat(methods: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """Rows of a table methods by topics, tinted by how far a figure is from 1.

    Args:
        methods: of a cell.
        key: speedup or mat.

    Returns:
        `method`, and `cells` with `words`, `css` (up, down or "") and the tint's `strength` in percent; the first cell
        is of all topics.
    """
    topics = list(methods[PLAIN]["topics"])
    names = by_speedup(methods)
    table = {
        name: [methods[name]["overall"][key], *(methods[name]["topics"][topic][key] for topic in topics)]
        for name in names
    }
    far = max((abs(value - 1) for values in table.values() for value in values if value is not None), default=0.0)
    return [
        {
            "method": name,
            "cells": [
                {
                    "words": number(value),
                    "css": "" if value is None or far == 0 else "up" if value >= 1 else "down",
                    "strength": 0 if value is None or far == 0 else round(45 * abs(value - 1) / far),
                }
                for value in values
            ],
        }
        for name, values in table.items()
    ]


def ranges(methods: Mapping[str, Any]) -> dict[str, Any]:
    """The chart of latencies: `ticks`, and a row a method with p50, p90, p99 and ttft in percent of the axis."""
    names = [PLAIN, *by_speedup(methods)]
    rows = {name: methods[name]["overall"] for name in names}
    axis = ticks(max((row["latency_p99_s"] or 0.0 for row in rows.values()), default=1.0))
    scale = 100 / axis[-1]
    return {
        "ticks": [(tick, tick * scale) for tick in axis],
        "rows": [
            {
                "method": name,
                "words": f"{number(row['latency_p50_s'], 3)} s",
                "title": f"{name}: first token {number(row['ttft_p50_s'], 3)} s, "
                + ", ".join(f"p{p} {number(row[f'latency_p{p}_s'], 3)} s" for p in (50, 90, 99)),
            }
            | {
                short: (row[key] or 0.0) * scale
                for short, key in (
                    ("ttft", "ttft_p50_s"),
                    ("p50", "latency_p50_s"),
                    ("p90", "latency_p90_s"),
                    ("p99", "latency_p99_s"),
                )
            }
            for name, row in rows.items()
        ],
    }


def time_split(methods: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the time bar: per method the milliseconds of a step by phase, and percent of the longest step's.

    A step is one forward of the target for one row: the tokens kept after the prefills / MAT are how many there were.
    """
    steps = {}
    for name in [PLAIN, *by_speedup(methods)]:
        row = methods[name]["overall"]
        seconds = row.get("seconds") or {}
        if row["mat"] and sum(seconds.values()) > 0:
            n_steps = (row["n_tokens"] - row["n_requests"]) / row["mat"]
            steps[name] = (row["mat"], {key: 1000 * spent / n_steps for key, spent in seconds.items()})
    longest = max((sum(parts.values()) for _, parts in steps.values()), default=0.0)
    return [
        {
            "method": name,
            "step": sum(parts.values()),
            "token": sum(parts.values()) / mat,
            "phases": [
                {"css": key, "label": words, "ms": parts[key], "width": 100 * parts[key] / longest}
                for key, words in PHASES
                if parts.get(key, 0.0) > 0
            ],
        }
        for name, (mat, parts) in steps.items()
    ]


def columns(methods: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Those of `COLUMNS` that hold anything in this cell."""
    return [column for column in COLUMNS if any(m["overall"].get(column[0]) is not None for m in methods.values())]


def sentence(cell: Mapping[str, Any]) -> str:
    """What the run found of its primary method, as the rest of a sentence that begins with its name."""
    row = cell["methods"][cell["primary"]]["overall"]
    if row["speedup"] is None:
        return "gave no answer that was long enough to time."
    if row["speedup_lo"] is None:
        return f"took 1/{row['speedup']:.2f} of plain decoding's time, on too little data to know how surely."
    ends = f"{row['speedup']:.2f}× its speed, 95% interval {row['speedup_lo']:.2f}× to {row['speedup_hi']:.2f}×."
    if row["speedup_lo"] > 1:
        return f"is faster than plain decoding: {ends}"
    if row["speedup_hi"] < 1:
        return f"is slower than plain decoding: {ends}"
    return f"is neither faster nor slower than plain decoding, as far as this run can tell: {ends}"


def invalid(cells: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The cells whose answers are not plain decoding's, and which methods they are of."""
    return [
        (label(cell), [name for name, method in cell["methods"].items() if method["overall"]["diverged"]])
        for cell in cells
        if not cell["valid"]
    ]
