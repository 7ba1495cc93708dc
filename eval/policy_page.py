"""The page of policies side by side: what was promised and what holds; speedups, headroom, calibration by drafter.

Invariant: one file without scripts or network; everything shown is in the table, nothing is computed anew but ratios.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.plots import Series, line_chart, marker
from eval.policy_runs import ORACLE
from eval.policy_tables import (
    BASELINE_FLOOR,
    ECE,
    EVEN,
    LABELS,
    LARGE,
    OWN_SHARE,
    PLAIN_FLOOR,
    WANTED_SHARE,
    batch_lines,
    key_of,
    labels_of,
    reliability_lines,
    sentences,
)
from eval.steps import hardware_line
from eval.summary import OVERALL, interval, number, warmth
from mmspec.pages import template

TEMPLATE = Path(__file__).with_name("policies.html.j2")
MEANINGS = {
    "P0": "the checkpoint's or the method's own tree, every round",
    "P1": "the best fixed tree",
    "P2": "the paper's ViSkip: no draft where the target's visual attention is above a threshold",
    "P3": "no draft after rounds of little acceptance",
    "P4": "a draft ends where it is not sure of itself",
    "marginal": "a draft ends where the next node is not worth its time; no training",
    "P5": "a trained controller that reads scalars alone",
    "P6": "a trained controller without visual attention",
    "P7": "ViSkip: the trained controller, which decides before drafting",
    "P8": "ViSkip refined: P7, then the draft's own scores end and prune it",
    "P9": "the oracle: knows what will be accepted",
}
"""What policies do, in a few words."""
COLOURS = {"P8": "m0", "marginal": "m1", "P1": "m2", "P2": "m3", "P4": "m4", "P7": "m5"}
"""Classes of the policies whose lines are told apart; the others are thin and grey."""
CLOSE = 2.5
"""Tint of the table of speedups: this many percent of colour for each percent from the best baseline."""


def render(table: Mapping[str, Any]) -> str:
    """The page as text.

    Args:
        table: as it is written to `table.json`.
    """
    labels = labels_of(table["rows"])
    drafters = list(dict.fromkeys(row["drafter"] for row in table["rows"]))
    wrong = sorted(
        {row["policy"] for row in table["rows"] if row["exact_match"] is not None and row["exact_match"] < 1}
    )
    scored = {
        key_of(cell["settings"]): f"at {(cell['commit'] or 'no commit')[:7]} on {_machine(cell)}"
        for cell in table["cells"]
    }
    busy = dict.fromkeys(_name(row) for row in table["rows"] if row["unreliable"])
    return template(TEMPLATE, number=number, percent=_percent).render(
        table=table,
        settings=table["settings"],
        commits=list(dict.fromkeys(cell["commit"] for cell in table["cells"])),
        labels=labels,
        meanings=MEANINGS,
        legend=[(label, css, _key(label, css)) for label, css in COLOURS.items() if label in labels],
        thin=[label for label in labels if label not in (*COLOURS, ORACLE)],
        promises=[
            {**row, "name": _name(row), "scored": scored[key_of(row)], "uneven": uneven(row)}
            for row in table["promises"]
        ],
        missed=sentences(table["promises"]),
        machines=list(dict.fromkeys(map(_machine, table["cells"]))),
        places=list(dict.fromkeys(hardware_line(cell["hardware"]) for cell in table["cells"])),
        heads=headlines(table["promises"]),
        floors={"plain": PLAIN_FLOOR, "best": BASELINE_FLOOR, "share": WANTED_SHARE, "large": LARGE, "own": OWN_SHARE,
                "ece": ECE},
        wrong=wrong,
        busy=list(busy),
        missing=table["missing"],
        cells=[_drafter(table, name, labels) for name in drafters],
        n_levels=2,
    )  # fmt: skip


def _machine(cell: Mapping[str, Any]) -> str:
    return str(cell["hardware"]["gpu"] or cell["hardware"]["cpu"])


def _percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}%"


def headlines(promises: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The promises of all cells in a figure each; None where no cell has one."""

    def known(key: str) -> list[float]:
        return [row[key] for row in promises if row[key] is not None]

    wide = [row for row in promises if row["headroom"] is not None and row["headroom"] >= LARGE]
    shares = [row["captured"] for row in wide if row["captured"] is not None]
    against = [row for row in wide if row["attention_lo"] is not None]
    ratios = known("ratio")
    return {
        "plain_hi": min(known("plain_hi"), default=None),
        "best_hi": min(known("best_hi"), default=None),
        "ratios": (min(ratios), statistics.median(ratios), max(ratios)) if ratios else None,
        "share": statistics.median(shares) if shares else None,
        "n_wide": len(wide),
        "n_captured": sum(share >= WANTED_SHARE for share in shares),
        "n_against": len(against),
        "n_ahead": sum(row["attention_lo"] > 1 for row in against),
        "control": max(known("control"), default=None),
        "ece": max(known("ece"), default=None),
    }  # fmt: skip


def uneven(row: Mapping[str, Any]) -> bool:
    """Whether plain decoding was surely faster or slower than plain decoding."""
    return row["again_lo"] is not None and not row["again_lo"] <= 1 <= row["again_hi"]


def _name(row: Mapping[str, Any]) -> str:
    """A cell in words."""
    return f"{row['drafter']}, batch {row['batch']}, {warmth(row['temperature'])}, {row['data']}"


def _key(label: str, css: str) -> str:
    """The point of a policy as it stands in a legend."""
    return f'<svg class="key" viewBox="0 0 12 12" aria-hidden="true">{marker(LABELS.index(label), 6, 6, css)}</svg>'


def _drafter(table: Mapping[str, Any], name: str, labels: Sequence[str]) -> dict[str, Any]:
    """What the page shows of one drafter."""
    rows = [row for row in table["rows"] if row["drafter"] == name]
    cells = [cell for cell in table["cells"] if cell["settings"]["drafter"] == name]
    kinds = dict.fromkeys((row["data"], row["temperature"]) for row in rows)
    charts = []
    for data, temperature in kinds:
        mine = [row for row in rows if (row["data"], row["temperature"]) == (data, temperature)]
        if len({row["batch"] for row in mine}) > 1:
            charts.append((f"{data}, {warmth(temperature)}", line_chart(*batch_lines(mine, COLOURS))))
    return {
        "name": name,
        "speeds": [_speeds(cell, rows, labels) for cell in cells],
        "charts": charts,
        "topics": list(dict.fromkeys(row["topic"] for row in rows)),
        "by_topic": [_by_topic(cell, rows) for cell in cells],
        "rooms": [_rooms(cell, table["headroom"]) for cell in cells],
        "reliability": _reliability(cells),
        "break_even": _break_even(table["break_even"], name),
        "skips": [
            {"cell": _where(cell["settings"]), "policy": policy, **found}
            for cell in cells
            for policy, found in cell["skips"].items()
        ],
    }


def _break_even(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    """Batch sizes by data and temperature in words, and policy."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["drafter"] == name:
            found.setdefault(f"{row['data']}, {warmth(row['temperature'])}", {})[row["policy"]] = row["batch"]
    return found


def _where(how: Mapping[str, Any]) -> str:
    """A cell of a drafter in words."""
    return f"batch {how['batch']}, {warmth(how['temperature'])}, {how['data']}"


def _of(cell: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    key = key_of(cell["settings"])
    return [row for row in rows if key_of(row) == key]


def _speeds(cell: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> dict[str, Any]:
    """A row of the table of speedups, tinted by how far a policy is from the best baseline."""
    overall = {row["policy"]: row for row in _of(cell, rows) if row["topic"] == OVERALL}
    base = overall[cell["best"]]["speedup"] if cell["best"] in overall else None
    found = []
    for label in labels:
        row = overall.get(label)
        speed = row["speedup"] if row else None
        ratio = speed / base if speed and base else None
        found.append({
            "words": number(speed), "best": label == cell["best"],
            "title": _interval(row) if row else "not scored",
            "css": "" if ratio is None or abs(ratio - 1) < 0.005 else "up" if ratio > 1 else "down",
            "strength": 0 if ratio is None else min(60, round(CLOSE * 100 * abs(ratio - 1))),
        })  # fmt: skip
    return {"cell": _where(cell["settings"]), "best": cell["best"], "cells": found}


def _interval(row: Mapping[str, Any]) -> str:
    return interval({"speedup": row["speedup"], "speedup_lo": row["lo"], "speedup_hi": row["hi"]})


def _by_topic(cell: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Policies by topics, with intervals."""
    mine = _of(cell, rows)
    by = {(row["policy"], row["topic"]): row for row in mine}
    topics = list(dict.fromkeys(row["topic"] for row in rows))
    return {
        "cell": _where(cell["settings"]),
        "rows": [
            (label, [_interval(by[label, topic]) if (label, topic) in by else "-" for topic in topics])
            for label in labels_of(mine)
        ],
    }


def _rooms(cell: Mapping[str, Any], headroom: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Headroom by topic, and the shares that P8 has of it where it is not small."""
    by = {row["topic"]: row for row in _of(cell, headroom)}
    return {"cell": _where(cell["settings"]), "best": cell["best"], "topics": by}


def _reliability(cells: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Series], str]]:
    """Title, lines and chart, of the smallest batch: it has the most rounds that are asked about alone."""
    found = []
    least = min(cell["settings"]["batch"] for cell in cells)
    for cell in cells:
        for policy, depths in cell["calibration"].items():
            lines = reliability_lines(depths)
            if cell["settings"]["batch"] == least and lines:
                honest = Series("as stated", "m-rest", [(0.0, 0.0), (1.0, 1.0)])
                chart = line_chart([honest, *lines], "stated chance", "share accepted", EVEN, EVEN)
                found.append((f"{policy}, {_where(cell['settings'])}", lines, chart))
    return found
