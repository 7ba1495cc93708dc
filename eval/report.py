"""`report.html`: a run to look at, in one file without scripts or network.

    python -m eval.report runs/viskip_tiny/eval                              # the page again, from the run's files
    python -m eval.report runs/viskip_tiny/eval --dependence runs/where      # with what eval.dependence found

`eval.mmspec` writes the page when it is done. What `eval.dependence` has written to the folder `dependence` beside it
is on the page too; it can be measured later, and this command then makes the page again without decoding anything.

Invariant: everything shown is in `summary.json`, `samples.json` or `dependence/`; nothing is computed anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval import report_charts as charts
from eval import report_views as views
from eval.report_dependence import FOLDER, N_LEVELS, Dependence, joined, load
from eval.summary import SCHEMA, gained, interval, number
from eval.tasks import PLAIN
from mmspec.arguments import Parser, command
from mmspec.checkpoint import write_json
from mmspec.files import write_text
from mmspec.pages import template
from mmspec.types import InputError

PROGRAM = "eval.report"
TEMPLATE = Path(__file__).with_name("report.html.j2")
SAMPLES = "samples.json"


def write(
    path: Path, summary: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], measured: Path | None = None
) -> None:
    """Write the report, whole or not at all, and beside it the samples that it shows.

    Args:
        path: the file.
        summary: what is in `summary.json`.
        samples: see `eval.samples.collect`.
        measured: what `eval.dependence` wrote (default: the folder `dependence` beside the report, if there is one).

    Raises:
        InputError: `measured` is given, and is not of this run. (What lies beside the report and is not of this run is
            left out, and the page says so.)
    """
    found, trouble = None, ""
    try:
        found = load(measured or path.parent / FOLDER, summary["settings"])
        if measured and not found:
            raise InputError(f"--dependence {measured} holds no dependence.json; python -m eval.dependence writes one")
    except InputError as error:
        if measured:
            raise
        trouble = str(error)
    write_json(path.parent / SAMPLES, list(samples))
    write_text(path, render(summary, samples, found, trouble))


def render(
    summary: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    found: Dependence | None = None,
    trouble: str = "",
) -> str:
    """The page as text.

    Args:
        summary, samples: as for `write`.
        found: visual dependence, where it was measured.
        trouble: why what there is of it is not shown.
    """
    cells = summary["cells"]
    seen = charts.looks(summary["methods"], summary["primary"])
    temperatures = list(dict.fromkeys(cell["temperature"] for cell in cells))
    names = [name for name in seen if name != PLAIN]
    largest = max(cell["batch_size"] for cell in cells)
    return template(TEMPLATE, number=number, interval=interval, gained=gained, label=views.label).render(
        summary=summary,
        cells=[_cell(cell, seen) for cell in cells],
        seen=seen,
        legend=[name for name in seen if seen[name].focus],
        others=[name for name in seen if not seen[name].focus],
        topics=list(summary["methods"][PLAIN]["topics"]),
        verdict=views.sentence(cells[0]),
        invalid=views.invalid(cells),
        busy=[cell for cell in cells if cell["contention"]["unreliable"]],
        largest=largest,
        batches=[(heat, drawn) for heat in temperatures if (drawn := charts.batch_chart(cells, seen, names, heat))],
        trades=[(heat, charts.trade_off(cells, seen, heat)) for heat in temperatures],
        samples=[_sample(sample, found) for sample in samples],
        dependence=_dependence(found) if found else None,
        trouble=trouble,
        n_levels=N_LEVELS,
    )


def _cell(cell: Mapping[str, Any], seen: Mapping[str, charts.Look]) -> dict[str, Any]:
    """What the page shows of one batch size and temperature."""
    methods = cell["methods"]
    names = [name for name in seen if name != PLAIN]
    return {
        **cell,
        "name": views.label(cell),
        "row": methods[cell["primary"]]["overall"],
        "plain": methods[PLAIN]["overall"],
        "leaders": views.leaders(cell),
        "radar": charts.topic_radar(methods, seen, names),
        "radars": [(name, charts.topic_radar(methods, seen, [name], small=True)) for name in views.by_speedup(methods)],
        "heats": [("Speedup", views.heat(methods, "speedup")), ("MAT", views.heat(methods, "mat"))],
        "depths": charts.depth_chart(methods, seen, names),
        "ranges": views.ranges(methods),
        "split": views.time_split(methods),
        "columns": views.columns(methods),
    }


def _sample(sample: Mapping[str, Any], found: Dependence | None) -> dict[str, Any]:
    """A sample with its text in pieces of one source and one level of dependence."""
    levels = found.levels(sample) if found else [None] * len(sample["tokens"])
    known = any(level is not None for level in levels)
    return {**sample, "pieces": joined(sample, levels), "known": known}


def _dependence(found: Dependence) -> dict[str, Any]:
    """What the page shows of visual dependence."""
    result, names = found.result, list(found.result["checkpoints"])
    last = result["overall"][-1]
    return {
        "names": names,
        "keys": [charts.Look(f"m{place % charts.N_FOCUS}", place, True).key for place in range(len(names))],
        "chart": charts.dependence_chart(result["overall"], names),
        "topics": [(topic, charts.dependence_chart(rows, names)) for topic, rows in result["topics"].items()],
        "rows": result["overall"],
        "last": last,
        "gains": [(name, cell) for name, cell in last["checkpoints"].items() if "gain" in cell],
        "result": result,
        "bounds": found.bounds,
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="EVAL", help="the results of eval.mmspec, e.g. runs/NAME/eval")
    parser.add_argument(
        "--dependence", type=Path, metavar="DIR", help=f"the results of eval.dependence (default: EVAL/{FOLDER})"
    )
    return parser


def again(folder: Path, measured: Path | None) -> Path:
    """Make the page of a finished run again. Raises InputError where its files are not there or not to be read."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        if summary.get("schema") != SCHEMA or "cells" not in summary:
            raise ValueError
        samples = json.loads((folder / SAMPLES).read_text(encoding="utf-8"))
    except OSError as error:
        name = Path(str(error.filename)).name
        remedy = (
            "run eval.mmspec again with --resume" if name == SAMPLES else "give the --out of a finished eval.mmspec"
        )
        raise InputError(f"{folder} has no {name}: {remedy}") from None
    except ValueError:
        raise InputError(
            f"{folder} was not written by this version of eval.mmspec; run it again with --resume"
        ) from None
    path = folder / "report.html"
    write(path, summary, samples, measured)
    return path


@command(PROGRAM, wrong=(InputError, OSError))
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = build_parser().parse_args(argv)
    path = again(args.folder, args.dependence)
    print(f"report: {path}")


if __name__ == "__main__":
    sys.exit(main())
