"""What bench_gpu has measured, from its JSON files to a page and a paragraph.

Invariant: pure functions of the folder; a part that is not there yet is left out, never filled in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from eval.plots import Series, standalone, ticks
from eval.tables import INVALID

ENOUGH = {"efficiency": 0.90, "model": 0.10}
"""What is asked of a GPU: loop efficiency, and how far the oracle's speedup may be from the costs' prediction."""
ACCEPTED_AT = ("1", "8")
"""Batch sizes where that is asked."""
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2rem auto;padding:0 1rem;color:#17191d;background:#fff}
table{border-collapse:collapse;margin:.6rem 0 1.4rem;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .7rem;border-bottom:1px solid #dfe3e8;text-align:right}
th:first-child,td:first-child{text-align:left}
.plots{display:flex;flex-wrap:wrap;gap:1rem}.plots svg{width:460px;max-width:100%}
"""

Rows = Sequence[Sequence[Any]]


def collect(folder: Path, targets: Iterable[str]) -> dict[str, Any]:
    """{"targets": {name: {part: figures}}, "mid": {batch: summary}} of what is there.

    Args:
        folder: of the results.
        targets: that may have a folder in it.
    """
    parts = {name: {path.stem: _read(path) for path in sorted((folder / name).glob("*.json"))} for name in targets}
    mid = {path.parent.name.removeprefix("batch_"): _summary(path) for path in folder.glob("mid/batch_*/summary.json")}
    there = {name: found for name, found in parts.items() if found}
    return {"targets": there, "mid": dict(sorted(mid.items(), key=lambda item: int(item[0])))}


def _read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def _summary(path: Path) -> dict[str, Any]:
    """Of a summary.json what the page shows."""
    summary = _read(path)
    wanted = ("mat", "speedup", "speedup_lo", "speedup_hi", "exact_match", "ties", "tokens_per_s")
    methods = {
        name: {key: method["overall"].get(key) for key in wanted}
        for name, method in summary["methods"].items()
    }  # fmt: skip
    facts = {key: summary[key] for key in ("valid", "hardware")}
    return {"methods": methods, **facts, "contention": summary.get("contention", {})}


def verdicts(found: Mapping[str, Any]) -> list[tuple[str, float, bool]]:
    """What is asked of a GPU: its name, the figure, whether it is enough; nothing is asked of small shapes."""
    out: list[tuple[str, float, bool]] = []
    if settings(found).get("tiny"):
        return out
    for target, parts in found["targets"].items():
        for batch in ACCEPTED_AT:
            if (value := parts.get("loop", {}).get(f"loop_efficiency_b{batch}")) is not None:
                out.append((f"{target}: loop efficiency at batch {batch}", value, value >= ENOUGH["efficiency"]))
            rows = parts.get("oracle", {}).get("by_batch", {}).get(batch)
            if rows is not None:
                ratios = [row["measured"] / row["predicted"] for row in rows["oracle"].values()]
                worst = max(ratios, key=lambda ratio: abs(ratio - 1))
                name = f"{target}: measured / predicted speedup at batch {batch}"
                out.append((name, worst, abs(worst - 1) <= ENOUGH["model"]))
    return out


# ---- tables ----


def tables(found: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[str], Rows]]:
    """Title, head and rows of each."""
    if asked := verdicts(found):
        yield "What is asked of a GPU", ("figure", "value", "enough"), [
            (name, value, "yes" if enough else "no") for name, value, enough in asked
        ]  # fmt: skip
    for target, parts in found["targets"].items():
        for part, make in _TABLES.items():
            if part in parts:
                yield from make(target, parts[part])
        training = {name.removeprefix("train_"): one for name, one in parts.items() if name.startswith("train_")}
        if training:
            head = (
                "head",
                "tokens/s",
                "answer tokens/s",
                "TFLOP/s",
                "MFU",
                "memory GB",
                "conversations a pass",
                "engine",
            )
            keys = ("perf/tokens_per_s", "perf/answer_tokens_per_s", "perf/tflops", "perf/mfu", "perf/memory_gb")
            keys += ("micro_batch", "engine")
            yield f"{target}: training", head, [(kind, *(one.get(k) for k in keys)) for kind, one in training.items()]
    if found["mid"]:
        head = ("batch, method", "MAT", "speedup", "from", "to", "tokens/s", "exact match", "ties")
        keys = ("mat", "speedup", "speedup_lo", "speedup_hi", "tokens_per_s", "exact_match", "ties")
        wrong = [batch for batch, summary in found["mid"].items() if not summary["valid"]]
        title = "A trained target of middle size" + (f" (batch {', '.join(wrong)}: {INVALID})" if wrong else "")
        yield title, head, [
            (f"{batch}, {name}", *(method[key] for key in keys))
            for batch, summary in found["mid"].items()
            for name, method in summary["methods"].items()
        ]  # fmt: skip


def _roofline(target: str, part: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[str], Rows]]:
    rows = [
        (batch, row["pass_s"] * 1e3, row["bound_s"] * 1e3, row["share_of_roofline"])
        for batch, row in part["by_batch"].items()
    ]
    title = f"{target}: a pass against the roofline (copy {part['copy_gb_per_s']:.0f} GB/s, context {part['context']})"
    yield title, ("batch", "pass ms", "bound ms", "share"), rows


def _costs(target: str, part: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[str], Rows]]:
    for context, table in part["verify_s"].items():
        yield from _grid(f"{target}: ms of a verification round, context {context}", "batch \\ nodes", table)


def _heads(target: str, part: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[str], Rows]]:
    for kind, table in part["draft_s"].items():
        yield from _grid(f"{target}: ms of a draft of {kind}", "batch \\ depth", table)


def _grid(title: str, corner: str, table: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[str], Rows]]:
    columns = list(next(iter(table.values())))
    yield title, (corner, *columns), [(b, *(row[c] * 1e3 for c in columns)) for b, row in table.items()]


def _graphs(target: str, part: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[str], Rows]]:
    how = "captured" if part["captured"] else "not captured"
    rows = [
        (f"{batch}, {nodes}", one["eager_s"] * 1e3, one["graph_s"] * 1e3, one["gain"])
        for batch, row in part["by_batch"].items()
        for nodes, one in row.items()
    ]
    yield f"{target}: CUDA graphs ({how})", ("batch, nodes", "eager ms", "graph ms", "gain"), rows


def _generate(target: str, part: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[str], Rows]]:
    names = [name for name, value in part.items() if isinstance(value, float) and name != "memory_gb"]
    yield f"{target}: against transformers", ("figure", "value"), [(name, part[name]) for name in names]


def _loop(target: str, part: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[str], Rows]]:
    rows = [(name.rpartition("_b")[2], value) for name, value in part.items() if name.startswith("loop_efficiency")]
    yield f"{target}: bare module calls / seconds of the loop, eager", ("batch", "efficiency"), rows


def _oracle(target: str, part: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[str], Rows]]:
    rows = [
        (f"{batch}, {p}", row["mat"], row["measured"], row["predicted"], row["measured"] / row["predicted"])
        for batch, table in part["by_batch"].items()
        for p, row in table["oracle"].items()
    ]
    head = ("batch, acceptance", "MAT", "speedup", "predicted", "measured / predicted")
    yield f"{target}: speedup of a drafter of given acceptance", head, rows


_TABLES = {
    "roofline": _roofline, "costs": _costs, "heads": _heads, "graphs": _graphs, "generate": _generate,
    "loop": _loop, "oracle": _oracle,
}  # fmt: skip
DECODE = tuple(_TABLES)
"""The parts that decode, in the order in which they are measured."""


# ---- plots ----


def plots(found: Mapping[str, Any]) -> Iterator[str]:
    """SVG documents."""
    for target, parts in found["targets"].items():
        if "oracle" in parts:
            table = parts["oracle"]["by_batch"]
            lines = {
                f"acceptance {p}": [(float(b), one["oracle"][p]["measured"]) for b, one in table.items()]
                for p in next(iter(table.values()))["oracle"]
            }
            yield _chart(f"{target}: speedup by batch", lines, "batch", "speedup")
        if "costs" in parts:
            context, table = list(parts["costs"]["verify_s"].items())[-1]
            lines = {
                f"batch {b}": [(float(n), seconds * 1e3) for n, seconds in row.items()] for b, row in table.items()
            }
            yield _chart(f"{target}: ms of a round, context {context}", lines, "nodes", "ms")
    if found["mid"]:
        for key, label in (("mat", "MAT"), ("speedup", "speedup")):
            lines = {}
            for batch, summary in found["mid"].items():
                for name, method in summary["methods"].items():
                    if name != "plain" and method[key] is not None:
                        lines.setdefault(name, []).append((float(batch), method[key]))
            yield _chart(f"Middle-sized target: {label} by batch", lines, "batch", label)


def _chart(title: str, lines: Mapping[str, list[tuple[float, float]]], x: str, y: str) -> str:
    series = [Series(name, f"m{k % 9}", points) for k, (name, points) in enumerate(lines.items())]
    points = [point for one in lines.values() for point in one]
    tops = (max(p[0] for p in points), max(p[1] for p in points))
    return standalone(title, series, x, y, ticks(tops[0]), ticks(tops[1]))


# ---- the page and the paragraph ----


def settings(found: Mapping[str, Any]) -> dict[str, Any]:
    """Device, commit and torch, as the first part says; of the middle-sized target alone its hardware."""
    for parts in found["targets"].values():
        for part in parts.values():
            return {key: part["settings"][key] for key in ("device", "commit", "torch", "tiny")}
    for summary in found["mid"].values():
        return dict(summary["hardware"])
    return {}


def page(found: Mapping[str, Any]) -> str:
    """One HTML file, without scripts, fonts or links."""
    facts = ", ".join(f"{key} {value}" for key, value in settings(found).items())
    parts = [f"<h1>One GPU</h1><p>{escape(facts)}</p><div class=plots>", *plots(found), "</div>"]
    for title, head, rows in tables(found):
        cells = "".join(f"<th>{escape(str(name))}</th>" for name in head)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell(c))}</td>" for c in row) + "</tr>" for row in rows)
        parts.append(f"<h2>{escape(title)}</h2><table><tr>{cells}</tr>{body}</table>")
    return f"<!doctype html><meta charset=utf-8><title>One GPU</title><style>{STYLE}</style>{''.join(parts)}\n"


def paragraph(found: Mapping[str, Any], command: str) -> str:
    """Markdown for RESULTS.md: the figures that are asked for, and a line a part."""
    facts = settings(found)
    if not facts:
        return f"`{command}`: nothing is measured yet.\n"
    lines = [f"`{command}`; {', '.join(f'{key} {value}' for key, value in facts.items())}."]
    if facts.get("tiny"):
        lines.append("Small shapes: that it runs, not how fast. The figures of a GPU are owed.")
    lines += [f"- {name}: {value:.3f}{'' if ok else ' (not enough)'}" for name, value, ok in verdicts(found)]
    for target, parts in found["targets"].items():
        if "roofline" in parts:
            shares = [f"{b}: {row['share_of_roofline']:.2f}" for b, row in parts["roofline"]["by_batch"].items()]
            lines.append(f"- {target}: share of the roofline by batch {', '.join(shares)}")
        if "generate" in parts:
            lines.append(f"- {target}: {parts['generate']['null_vs_generate']:.2f} times as fast as transformers")
        for name, one in parts.items():
            if name.startswith("train_"):
                kind, mfu = name.removeprefix("train_"), one.get("perf/mfu")
                rates = f"{one['perf/tokens_per_s']:.0f} tokens/s, MFU {cell(mfu)}, {one['perf/memory_gb']:.1f} GB"
                lines.append(f"- {target}: training {kind} {rates}")
    for batch, summary in found["mid"].items():
        said = [
            f"{name} MAT {cell(method['mat'])} speedup {cell(method['speedup'])}"
            for name, method in summary["methods"].items()
            if name != "plain"
        ]
        said += [] if summary["valid"] else [INVALID]
        lines.append(f"- middle-sized target, batch {batch}: {'; '.join(said)}")
    return "\n".join(lines) + "\n"


def cell(value: Any) -> str:
    """A figure as a table shows it; what was not measured is a dash."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3f}"
