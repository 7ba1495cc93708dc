"""A finished evaluation read back, and what must be the same of two before any figure of theirs is compared.

Invariant: two runs are told apart by what they say of themselves (`summary.json`, `run.json`) and by plain decoding's
answers, so the same words about other data or another target do not pass.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.bench import Result
from eval.rows import Cell, from_row, read
from eval.summary import SCHEMA
from eval.tasks import PLAIN
from mmspec.checkpoint import discreet
from mmspec.types import InputError

SAME = {
    "target": "target", "fingerprint": "target", "dtype": "dtype", "data": "data", "system": "system text",
    "pixels": "pixel limits", "history": "history", "max_new_tokens": "--max-new-tokens", "top_k": "--top-k",
    "top_p": "--top-p", "repetition_penalty": "--repetition-penalty", "no_repeat_ngram": "--no-repeat-ngram",
    "verifier": "verifier",
}  # fmt: skip
"""Settings that must be the same, by what they are called where they are not."""

Key = tuple[str, int]
"""Id of the record, and turn."""


@dataclass(frozen=True)
class Evaluated:
    """A run.

    Args:
        shown: its folder, without places of this machine.
        summary: `summary.json`.
        commit: it was made from, as far as is known.
        processes: that shared it.
        by: results by cell and method, each by request.
    """

    shown: str
    summary: Mapping[str, Any]
    commit: str | None
    processes: int | None
    by: Mapping[tuple[Cell, str], Mapping[Key, Result]]

    @property
    def valid(self) -> bool:
        """Whether its answers are plain decoding's."""
        return bool(self.summary["valid"])

    @property
    def unreliable(self) -> bool:
        """Whether other work slowed a cell."""
        return any(cell["contention"]["unreliable"] for cell in self.summary["cells"])

    @property
    def primary(self) -> str:
        """The method that it is about."""
        return str(self.summary["primary"])

    @property
    def methods(self) -> list[str]:
        """All, plain decoding first."""
        return list(self.summary["methods"])

    @property
    def cells(self) -> list[Cell]:
        """Batch sizes with temperatures."""
        return [(cell["batch_size"], cell["temperature"]) for cell in self.summary["cells"]]

    @property
    def facts(self) -> dict[str, Any]:
        """What a reader should know of it."""
        said = {key: self.summary[key] for key in ("run_id", "valid", "primary", "settings", "versions", "hardware")}
        rate = self.summary["methods"][PLAIN]["overall"]["tokens_per_s"]
        return {**said, "commit": self.commit, "unreliable": self.unreliable, "plain_tokens_per_s": rate}

    def results(self, cell: Cell, method: str, keys: Sequence[Key]) -> list[Result]:
        """Of a method for requests, in their order."""
        mine = self.by[cell, method]
        return [mine[key] for key in keys]


def load(path: Path) -> Evaluated:
    """Reads a run.

    Args:
        path: the folder that eval.mmspec wrote, or a run folder with one in it.

    Raises:
        InputError: there is none, it is not finished, or its files do not belong together.
    """
    folder = path if (path / "summary.json").is_file() or not (path / "eval").is_dir() else path / "eval"
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        run = folder / "run.json"
        begun = json.loads(run.read_text(encoding="utf-8")) if run.is_file() else {}
    except (OSError, ValueError):
        raise InputError(f"{path} is no finished run of eval.mmspec: it has no summary.json that can be read") from None
    if not isinstance(summary, dict) or summary.get("schema") != SCHEMA or "cells" not in summary:
        raise InputError(f"{path}: summary.json is not of the schema {SCHEMA}; run eval.mmspec again")
    by: dict[tuple[Cell, str], dict[Key, Result]] = {}
    for row in read(folder / "requests.jsonl"):
        if row.get("run_id") != summary["run_id"]:
            raise InputError(f"{path}: requests.jsonl is of another run than summary.json; run eval.mmspec again")
        one = from_row(row)
        by.setdefault(((row["batch"], row["temperature"]), one.method), {})[one.id, one.turn] = one
    for cell in summary["cells"]:
        for name, method in cell["methods"].items():
            wanted, there = method["overall"]["n_requests"], by.get((_cell(cell), name), {})
            if wanted != len(there):
                raise InputError(f"{path}: requests.jsonl has {len(there)} answers of {name}, summary.json {wanted}")
    return Evaluated(discreet(str(path)), summary, begun.get("git"), begun.get("processes"), by)


def _cell(entry: Mapping[str, Any]) -> Cell:
    return entry["batch_size"], entry["temperature"]


def differences(first: Evaluated, other: Evaluated, mat_only: bool = False) -> list[str]:
    """What keeps two runs from being compared, each in words that begin with `other`; [] where nothing does.

    Args:
        mat_only: no times will be compared, so hardware does not count.
    """
    found: dict[str, str] = {}
    a, b = first.summary["settings"], other.summary["settings"]
    for key, words in SAME.items():
        if a.get(key) != b.get(key):
            # Of a target of one name the fingerprint tells; else the name says more.
            found.setdefault(words, f"other {words} ({_short(b.get(key))}, there {_short(a.get(key))})")
    if any(temperature for _, temperature in (*first.cells, *other.cells)) and a.get("seed") != b.get("seed"):
        found["seed"] = f"other --seed ({b.get('seed')}, there {a.get('seed')})"
    if not mat_only:
        here, there = other.summary["hardware"], first.summary["hardware"]
        unlike = [key for key in {**there, **here} if here.get(key) != there.get(key)]
        if unlike:
            said = ", ".join(f"{key} {_short(here.get(key))}, there {_short(there.get(key))}" for key in unlike)
            found["hardware"] = f"other hardware ({said})"
        if first.processes != other.processes:
            found["processes"] = f"other number of processes ({other.processes}, there {first.processes})"
    return list(found.values())


def version_notes(first: Evaluated, other: Evaluated) -> list[str]:
    """Versions and commits that differ, which may be what is to be compared."""
    a, b = ({**run.summary["versions"], "commit": run.commit} for run in (first, other))
    return [f"{key} {b.get(key)}, of A {a.get(key)}" for key in {**a, **b} if a.get(key) != b.get(key)]


def matched(first: Evaluated, other: Evaluated, cell: Cell) -> tuple[list[Key], int]:
    """The requests that both runs answered and that were the same work for plain decoding, and how many were not.

    At a batch size above 1 groups are the units: one that holds another request, or one that is left out, is left out
    whole.
    """
    mine, theirs = first.by[cell, PLAIN], other.by[cell, PLAIN]
    shared = [key for key in mine if key in theirs]
    alike = [
        key
        for key in shared
        if mine[key].output.tokens == theirs[key].output.tokens
        and (mine[key].prompt_tokens, mine[key].visual_tokens) == (theirs[key].prompt_tokens, theirs[key].visual_tokens)
    ]
    if cell[0] > 1:
        sizes = [Counter(result.group for result in some.values()) for some in (mine, theirs)]
        pairs = Counter((mine[key].group, theirs[key].group) for key in alike)
        # All of a group here, and all of one there.
        same = {pair for pair, n in pairs.items() if n == sizes[0][pair[0]] == sizes[1][pair[1]]}
        alike = [key for key in alike if (mine[key].group, theirs[key].group) in same]
    return alike, len(shared) - len(alike)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
