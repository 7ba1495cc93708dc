"""Policies side by side: from the files of `eval.policies` to rows, headroom, verdicts, and a page with plots.

Invariant: a figure is copied from such a file or is a ratio of two of them; one that is missing is a dash, not 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from eval import tables
from eval.plots import Series, standalone, ticks
from eval.summary import OVERALL, number
from eval.verdicts import LEAST
from mmspec import metrics

DRAWN = (1, 2, 4, 8, 12)
"""Depths whose reliability is drawn."""
EVEN = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
WANTED_SHARE, LARGE = 0.4, 0.05
"""Share of the headroom that is to be captured, and from which headroom on."""
PLAIN_FLOOR, BASELINE_FLOOR, CLOSE = 0.97, 0.98, 0.98
LEARNED = ("P5", "P6", "P7", "P8")
ATTENTION = "P2"
"""The paper's threshold, which is to be beaten where there is something to gain."""

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
    how = found["settings"]
    facts = {"drafter": how["drafter"], "batch": how["batch"], "temperature": how["temperature"], "data": how["data"]}
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
    how, best = found["settings"], found["best"]
    speed = {(row["topic"], row["policy"]): row["speedup"] for row in found["rows"]}
    rows = []
    for topic in dict.fromkeys(row["topic"] for row in found["rows"]):
        base, oracle = speed.get((topic, best)), speed.get((topic, "P9"))
        if not base or not oracle:
            continue
        entry = {
            "drafter": how["drafter"], "batch": how["batch"], "temperature": how["temperature"], "data": how["data"],
            "topic": topic, "best": best, "headroom": oracle / base - 1,
        }  # fmt: skip
        for label in LEARNED:
            mine = speed.get((topic, label))
            if mine:
                entry[f"captured_{label}"] = (mine - base) / (oracle - base) if oracle > base else None
        rows.append(entry)
    return rows


def verdicts(files: Sequence[Mapping[str, Any]], label: str = "P8") -> list[str]:
    """What does not hold of what was promised, a line a cell; empty when all does.

    A topic of which the batches are too few for an interval is not judged.

    Args:
        label: the learned policy that the promise is about.
    """
    said = []
    for found in files:
        how = found["settings"]
        where = f"{how['drafter']} batch {how['batch']} T {how['temperature']:g} {how['data']}"
        judged = {topic for topic, n in _groups(found).items() if n >= LEAST}
        for row in found["rows"]:
            if row["policy"] == "P9":
                continue
            if row["exact_match"] is not None and row["exact_match"] < 1:
                said.append(f"{where} {row['topic']}: {row['policy']} has exact_match {row['exact_match']:.4f}")
            if row["policy"] == label and row["topic"] in judged and _below(row["speedup_hi"], PLAIN_FLOOR):
                said.append(f"{where} {row['topic']}: {label} is at most {row['speedup_hi']:.3f} of plain decoding")
        for row in found["against"]:
            if row["topic"] not in judged or (row["policy"], row["over"]) != (label, found["best"]):
                continue
            if _below(row["hi"], BASELINE_FLOOR):
                said.append(f"{where} {row['topic']}: {label} is at most {row['hi']:.3f} of {row['over']}")
        for entry in headroom_of(found):
            share = entry.get(f"captured_{label}")
            if entry["topic"] != OVERALL or entry["headroom"] < LARGE or share is None:
                continue
            if share < WANTED_SHARE:
                said.append(f"{where}: {label} has {share:.0%} of a headroom of {entry['headroom']:.1%}")
            for row in found["against"]:
                if (row["policy"], row["over"], row["topic"]) == (label, ATTENTION, OVERALL) and not _above(
                    row["lo"], 1
                ):
                    span = f"[{number(row['lo'], 3)}, {number(row['hi'], 3)}]"
                    said.append(f"{where}: {label} is not surely ahead of {ATTENTION}: {row['ratio']:.3f} {span}")
        if found["control"].get(label, 0.0) > 0.02:
            said.append(f"{where}: {label} itself takes {found['control'][label]:.1%} of the time")
        for depth in found["calibration"].get(label, []):
            if depth["n"] >= 100 and depth["ece"] > 0.05:
                few = f", of which {depth['honest']:.3f} is chance" if "honest" in depth else ""
                said.append(f"{where}: {label} is off by {depth['ece']:.3f} (ECE{few}) at depth {depth['depth']}")
    return said


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
    labels = sorted({row["policy"] for row in rows}, key=_order)
    lines = []
    cells: dict[Key, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row["topic"] == OVERALL:
            key = (row["drafter"], row["batch"], row["temperature"], row["data"])
            cells.setdefault(key, {})[row["policy"]] = row
    for (drafter, batch, temperature, data), by in cells.items():
        said = [number(by[label]["speedup"]) if label in by else "-" for label in labels]
        lines.append([drafter, batch, f"{temperature:g}", data, *said])
    return tables.markdown(["drafter", "batch", "T", "data", *labels], lines)


def plot(drafter: str, temperature: float, data: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Speedup over batch size, a line a policy, as an SVG document."""
    return standalone(f"{drafter}, T {temperature:g}, {data}", *_lines(drafter, temperature, data, rows))


def reliability(title: str, depths: Sequence[Mapping[str, Any]]) -> str:
    """What share of the levels was accepted over the chance that was stated, a line a depth, as an SVG document.

    Args:
        title: above it.
        depths: of `calibration`; bins of less than ten levels are left out.
    """
    honest = Series("honest", "m8", [(0.0, 0.0), (1.0, 1.0)])
    return standalone(title, [honest, *reliability_lines(depths)], "stated chance", "share accepted", EVEN, EVEN)


def reliability_lines(depths: Sequence[Mapping[str, Any]]) -> list[Series]:
    """The lines of `reliability`, of the classes m0, m1, ..: of each depth in DRAWN with a bin that is full enough."""
    lines = [
        Series(f"depth {d['depth']}", f"m{DRAWN.index(d['depth'])}", [(mean, y) for mean, y, n in d["bins"] if n >= 10])
        for d in depths
        if d["depth"] in DRAWN
    ]
    return [line for line in lines if line.points]


def page(table: Mapping[str, Any], plots: Mapping[str, str]) -> str:
    """One HTML file, no network: the grid, the headroom, what does not hold, and plots.

    Args:
        table: as it is written to `table.json`.
        plots: SVG documents by name.
    """
    grid = _html(["drafter", "batch", "T", "data", "policy", "topic", "speedup", "95%", "exact"], [
        [
            row["drafter"], row["batch"], f"{row['temperature']:g}", row["data"], row["policy"], row["topic"],
            number(row["speedup"]), f"{number(row['lo'])} to {number(row['hi'])}", number(row["exact_match"], 3),
        ]
        for row in table["rows"]
    ])  # fmt: skip
    room = _html(["drafter", "batch", "T", "data", "topic", "best baseline", "headroom", "P7 has", "P8 has"], [
        [
            row["drafter"], row["batch"], f"{row['temperature']:g}", row["data"], row["topic"], row["best"],
            f"{row['headroom']:.1%}", number(row.get("captured_P7")), number(row.get("captured_P8")),
        ]
        for row in table["headroom"]
    ])  # fmt: skip
    missed = "".join(f"<li>{escape(line)}</li>" for line in table["verdicts"]) or "<li>everything holds</li>"
    drawn = "".join(plots.values())
    return (
        "<!doctype html><meta charset='utf-8'><title>Policies</title><style>body{font:15px sans-serif;margin:2em}"
        "table{border-collapse:collapse}td,th{padding:2px 8px;text-align:right;border-bottom:1px solid #ccc}"
        "svg{max-width:480px}</style><h1>Policies side by side</h1>"
        f"<h2>What does not hold</h2><ul>{missed}</ul>{drawn}<h2>Headroom</h2>{room}<h2>All figures</h2>{grid}"
    )


def _lines(drafter: str, temperature: float, data: str, rows: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
    mine = [
        row
        for row in rows
        if (row["drafter"], row["temperature"], row["data"], row["topic"]) == (drafter, temperature, data, OVERALL)
    ]
    labels = sorted({row["policy"] for row in mine}, key=_order)
    lines = [
        Series(label, f"m{k % 9}", sorted((float(r["batch"]), r["speedup"]) for r in mine if r["policy"] == label))
        for k, label in enumerate(labels)
        if all(r["speedup"] is not None for r in mine if r["policy"] == label)
    ]
    batches = sorted({float(row["batch"]) for row in mine})
    top = max((y for line in lines for _, y in line.points), default=1.0)
    return lines, "batch size", "speedup over plain decoding", [0.0, *batches], ticks(top)


def _html(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    heads = "".join(f"<th>{escape(word)}</th>" for word in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{heads}</tr>{body}</table>"


def _order(label: str) -> tuple[int, str]:
    return (45 if label == "marginal" else 10 * int(label[1:]), label)


def _below(value: float | None, floor: float) -> bool:
    return value is not None and value < floor


def _above(value: float | None, floor: float) -> bool:
    return value is not None and value > floor
