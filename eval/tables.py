"""Tables as Markdown and CSV: how one is written, and those of an evaluation: `tables.md` and `tables.csv`.

Invariant: a figure is copied from a `summary.json`, never computed here; one that is missing is a dash or empty.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.summary import DEFINITIONS, OF_THE_RUN, OVERALL, TOP_LEVEL, interval, number
from eval.tasks import PLAIN
from mmspec.files import write_text

MARKDOWN, CSV = "tables.md", "tables.csv"
INVALID = "INVALID: answers differ from plain decoding's, and not at ties; the speedups say nothing"
FIGURES = tuple(name for name in TOP_LEVEL if name != "accept_by_depth")
FACTS = ("batch_size", "temperature", "method", "topic", "valid")
SHOWN = ("mat", "speedup", "decode_speedup", "latency_p50_s", "ttft_p50_s", "tokens_per_s", "exact_match", "ties",
         "skip_rate")  # fmt: skip
"""Figures of `tables.md`; the CSV has all."""


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown; cells are shown as they are."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(_safe(cell) for cell in line)} |\n" for line in lines)


def as_csv(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The same as CSV; None is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([head, *rows])
    return out.getvalue()


def whole(value: int | None) -> str:
    """A count in words; a dash where there is none."""
    return "-" if value is None else f"{value:,}"


def _safe(cell: Any) -> str:
    return " ".join(str(cell).replace("|", "\\|").split())


def cells(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The cells of a run; one that was made before there were sweeps is one."""
    alone = {key: summary["settings"][key] for key in ("batch_size", "temperature")}
    found: list[Mapping[str, Any]] = summary.get("cells") or [{**summary, **alone}]
    return found


def tidy(summary: Mapping[str, Any]) -> list[list[Any]]:
    """One row for each cell, method and topic, `overall` among them: `FACTS`, then `FIGURES`."""
    rows: list[list[Any]] = []
    for cell in cells(summary):
        for method, topic, figures in _figures(cell):
            facts = [cell["batch_size"], cell["temperature"], method, topic, cell.get("valid", True)]
            rows.append([*facts, *(figures.get(name) for name in FIGURES)])
    return rows


def page(summary: Mapping[str, Any]) -> str:
    """All tables of a run in Markdown, with what was measured, on what, and what the columns mean."""
    said, machine = summary.get("settings", {}), summary.get("hardware", {})
    where = [machine.get("gpu") or machine.get("cpu"), f"{machine.get('threads')} threads"]
    where += [f"{name} {version}" for name, version in summary.get("versions", {}).items() if version]
    facts = ", ".join(f"{key} {said[key]}" for key in ("target", "data", "dtype", "max_new_tokens") if key in said)
    parts = [f"# Evaluation on {said.get('data', 'its data')}\n", f"{facts}. {', '.join(map(str, where))}.\n"]
    if not summary.get("valid", True):
        parts.append(f"**{INVALID}.**\n")
    for cell in cells(summary):
        parts.append(f"## Batch size {cell['batch_size']}, temperature {cell['temperature']:g}\n")
        rows = [
            [topic, method, figures["n_requests"], *(shown(name, figures) for name in SHOWN)]
            for method, topic, figures in sorted(_figures(cell), key=_by_topic(cell))
        ]
        parts.append(markdown(["topic", "method", "n", *SHOWN], rows))
        if cell.get("contention", {}).get("unreliable"):
            parts.append("Other processes ran meanwhile: times are unreliable.\n")
    meanings = DEFINITIONS | OF_THE_RUN
    parts.append("".join(f"- `{name}`: {meanings[name]}\n" for name in (*SHOWN, "valid")))
    return "\n".join(parts)


def shown(name: str, figures: Mapping[str, Any]) -> str:
    """One figure in words, a ratio of times with its interval."""
    value = figures.get(name)
    if name.endswith("speedup") and value is not None:
        ends = {f"speedup{end}": figures.get(f"{name}{end}") for end in ("", "_lo", "_hi")}
        return interval(ends)
    if isinstance(value, int) or value is None:
        return whole(value)
    return number(value, 3 if name in ("exact_match", "skip_rate", "latency_p50_s", "ttft_p50_s") else 2)


def write(out: Path, summary: Mapping[str, Any]) -> None:
    """Writes `tables.md` and `tables.csv`."""
    write_text(out / MARKDOWN, page(summary))
    write_text(out / CSV, as_csv([*FACTS, *FIGURES], tidy(summary)))


def _figures(cell: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for method, found in cell["methods"].items():
        for topic, figures in {**found["topics"], OVERALL: found[OVERALL]}.items():
            yield method, topic, figures


def _by_topic(cell: Mapping[str, Any]) -> Any:
    """Topics as the run had them, the whole last; within a topic methods as they were."""
    order = {topic: place for place, topic in enumerate([*cell["methods"][PLAIN]["topics"], OVERALL])}
    return lambda entry: order[entry[1]]
