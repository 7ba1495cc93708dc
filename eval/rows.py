"""`requests.jsonl`: one line per request and method, appended a group at a time and read back after an interruption.

Invariant: a group's lines are one append; one that an interruption left incomplete is decoded again, and of two lines
about the same answer the later one counts. So what is read back is what an unbroken run would have written.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.bench import Result
from eval.tasks import Task
from mmspec.files import replacing
from mmspec.metrics import Match
from mmspec.types import InputError, Output

SCHEMA = "mmspec-request/2"
ROUND = ("action", "nodes", "depth", "accepted", "emitted", "draft_us", "verify_us", "commit_us")
"""What stands in each entry of `rounds`; the microseconds are those of the step, which the rows of a batch share."""

Cell = tuple[int, float]
"""Batch size and temperature."""


def as_row(result: Result, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The line of a result.

    Args:
        result: of one request and method.
        facts: of the run, its sitting, the cell and the method: `run_id`, `batch`, `temperature`, `drafter`, ...
    """
    output, match = result.output, result.match
    rounds = [
        [action, nodes, depth, accepted, emitted, *micros]
        for (action, nodes, accepted, emitted), (depth, *micros) in zip(output.rounds, result.steps, strict=True)
    ]
    return {
        "schema": SCHEMA,
        **facts,
        "id": result.id,
        "topic": result.topic,
        "category": result.category,
        "image": result.image,
        "turn": result.turn,
        "method": result.method,
        "prompt_tokens": result.prompt_tokens,
        "visual_tokens": result.visual_tokens,
        "output_ids": output.tokens,
        "text": result.text,
        "finish_reason": output.finish_reason,
        "ttft_s": output.ttft_s,
        "decode_s": output.latency_s - output.ttft_s,
        "total_s": output.latency_s,
        "group": result.group,
        "group_s": result.group_s,
        "group_phases_s": dict(result.phases_s),
        "group_energy_j": result.energy_j,
        "group_peak_bytes": result.peak_bytes,
        "rounds": rounds,
        "identical": match.identical if match else None,
        "tie": match.tie if match else None,
        "first_divergence": match.first_divergence if match else None,
        "divergence_gap": result.gap,
    }


def from_row(row: Mapping[str, Any]) -> Result:
    """The result that a line was made of. Raises KeyError, TypeError or ValueError where it is no such line."""
    rounds = [(entry[0], entry[1], entry[3], entry[4]) for entry in row["rounds"]]
    steps = [(entry[2], *entry[5:8]) for entry in row["rounds"]]
    output = Output(row["id"], row["output_ids"], row["finish_reason"], row["ttft_s"], row["total_s"], rounds)
    match = None if row["identical"] is None else Match(row["first_divergence"], row["tie"])
    return Result(
        id=row["id"],
        topic=row["topic"],
        image=row["image"],
        turn=row["turn"],
        method=row["method"],
        output=output,
        text=row["text"],
        group=row["group"],
        group_s=row["group_s"],
        match=match,
        prompt_tokens=row["prompt_tokens"],
        visual_tokens=row["visual_tokens"],
        category=row["category"],
        steps=steps,
        phases_s=row["group_phases_s"],
        energy_j=row["group_energy_j"],
        peak_bytes=row["group_peak_bytes"],
        gap=row["divergence_gap"],
    )


class Rows:
    """The lines of one run, in a file of this process.

    Args:
        path: appended to.
        earlier: further files that may hold groups of the same run.
        run_id: lines of another run are not taken.
        resume: go on with what is in the files; else the file starts anew.

    Raises:
        InputError: a file holds lines of another run.
    """

    def __init__(self, path: Path, earlier: Sequence[Path] = (), run_id: str = "", resume: bool = False) -> None:
        self.path = path
        self._groups: dict[tuple[Cell, int], list[dict[str, Any]]] = {}
        self._costs: dict[tuple[Cell, str], str | None] = {}
        if not resume:
            path.unlink(missing_ok=True)
            return
        mine = list(read(path))
        for row in (*mine, *(row for other in earlier for row in read(other))):
            if row.get("run_id") != run_id:
                raise InputError(f"{path} holds results of another run; leave out --resume, or give another --out")
            cell = row["batch"], row["temperature"]
            self._groups.setdefault((cell, row["group"]), []).append(row)
            self._costs[cell, row["method"]] = row.get("costs")
        # Cut what was torn off, so that the next append starts a line of its own.
        if path.is_file():
            _replace(path, mine)

    def recall(self, cell: Cell, methods: Sequence[str], number: int, group: Sequence[Task]) -> list[Result] | None:
        """The results of a group, ordered by method, then request; None where it has to be decoded (again)."""
        rows = {(row["method"], row["id"], row["turn"]): row for row in self._groups.get((cell, number), ())}
        wanted = [(name, task.record.id, task.turn) for name in methods for task in group]
        if set(wanted) != set(rows):
            return None
        return [from_row(rows[key]) for key in wanted]

    def check_costs(self, cell: Cell, costs: Mapping[str, str | None]) -> None:
        """Before more of a cell is decoded. (One that is whole may be of other costs: a later cell may measure anew.)

        Args:
            costs: hashes of what each method decides by now; None of one that decides by none.

        Raises:
            InputError: what there is of the cell was decided by others.
        """
        for method, now in costs.items():
            before = self._costs.get((cell, method), now)
            if before != now:
                raise InputError(
                    f"--resume: {self.path} was begun with other costs of {method} ({before}, now {now}), which were "
                    "measured again since; leave out --resume to start anew"
                )

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds lines, all of them or none."""
        blob = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        with self.path.open("ab", buffering=0) as file:
            file.write(blob)
            os.fsync(file.fileno())


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps every other run out of a folder until this one has ended, however it ends.

    Raises:
        InputError: another run is at work there.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another run is writing to {folder}: wait for it or end it (processes of a torchrun that was killed "
                "by force live on), or give another --out"
            ) from None
        yield
    finally:
        os.close(handle)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that are whole, those of incomplete groups among them; [] without a file."""
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("schema") == SCHEMA:
            rows.append(row)
    return rows


def merge(paths: Sequence[Path], into: Path, key: Any) -> list[dict[str, Any]]:
    """Puts the lines of several files into one, in the order of `key`, each once; the other files go.

    Args:
        paths: of all processes, and what an earlier run has merged.
        into: the one file.
        key: of a row; of rows with one key the last is kept.

    Returns:
        The lines.
    """
    found = {key(row): row for path in paths for row in read(path)}
    rows = [found[place] for place in sorted(found)]
    _replace(into, rows)
    for path in paths:
        if path != into:
            path.unlink(missing_ok=True)
    return rows


def _replace(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a file anew, whole or not at all."""
    with replacing(path) as scratch, scratch.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
