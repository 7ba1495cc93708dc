"""Prints the tables of a finished evaluation again: `python -m eval.show runs/viskip_tiny/eval/summary.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from eval import tables
from eval.summary import show

USAGE = """\
usage: python -m eval.show EVAL [--markdown | --csv]

  EVAL        the results of eval.mmspec, e.g. runs/NAME/eval, or the summary.json in them
  --markdown  with decode-only speedup, latencies, ties and what the columns mean, as in tables.md
  --csv       one row for each cell, method and topic with all figures, as in tables.csv"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 2 when the file cannot be read as a summary."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = [word for word in arguments if word in ("--markdown", "--csv")]
    places = [word for word in arguments if word not in flags]
    if "-h" in places or "--help" in places:
        print(USAGE)
        return 0
    if len(places) != 1 or len(flags) > 1 or places[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        return 2
    path = Path(places[0])
    path = path / "summary.json" if path.is_dir() else path
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(summary, dict):
            raise ValueError(summary)
        if flags == ["--markdown"]:
            print(tables.page(summary), end="")
        elif flags == ["--csv"]:
            print(tables.as_csv([*tables.FACTS, *tables.FIGURES], tables.tidy(summary)), end="")
        else:
            show(summary, Console())
    except (OSError, ValueError, KeyError) as error:
        print(f"eval.show: error: {path} is no summary of eval.mmspec: {type(error).__name__}", file=sys.stderr)
        return 2
    if not flags:
        print(f"report: {path.parent / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
