"""Writes a finished evaluation as result files of the MMSpec benchmark: one JSONL file a method, one record a question.

    python -m eval.export_mmspec runs/viskip_tiny/eval --out runs/viskip_tiny/eval/mmspec

Every method gets per-round lists of accepted tokens, bonus excluded; plain decoding's are zeros, and it has
`decode_time` beside them, as the benchmark's baseline does. `new_tokens` counts the first token and the stop token;
`idxs` is the number of the last round, from 0 (-1 of an answer that was over with its first token). Times are seconds;
those of a batch are its steps', which its rows share.

Invariant: records are sorted by id, and nothing is in them that the run's requests.jsonl does not say.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.rows import read
from eval.tasks import PLAIN
from mmspec.arguments import Parser, command
from mmspec.files import write_text
from mmspec.types import InputError

PROGRAM = "eval.export_mmspec"


def export(rows: Sequence[Mapping[str, Any]], tstamp: float) -> dict[str, list[dict[str, Any]]]:
    """The benchmark's records by method.

    Args:
        rows: lines of `requests.jsonl`, all of one batch size and temperature.
        tstamp: when they were measured, seconds since 1970.
    """
    by_method: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        by_method.setdefault(row["method"], {}).setdefault(row["id"], []).append(row)
    return {method: [record(answered[id], tstamp) for id in sorted(answered)] for method, answered in by_method.items()}


def record(turns: Sequence[Mapping[str, Any]], tstamp: float) -> dict[str, Any]:
    """One question with all its turns, answered by one method."""
    turns = sorted(turns, key=lambda row: row["turn"])
    first = turns[0]
    choice: dict[str, Any] = {
        "index": 0,
        "turns": [row["text"] for row in turns],
        "idxs": [len(row["rounds"]) - 1 for row in turns],
        "new_tokens": [len(row["output_ids"]) for row in turns],
        "wall_time": [row["total_s"] for row in turns],
        "acceptance_length": [[entry[3] for entry in row["rounds"]] for row in turns],
        "draft_time": [_seconds(row, 5) for row in turns],
        "target_time": [_seconds(row, 6) for row in turns],
    }
    if first["method"] == PLAIN:
        choice["decode_time"] = [row["decode_s"] for row in turns]
    model = f"{Path(first['target']).name}-{first['method']}"
    return {
        "question_id": first["id"],
        "topic": first["topic"],
        "category": first["category"],
        "answer_id": hashlib.sha256(f"{first['run_id']}/{model}/{first['id']}".encode()).hexdigest()[:22],
        "model_id": model,
        "choices": [choice],
        "tstamp": tstamp,
    }


def _seconds(row: Mapping[str, Any], column: int) -> float:
    """The sum of a column of microseconds over the rounds."""
    return float(sum(entry[column] for entry in row["rounds"]) / 1e6)


def chosen(rows: Sequence[dict[str, Any]], batch: int | None, temperature: float | None) -> list[dict[str, Any]]:
    """The lines of one cell of a sweep; the first there is, where none is named.

    Raises:
        InputError: there is no such cell.
    """
    cells = dict.fromkeys((row["batch"], row["temperature"]) for row in rows)
    fitting = [c for c in cells if batch in (None, c[0]) and temperature in (None, c[1])]
    if not fitting:
        there = ", ".join(f"{b} and {t:g}" for b, t in cells)
        raise InputError(f"nothing was decoded at that --batch-size and --temperature; there are: {there or 'none'}")
    return [row for row in rows if (row["batch"], row["temperature"]) == fitting[0]]


def run(args: argparse.Namespace) -> list[Path]:
    """Reads, writes, and returns the files.

    Raises:
        InputError: the folder holds no results, or cannot be written to.
    """
    source = Path(args.run) / "requests.jsonl"
    rows = read(source)
    if not rows:
        raise InputError(f"{source} holds no results of eval.mmspec; give the folder that its --out named")
    out = Path(args.out) if args.out else Path(args.run) / "mmspec"
    written = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for method, records in export(chosen(rows, args.batch_size, args.temperature), source.stat().st_mtime).items():
            path = out / f"{method}.jsonl"
            write_text(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in records))
            written.append(path)
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error.strerror}") from None
    return written


@command(PROGRAM)
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__)
    parser.add_argument("run", metavar="DIR", help="folder of a finished evaluation (--out of eval.mmspec)")
    parser.add_argument("--out", metavar="DIR", help="where the files go (default: DIR/mmspec)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="which cell of a sweep (default: the first)")
    parser.add_argument("--temperature", type=float, metavar="T", help="which cell of a sweep (default: the first)")
    for path in run(parser.parse_args(argv)):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
