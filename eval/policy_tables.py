"""Policies side by side: from the files of `eval.policies` to rows, headroom, what was promised, and lines of plots.

Invariant: a figure is copied from such a file or is a ratio of two of them; one that is missing is a dash, not 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from eval import tables
from eval.plots import N_COLOURS, Series, standalone, ticks
from eval.policy_runs import ATTENTION, LEARNED, ORACLE, POLICIES
from eval.summary import OVERALL, number
from eval.verdicts import LEAST
from mmspec import metrics

DRAWN = (1, 2, 4, 8, 12)
"""Depths whose reliability is drawn."""
EVEN = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
WANTED_SHARE, LARGE = 0.4, 0.05
"""Share of the headroom that is to be captured, and from which headroom on."""
PLAIN_FLOOR, BASELINE_FLOOR = 0.97, 0.98
"""Of plain decoding and of the best baseline: no upper bound may be lower."""
OWN_SHARE, ECE, ENOUGH = 0.02, 0.05, 100
"""Most of a step that a controller may take, and how far its chances may be off, at depths of which it said enough."""
LABELS = (*POLICIES, ORACLE)
WHOLE = ("P7", "P8")
"""Policies whose controller reads all that it can: its time and chances are judged."""

Key = tuple[str, int, float, str]
"""Drafter, batch, temperature, data."""


def skip_quality(outcomes: Sequence[tuple[Sequence[float], int]], threshold: float = 0.5) -> dict[str, float | None]:
    """Precision and recall of `a = 0`, said where the first level's chance is below a threshold."""
    said = [(chances[0] < threshold, accepted == 0) for chances, accepted in outcomes if chances]
    hits = sum(s and t for s, t in said)
    n_said, n_true = sum(s for s, _ in said), sum(t for _, t in said)
    return {"precision": hits / n_said if n_said else None, "recall": hits / n_true if n_true else None, "n": len(said)}


def rows_of(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the committed table of one file: drafter, policy, batch, temperature, topic and figures."""
    facts = facts_of(found["settings"])
    return [
        {
            **facts, "policy": row["policy"], "topic": row["topic"], "speedup": row["speedup"],
            "lo": row["speedup_lo"], "hi": row["speedup_hi"], "exact_match": row["exact_match"], "mat": row["mat"],
            "skip_rate": row["skip_rate"], "n_requests": row["n_requests"],
            "unreliable": found["contention"]["unreliable"],
        }
        for row in found["rows"]
    ]  # fmt: skip


def headroom_of(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """By topic: what the oracle could gain over the best baseline, and how much of that each learned policy has."""
    best = found["best"]
    speed = {(row["topic"], row["policy"]): row["speedup"] for row in found["rows"]}
    rows = []
    for topic in dict.fromkeys(row["topic"] for row in found["rows"]):
        base, oracle = speed.get((topic, best)), speed.get((topic, ORACLE))
        if not base or not oracle:
            continue
        entry = {**facts_of(found["settings"]), "topic": topic, "best": best, "headroom": oracle / base - 1}
        for label in LEARNED:
            mine = speed.get((topic, label))
            if mine:
                entry[f"captured_{label}"] = (mine - base) / (oracle - base) if oracle > base else None
        rows.append(entry)
    return rows


def judge(found: Mapping[str, Any], label: str = "P8") -> dict[str, Any]:
    """What was promised of the learned policy, in one cell.

    A topic of which the batches are too few for an interval is not judged.

    Args:
        found: a file of `eval.policies` that scores.
        label: the policy that the promise is about; a controller's own time and calibration are the worse of those of
            the policies that ask it, P7 and P8.

    Returns:
        The figures, None where there is none: `plain_hi` and `best_hi`, the lowest upper bounds over judged topics, of
        the speedup over plain decoding and over the best baseline, with their topics; `ratio, lo, hi` to that baseline
        and `attention, attention_lo, attention_hi` to the paper's threshold, overall; `headroom` and the `captured`
        share; `control`, the largest own share of the time; `ece` with `ece_depth` and `ece_chance`; `again_ratio,
        again_lo, again_hi`, how fast plain decoding was the second time; `misses`, for each of these that is not as
        promised the sentences that say so.
    """
    how, best = found["settings"], found["best"]
    where = f"{how['drafter']} batch {how['batch']} T {how['temperature']:g} {how['data']}"
    judged = {topic for topic, n in _groups(found).items() if n >= LEAST}
    figures: dict[str, Any] = {**facts_of(how), "best": best, "n_judged": len(judged)}
    missed: dict[str, list[str]] = {}

    def miss(key: str, words: str, topic: str = "") -> None:
        missed.setdefault(key, []).append(f"{where}{topic and ' ' + topic}: {words}")

    for row in found["rows"]:
        if row["policy"] != ORACLE and row["exact_match"] is not None and row["exact_match"] < 1:
            miss("exact_match", f"{row['policy']} has exact_match {row['exact_match']:.4f}", row["topic"])

    plain = [r for r in found["rows"] if r["policy"] == label and r["topic"] in judged and r["speedup_hi"] is not None]
    against = [r for r in found["against"] if r["policy"] == label and r["hi"] is not None]
    rivals = [r for r in against if r["over"] == best and r["topic"] in judged]
    for name, rows, key, floor, words in (
        ("plain", plain, "speedup_hi", PLAIN_FLOOR, "plain decoding"),
        ("best", rivals, "hi", BASELINE_FLOOR, best),
    ):
        lowest = min(rows, key=lambda row: row[key], default=None)
        figures |= {f"{name}_hi": lowest and lowest[key], f"{name}_topic": lowest and lowest["topic"]}
        for row in rows:
            if row[key] < floor:
                miss(f"{name}_hi", f"{label} is at most {row[key]:.3f} of {words}", row["topic"])

    again = found.get("again") or {}
    figures |= {f"again_{end}": again.get(end) for end in ("ratio", "lo", "hi")}
    overall = {row["over"]: row for row in against if row["topic"] == OVERALL}
    figures |= {key: overall[best][key] if best in overall else None for key in ("ratio", "lo", "hi")}
    threshold = overall.get(ATTENTION, {})
    figures |= {"attention": threshold.get("ratio")}
    figures |= {f"attention_{end}": threshold.get(end) for end in ("lo", "hi")}
    room = next((entry for entry in headroom_of(found) if entry["topic"] == OVERALL), {})
    figures |= {"headroom": room.get("headroom"), "captured": room.get(f"captured_{label}")}
    if figures["captured"] is not None and room["headroom"] >= LARGE:
        if figures["captured"] < WANTED_SHARE:
            miss("captured", f"{label} has {figures['captured']:.0%} of a headroom of {room['headroom']:.1%}")
        if threshold and not threshold["lo"] > 1:
            span = f"[{threshold['lo']:.3f}, {threshold['hi']:.3f}]"
            miss("attention", f"{label} is not surely ahead of {ATTENTION}: {threshold['ratio']:.3f} {span}")

    control = {name: found["control"][name] for name in WHOLE if name in found["control"]}
    figures |= {"control": max(control.values(), default=None)}
    for name, share in control.items():
        if share > OWN_SHARE:
            miss("control", f"{name} itself takes {share:.1%} of the time")
    depths = [(name, depth) for name in WHOLE for depth in found["calibration"].get(name, []) if depth["n"] >= ENOUGH]
    worst: Mapping[str, Any] = max((depth for _, depth in depths), key=lambda depth: depth["ece"], default={})
    figures |= {"ece": worst.get("ece"), "ece_depth": worst.get("depth"), "ece_chance": worst.get("honest")}
    for name, depth in depths:
        if depth["ece"] > ECE:
            few = f", of which {depth['honest']:.3f} is chance" if "honest" in depth else ""
            miss("ece", f"{name} is off by {depth['ece']:.3f} (ECE{few}) at depth {depth['depth']}")
    return {**figures, "misses": missed}


def sentences(promises: Sequence[Mapping[str, Any]]) -> list[str]:
    """All that does not hold, of all cells."""
    return [line for cell in promises for lines in cell["misses"].values() for line in lines]


def facts_of(how: Mapping[str, Any]) -> dict[str, Any]:
    """Which cell: drafter, batch, temperature, data, of a file's settings."""
    return {name: how[name] for name in ("drafter", "batch", "temperature", "data")}


def key_of(how: Mapping[str, Any]) -> Key:
    """The same of anything that has these facts, to look cells up by."""
    return how["drafter"], how["batch"], how["temperature"], how["data"]


def merged(new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """A table with the cells of another that it lacks, in the order of that other.

    What is said of a drafter, not of a cell, is that of `new` where it has any: its controllers, and its costs on each
    machine.

    Args:
        new: of `collect`, without what is computed of all rows, `means` and `break_even`.
        old: one written before.
    """
    known = {key_of(cell["settings"]) for cell in new["cells"]}
    drafters = list(dict.fromkeys(cell["settings"]["drafter"] for cell in (*old["cells"], *new["cells"])))
    order = list(dict.fromkeys(key_of(cell["settings"]) for cell in (*old["cells"], *new["cells"])))

    def of(entry: Mapping[str, Any]) -> Key:
        return key_of(entry.get("settings", entry))

    def place(entry: Mapping[str, Any]) -> tuple[int, int]:
        key = of(entry)
        return drafters.index(key[0]), order.index(key)

    table = dict(new)
    for name in ("rows", "headroom", "promises", "cells"):
        kept = [entry for entry in old[name] if of(entry) not in known]
        table[name] = sorted([*new[name], *kept], key=place)
    costs = {name: {entry["hardware"]: entry for entry in entries} for name, entries in old["costs"].items()}
    for name, entries in new["costs"].items():
        costs[name] = {**costs.get(name, {}), **{entry["hardware"]: entry for entry in entries}}
    table["costs"] = {name: list(entries.values()) for name, entries in costs.items()}
    fresh = {name: found for name, found in new["controllers"].items() if any(found.values())}
    table["controllers"] = {**old["controllers"], **fresh}
    return table


def _groups(found: Mapping[str, Any]) -> dict[str, int]:
    """Batches by topic; they hold requests of one topic each."""
    requests = {row["topic"]: row["n_requests"] for row in found["rows"] if row["n_requests"]}
    groups = {topic: -(-n // found["settings"]["batch"]) for topic, n in requests.items() if topic != OVERALL}
    return {**groups, OVERALL: sum(groups.values())}


def break_even(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By drafter, temperature, data and policy: the batch size up to which drafting is ahead of plain decoding."""
    found: dict[tuple[Any, ...], dict[int, float | None]] = {}
    for row in rows:
        if row["topic"] == OVERALL:
            facts = tuple(row[name] for name in ("drafter", "temperature", "data", "policy"))
            found.setdefault(facts, {})[row["batch"]] = row["speedup"]
    return [
        {"drafter": drafter, "temperature": temperature, "data": data, "policy": policy,
         "batch": metrics.break_even(speedups)}
        for (drafter, temperature, data, policy), speedups in found.items()
    ]  # fmt: skip


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Speedup by policy, a line a cell, overall."""
    labels = labels_of(rows)
    lines = []
    cells: dict[Key, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row["topic"] == OVERALL:
            cells.setdefault(key_of(row), {})[row["policy"]] = row
    for (drafter, batch, temperature, data), by in cells.items():
        said = [number(by[label]["speedup"]) if label in by else "-" for label in labels]
        lines.append([drafter, batch, f"{temperature:g}", data, *said])
    return tables.markdown(["drafter", "batch", "T", "data", *labels], lines)


def means(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By drafter, data and policy, over all batch sizes and temperatures: the geometric mean of the speedup over plain
    decoding (`over_plain`), and of that over the best fixed tree's, P1 (`over_P1`); overall, of policies that all cells
    of the drafter have."""
    speeds: dict[tuple[Any, Any], dict[tuple[Any, Any], dict[str, float]]] = {}
    for row in rows:
        if row["topic"] == OVERALL and row["speedup"]:
            cells = speeds.setdefault((row["drafter"], row["data"]), {})
            cells.setdefault((row["batch"], row["temperature"]), {})[row["policy"]] = row["speedup"]
    found = []
    for (drafter, data), cells in speeds.items():
        for policy in labels_of(rows):
            pairs = [(by[policy], by["P1"]) for by in cells.values() if {policy, "P1"} <= set(by)]
            if len(pairs) == len(cells):
                facts = {"drafter": drafter, "data": data, "policy": policy, "n_cells": len(cells)}
                own, fixed = (metrics.geometric_mean(speeds_of) for speeds_of in zip(*pairs))
                found.append({**facts, "over_plain": own, "over_P1": own / fixed})
    return found


def plot(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Speedup over batch size, a line a policy, as an SVG document.

    Args:
        title: above it.
        rows: of one drafter, temperature and data.
    """
    labels = labels_of(rows)
    return standalone(title, *batch_lines(rows, {label: f"m{k % N_COLOURS}" for k, label in enumerate(labels)}))


def reliability_lines(depths: Sequence[Mapping[str, Any]]) -> list[Series]:
    """What share of the levels was accepted over the chance that was stated: lines of the classes m0, m1, ..

    Args:
        depths: of `calibration`; those in DRAWN have a line, bins of less than ten levels no point.
    """
    lines = [
        Series(f"depth {d['depth']}", f"m{DRAWN.index(d['depth'])}", [(mean, y) for mean, y, n in d["bins"] if n >= 10])
        for d in depths
        if d["depth"] in DRAWN
    ]
    return [line for line in lines if line.points]


def batch_lines(rows: Sequence[Mapping[str, Any]], css: Mapping[str, str]) -> tuple[Any, ...]:
    """What `line_chart` takes to draw the speedups of rows of one drafter, temperature and data over the batch size.

    Args:
        rows: of the table; the oracle's, far above the others, are left out, and what nothing reaches is cut off.
        css: classes by policy; others are thin lines of class m-rest.
    """
    mine = [row for row in rows if row["topic"] == OVERALL and row["policy"] != ORACLE and row["speedup"]]
    lines = []
    for label in labels_of(mine):
        points = sorted((math.log2(row["batch"]), row["speedup"]) for row in mine if row["policy"] == label)
        lines.append(
            Series(label, css.get(label, "m-rest"), points, marker=LABELS.index(label), faint=label not in css)
        )
    speeds = [row["speedup"] for row in mine] or [1.0]
    rungs = ticks(max(speeds))
    rungs = [rung for rung in rungs if rung >= max(low for low in rungs if low <= min(speeds))]
    batches = sorted({row["batch"] for row in rows})
    places = [math.log2(batch) for batch in batches]
    return lines, "batch size", "speedup over plain decoding", places, rungs, [f"{batch}" for batch in batches]


def labels_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The policies of rows, in order."""
    found = {row["policy"] for row in rows}
    return [label for label in LABELS if label in found]
