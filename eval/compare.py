"""Puts evaluations side by side: MAT, speedup and latency of each method in two runs, and how sure the difference is.

    python -m eval.compare runs/before/eval runs/after/eval                  # methods of the same name
    python -m eval.compare runs/eagle/eval runs/msd/eval --method eagle msd  # of the first run and of the others
    python -m eval.compare runs/all runs/all --method eagle medusa           # two methods of one run
    python -m eval.compare runs/1 runs/2 runs/3 --out runs/side_by_side      # Markdown, CSV and JSON too

Every further RUN is compared with the first one. A RUN is a folder that eval.mmspec wrote (summary.json and
requests.jsonl), or a run folder with one in it (eval/). Methods are those of one name in both; where two runs have none
in common, it is what each is about (`primary` in its summary.json).

What can be compared. Times of two runs were taken at different times, when the machine may have been slower or faster;
so none is compared with another run's. In each run every prompt was decoded by plain decoding too, right beside the
methods: a speedup is a ratio within its run, and what is compared is the ratio of the speedups (1.05: the second is 5%
faster relative to plain decoding). Latencies likewise are shares of plain decoding's latency in the same run. That
holds for one machine, target, dtype, data and the same settings of decoding; runs that differ there are refused, and
the line says in what. Other versions of the software are allowed, and named. MAT is no time: --mat-only compares just
that, also across machines.

How sure. Requests are matched by id and turn; those that plain decoding answered differently in the two runs (in half
precision, or after another version) were not the same work and are left out, and counted. Intervals are 95% of a
paired bootstrap that draws whole images (batch size above 1: whole groups for times). `p` is two-sided, and p_holm
holds it to the level of its family: all that is said here of one figure over all topics together, and all that is
said of one figure by topic. * marks p_holm under 0.05. A run that is not valid (its answers differ from plain
decoding's) is marked INVALID, and nothing is claimed of its times.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from eval import tables
from eval.contrasts import DEFINITIONS, FIGURES, TIMES, Side, contrast
from eval.evaluated import Evaluated, differences, load, matched, version_notes
from eval.summary import OVERALL, clean, number
from eval.tasks import PLAIN
from mmspec import checkpoint, metrics
from mmspec.arguments import Parser, command
from mmspec.types import InputError

PROGRAM = "eval.compare"
SCHEMA = "mmspec-compare/1"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COLUMNS = ("first", "second", "batch_size", "temperature", "method", "other", "topic", "n", "figure", "first_value",
           "second_value", "change", "lo", "hi", "p", "p_holm", "invalid")  # fmt: skip


def compare(runs: Sequence[Evaluated], named: Sequence[str], mat_only: bool, seed: int) -> dict[str, Any]:
    """All that is said of the runs.

    Args:
        runs: the first is what the others are compared with.
        named: methods: none, one for all runs, or one for each.
        mat_only: no times, so the machines may differ.
        seed: of the bootstrap.

    Returns:
        `runs`, `notes`, `definitions` and `rows`, one by pair, cell, method, topic and figure, by names of `COLUMNS`.

    Raises:
        InputError: two runs differ in what makes their figures comparable, or have nothing in common.
    """
    first = runs[0]
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for letter, other in zip(LETTERS[1:], runs[1:]):
        if differ := differences(first, other, mat_only):
            raise InputError(
                f"{other.shown} cannot be compared with {first.shown}: {'; '.join(differ)}"
                + (
                    "; --mat-only compares MAT alone"
                    if all(line.startswith("other hardware") for line in differ)
                    else ""
                )
            )
        notes += [f"{letter}: {line}" for line in version_notes(first, other)]
        found, left_out = _pair(first, other, letter, _methods(first, other, named, letter), mat_only, seed)
        rows += found
        if left_out:
            notes.append(f"{letter}: {left_out} answers are left out: plain decoding's differ from A's there")
    _adjust(rows)
    for letter, run in zip(LETTERS, runs):
        if run.unreliable:
            notes.append(f"{letter}: other processes ran meanwhile; its times are unreliable")
        if not run.valid:
            notes.append(
                f"{letter}: INVALID, its answers differ from plain decoding's and not at ties; no claims of times"
            )
    return {
        "schema": SCHEMA,
        "commit": checkpoint.git_commit(),
        "runs": [{"letter": letter, "run": run.shown, **run.facts} for letter, run in zip(LETTERS, runs)],
        "notes": list(dict.fromkeys(notes)),
        "definitions": DEFINITIONS,
        "rows": rows,
    }


def _methods(first: Evaluated, other: Evaluated, named: Sequence[str], letter: str) -> list[tuple[str, str]]:
    """Pairs of methods to compare. Raises InputError where a run has no such method."""
    if named:
        pair = named[0], named[LETTERS.index(letter)] if len(named) > 1 else named[0]
        for run, name in zip((first, other), pair):
            if name not in run.methods or name == PLAIN:
                raise InputError(f"--method {name}: {run.shown} has {', '.join(m for m in run.methods if m != PLAIN)}")
        return [pair]
    shared = [name for name in first.methods if name in other.methods and name != PLAIN]
    return [(name, name) for name in shared] or [(first.primary, other.primary)]


def _pair(
    first: Evaluated, other: Evaluated, letter: str, methods: Sequence[tuple[str, str]], mat_only: bool, seed: int
) -> tuple[list[dict[str, Any]], int]:
    """Rows of two runs, and how many answers were left out."""
    cells = [cell for cell in first.cells if cell in other.cells]
    if not cells:
        raise InputError(f"{other.shown} and {first.shown} share no batch size and temperature")
    rows, most = [], 0
    for cell in cells:
        keys, left_out = matched(first, other, cell)
        if not keys:
            raise InputError(
                f"{other.shown} and {first.shown} have no request in common that plain decoding answered alike"
            )
        most = max(most, left_out)
        for mine, theirs in methods:
            sides = [Side(run.results(cell, name, keys), run.results(cell, PLAIN, keys))
                     for run, name in ((first, mine), (other, theirs))]  # fmt: skip
            topics = list(dict.fromkeys(result.topic for result in sides[0].plain))
            for topic in [*topics, OVERALL]:
                a, b = sides if topic == OVERALL else [side.of(topic) for side in sides]
                found = contrast(a, b, cell[0], seed)
                facts = {
                    "first": "A", "second": letter, "batch_size": cell[0], "temperature": cell[1], "method": mine,
                    "other": theirs, "topic": topic, "n": len(a.mine),
                }  # fmt: skip
                for figure in FIGURES[:1] if mat_only else FIGURES:
                    rows.append(facts | {"figure": figure} | _said(found[figure], figure, (first, other), letter))
    return rows, most


def _said(entry: Mapping[str, Any], figure: str, runs: tuple[Evaluated, Evaluated], letter: str) -> dict[str, Any]:
    """What is said of a figure: of times of a run that is not valid, nothing."""
    values = {"first_value": entry["first"], "second_value": entry["second"]}
    values |= {key: entry[key] for key in ("change", "lo", "hi", "p")}
    invalid = "".join(name for name, run in zip(("A", letter), runs) if not run.valid)
    return {**(dict.fromkeys(values) if invalid and figure in TIMES else values), "invalid": invalid or None}


def _adjust(rows: Sequence[dict[str, Any]]) -> None:
    """Adds `p_holm`: a family is one figure, over all topics together or by topic."""
    families: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for row in rows:
        families.setdefault((row["figure"], row["topic"] == OVERALL), []).append(row)
    for family in families.values():
        ps = [float("nan") if row["p"] is None else row["p"] for row in family]
        for row, adjusted in zip(family, metrics.holm(ps)):
            row["p_holm"] = adjusted


# ---- how it is shown ----

HEAD = ("topic", "figure", "1st", "2nd", "change [95%]", "p Holm")
SHORT = {"decode_speedup": "decode", "latency_p50": "p50", "latency_p90": "p90"}
"""Figures in tables, which fit 80 columns."""


def blocks(found: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """By pair of runs, cell and method: a title, and lines of cells under `HEAD`."""
    grouped: dict[str, list[list[str]]] = {}
    for row in found["rows"]:
        name = row["method"] if row["method"] == row["other"] else f"{row['method']} / {row['other']}"
        where = f"batch size {row['batch_size']}, temperature {row['temperature']:g}"
        lines = grouped.setdefault(f"{row['first']} -> {row['second']}: {name}, {where}", [])
        topic = row["topic"] if row["figure"] == FIGURES[0] else ""
        lines.append(
            [
                topic,
                SHORT.get(row["figure"], row["figure"]),
                number(row["first_value"]),
                number(row["second_value"]),
                *_change(row),
            ]
        )
    return list(grouped.items())


def _change(row: Mapping[str, Any]) -> tuple[str, str]:
    """The change with its interval, and p with its mark, in words."""
    value, p = row["change"], row["p_holm"]
    if value is None:
        return ("INVALID" if row["invalid"] and row["figure"] in TIMES else "-"), "-"
    sign, unit = ("+", "") if row["figure"] == "mat" else ("", "x")
    ends = "" if row["lo"] is None else f" [{row['lo']:{sign}.2f}, {row['hi']:{sign}.2f}]"
    return f"{value:{sign}.2f}{unit}{ends}", "-" if p is None else f"{_p(p)}{'*' if p < metrics.LEVEL else ''}"


def _p(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def legend(found: Mapping[str, Any]) -> list[str]:
    """A line a run, and notes."""
    lines = []
    for run in found["runs"]:
        commit, plus, _ = str(run["commit"]).partition("+")
        said = f"{run['letter']}  {run['run']}: commit {commit[:9]}{plus}, plain decoding"
        lines.append(f"{said} {run['plain_tokens_per_s']:.0f} tokens/s{'' if run['valid'] else ', INVALID'}")
    return [*lines, *found["notes"]]


def page(found: Mapping[str, Any]) -> str:
    """All of it in Markdown."""
    parts = ["# Evaluations side by side\n", "".join(f"- {line}\n" for line in legend(found))]
    for title, lines in blocks(found):
        parts += [f"## {title}\n", tables.markdown(HEAD, lines)]
    parts.append("".join(f"- `{SHORT.get(name, name)}`: {text}\n" for name, text in found["definitions"].items()))
    parts.append("`p Holm` under 0.05 is marked *: adjusted over all that is said of that figure over all topics "
                 "together, or by topic.\n")  # fmt: skip
    return "\n".join(parts)


def show(found: Mapping[str, Any], console: Console) -> None:
    """On the terminal, in 80 columns."""
    for words in legend(found):
        console.print(words, soft_wrap=True, highlight=False, style="bold red" if "INVALID" in words else None)
    for title, lines in blocks(found):
        grid = Table(
            box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left", title_style="bold"
        )  # a space less between columns than usual
        for place, heading in enumerate(HEAD):
            grid.add_column(heading, justify="left" if place < 2 else "right", no_wrap=place > 0)
        for cells in lines:
            grid.add_row(*cells)
        console.print(grid)


def write(out: Path, found: Mapping[str, Any]) -> None:
    """`compare.md`, `compare.csv` and `compare.json`. Raises InputError where they cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "compare.md").write_text(page(found), encoding="utf-8")
        lines = [[row[name] for name in COLUMNS] for row in found["rows"]]
        (out / "compare.csv").write_text(tables.as_csv(COLUMNS, lines), encoding="utf-8")
        checkpoint.write_json(out / "compare.json", dict(found))
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error.strerror}") from None


@command(PROGRAM)
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    console = Console()
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folders of eval.mmspec; the first is what the others are compared with")
    add("--method", nargs="+", default=[], metavar="NAME", help="compare this one, or one for each RUN in its order")
    add("--mat-only", action="store_true", help="no times, so the machines may differ")
    add("--out", type=Path, metavar="DIR", help="write compare.md, compare.csv and compare.json there")
    add("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    args = parser.parse_args(argv)
    if not 2 <= len(args.runs) <= len(LETTERS):
        raise InputError(f"give 2 to {len(LETTERS)} runs, got {len(args.runs)}")
    if len(args.method) not in (0, 1, len(args.runs)):
        raise InputError(f"--method takes one name, or one for each of the {len(args.runs)} runs")
    found = clean(compare([load(Path(run)) for run in args.runs], args.method, args.mat_only, args.seed))
    show(found, console)
    if args.out:
        write(args.out, found)
        console.print(f"tables: {args.out / 'compare.md'}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
