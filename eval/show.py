"""Prints the table of a finished evaluation again: `python -m eval.show runs/viskip_tiny/eval/summary.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from eval.summary import show


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 2 when the file cannot be read as a summary."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print("usage: python -m eval.show SUMMARY.json", file=sys.stderr)
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    path = Path(arguments[0])
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        show(summary, Console())
    except (OSError, ValueError, KeyError) as error:
        print(f"eval.show: error: {path} is no summary of eval.mmspec: {type(error).__name__}", file=sys.stderr)
        return 2
    print(f"report: {path.parent / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
