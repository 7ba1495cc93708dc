"""Visual dependence in the report: what `eval.dependence` measured, found beside the run, and laid over its answers.

    python -m eval.dependence --ckpt RUN --data synth:testmini --out RUN/eval/dependence
    python -m eval.report RUN/eval

Invariant: nothing of another target or other data is shown; a token has a dependence only where the answer that was
measured is, from its start to there, token for token the one that is shown.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from mmspec.types import InputError

FOLDER = "dependence"
"""Within the folder of the run's results: where the report looks."""

N_LEVELS = 5
"""Shades of dependence: two deciles each."""

RESULT, TOKENS, SCHEMA = "dependence.json", "tokens.jsonl", "mmspec-dependence/1"


@dataclass(frozen=True)
class Dependence:
    """What is known.

    Args:
        result: `dependence.json`.
        answers: (tokens, dependence of those behind the first) by record and turn.
        bounds: largest dependence of each level but the last.
    """

    result: Mapping[str, Any]
    answers: Mapping[tuple[str, int], tuple[list[int], list[float]]]
    bounds: list[float]

    def levels(self, sample: Mapping[str, Any]) -> list[int | None]:
        """For each shown token of a sample its level, 0 depends least; None where it is not known."""
        ids = [token["id"] for token in sample["tokens"]]
        tokens, kl = self.answers.get((sample["id"], sample["turn"]), ([], []))
        same = next((n for n, (a, b) in enumerate(zip(ids, tokens)) if a != b), min(len(ids), len(tokens)))
        known = [None, *(bisect_left(self.bounds, value) for value in kl[: max(0, same - 1)])][:same]
        return [*known, *[None] * (len(ids) - len(known))]


def load(folder: Path, settings: Mapping[str, Any]) -> Dependence | None:
    """Read what `eval.dependence` wrote to a folder; None when it wrote nothing there.

    Args:
        folder: its `--out`.
        settings: of the run that is reported.

    Raises:
        InputError: it cannot be read, or is of another target or other data.
    """
    if not (folder / RESULT).is_file():
        return None
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in (folder / TOKENS).read_text(encoding="utf-8").splitlines()]
        if result["schema"] != SCHEMA:
            raise ValueError(result["schema"])
        answers = {(line["id"], line["turn"]): (line["tokens"], line["kl"]) for line in lines}
        measured = {key: result["settings"][key] for key in ("fingerprint", "data")}
        tops = [row["to"] for row in result["overall"][1:-1:2] if row["tokens"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder.name}/ holds nothing that this version of eval.dependence wrote ({type(error).__name__}): "
            "measure it again"
        ) from None
    for key, value in measured.items():
        if settings[key] != value:
            raise InputError(f"{folder.name}/ is of another {key} ({value}, the run's is {settings[key]}): not shown")
    return Dependence(result, answers, sorted(tops))


def joined(sample: Mapping[str, Any], levels: Sequence[int | None]) -> list[dict[str, Any]]:
    """The answer cut where source or level of its tokens change: `{text, source, level}`.

    Accepted tokens of one round belong together; a bonus ends its round, so equal neighbours never mix two rounds
    except skipped steps, which are single tokens anyway.
    """
    marked = list(zip(sample["tokens"], levels, strict=True))
    pieces = []
    for (source, level), members in groupby(marked, key=lambda item: (item[0]["source"], item[1])):
        if text := "".join(token["text"] for token, _ in members):
            pieces.append({"text": text, "source": source, "level": level})
    return pieces
