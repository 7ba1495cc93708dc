"""`report.html`: a run to look at, in one file without scripts or network.

Invariant: everything shown is in `summary.json` or `requests.jsonl` (or is a sample's image); nothing is computed anew.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from eval.bench import Result
from eval.plots import Series, line_chart, ticks
from eval.summary import interval, number
from eval.tasks import PLAIN

TEMPLATE = "report.html.j2"
N_COLOURS = 9
"""Classes m0, m1, ... of the template."""

N_DEPTHS = 12
"""Drawn: what copies from its context may draft forty tokens, which would leave a head's five no room."""

PHASES = (
    ("draft_s", "draft"),
    ("verify_s", "verify (target)"),
    ("commit_s", "commit"),
    ("control_s", "control"),
)


def write(
    path: Path, summary: Mapping[str, Any], results: Sequence[Result], samples: Sequence[Mapping[str, Any]]
) -> None:
    """Write the report, whole or not at all.

    Args:
        path: the file.
        summary: what is in `summary.json`.
        results: of the requests.
        samples: see `eval.samples.collect`.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(render(summary, results, samples), encoding="utf-8")
    os.replace(temporary, path)


def render(summary: Mapping[str, Any], results: Sequence[Result], samples: Sequence[Mapping[str, Any]]) -> str:
    """The page as text; arguments as for `write`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["interval"] = interval
    methods = summary["methods"]
    # Plain decoding is always grey; the others take the palette in order.
    drafting = [name for name in methods if name != PLAIN]
    colours = {PLAIN: "m-plain"} | {name: f"m{place % N_COLOURS}" for place, name in enumerate(drafting)}
    return environment.get_template(TEMPLATE).render(
        summary=summary,
        methods=methods,
        primary=methods[summary["primary"]]["overall"],
        plain=methods[PLAIN]["overall"],
        drafting=drafting,
        topics=list(methods[PLAIN]["topics"]),
        colours=colours,
        speedups=bars(summary, drafting, "speedup", "speedup_lo", "speedup_hi"),
        mats=bars(summary, drafting, "mat"),
        depth_chart=depth_chart(methods, drafting, colours),
        latency_chart=latency_chart(results, list(methods), colours),
        split=time_split(methods),
        samples=samples,
    )


def bars(
    summary: Mapping[str, Any], names: Sequence[str], key: str, lo: str | None = None, hi: str | None = None
) -> dict[str, Any]:
    """Rows of a bar chart in HTML: overall first, then the topics, one bar a method.

    Args:
        summary: of the run.
        names: methods to show.
        key: the figure.
        lo, hi: figures at the ends of its interval, if it has one.

    Returns:
        `ticks` with their place in percent, `one` (the place of 1.0), and `groups` of {label, bars}, each bar with
        value and its place, width and interval in percent of the axis.
    """
    methods = summary["methods"]
    labels = ["overall", *methods[PLAIN]["topics"]]

    def cell(name: str, label: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = methods[name]
        return found["overall"] if label == "overall" else found["topics"][label]

    largest = max((cell(n, label)[k] or 0 for n in names for label in labels for k in (key, hi) if k), default=1)
    axis = ticks(max(largest, 1.0))
    scale = 100 / axis[-1]
    groups = []
    for label in labels:
        entries = []
        for name in names:
            row = cell(name, label)
            value = row[key]
            low, high = (row[lo] if lo else None), (row[hi] if hi else None)
            entries.append(
                {
                    "method": name,
                    "value": value,
                    "width": (value or 0) * scale,
                    "lo": None if low is None else low * scale,
                    "span": None if low is None or high is None else (high - low) * scale,
                    "words": interval(row) if key == "speedup" else number(value),
                }
            )
        groups.append({"label": label, "bars": entries})
    return {"ticks": [(tick, tick * scale) for tick in axis], "one": scale, "groups": groups}


def depth_chart(methods: Mapping[str, Any], names: Sequence[str], colours: Mapping[str, str]) -> str:
    """Share of the drafting rounds that accepted at least k tokens, by k; "" when nothing was ever accepted."""
    lines = [
        Series(name, colours[name], list(enumerate(methods[name]["overall"]["accept_by_depth"][:N_DEPTHS], start=1)))
        for name in names
    ]
    deepest = max((len(line.points) for line in lines), default=0)
    if deepest == 0:
        return ""
    stride = 1 + deepest // 12
    depths = [float(depth) for depth in range(0, deepest + stride, stride)]
    shares = [0, 0.2, 0.4, 0.6, 0.8, 1]
    return line_chart(lines, "draft depth k", "share of drafting rounds", depths, shares)


def latency_chart(results: Sequence[Result], names: Sequence[str], colours: Mapping[str, str]) -> str:
    """Share of requests done within t seconds, by t and method."""
    lines = []
    for name in names:
        seconds = sorted(result.output.latency_s for result in results if result.method == name)
        points = [(0.0, 0.0)] + [(second, (n + 1) / len(seconds)) for n, second in enumerate(seconds)]
        lines.append(Series(name, colours[name], points, steps=True))
    longest = max((line.points[-1][0] for line in lines), default=1.0)
    return line_chart(lines, "seconds", "share of requests done", ticks(longest), [0, 0.25, 0.5, 0.75, 1])


def time_split(methods: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the time bar: per method the phases with seconds and percent of the slowest method's sum."""
    sums = {name: sum((method["overall"].get("seconds") or {}).values()) for name, method in methods.items()}
    longest = max(sums.values(), default=0.0)
    if longest <= 0:
        return []
    return [
        {
            "method": name,
            "total": sums[name],
            "phases": [
                {"css": key, "label": label, "seconds": seconds, "width": 100 * seconds / longest}
                for key, label in PHASES
                if (seconds := method["overall"]["seconds"].get(key, 0.0)) > 0
            ],
        }
        for name, method in methods.items()
    ]
