"""Whether answers are right, where a data folder says what is: a check that the text compared is worth comparing.

Two files are read, both optional: `facts.json` of the synthetic splits (what a correct answer contains), and
`references.jsonl`, one object a line: `{"id", "turn": 1, "metric": "gqa" | "vqa" | "choice", "answers": [...]}`.

Invariant: a score is of the text alone, in [0, 1]; an answer without a reference has none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmspec.types import InputError

FACTS_FILE, REFERENCES_FILE = "facts.json", "references.jsonl"
N_AGREE = 3
"""Annotators who make an answer of TextVQA wholly right."""


@dataclass
class References:
    """What is right, by record and turn.

    Args:
        by_turn: (id, 1-based turn) to a function that scores a text.
    """

    by_turn: dict[tuple[str, int], Callable[[str], float]] = field(default_factory=dict)

    def grade(self, id: str, turn: int, text: str) -> float | None:
        """The score of an answer, None without a reference."""
        score = self.by_turn.get((id, turn))
        return None if score is None else score(text)


def load_references(folder: Path) -> References | None:
    """The references of a data folder, None where it has none.

    Raises:
        InputError: a file is not what it should be; names it, the line and what is wrong.
    """
    found: dict[tuple[str, int], Callable[[str], float]] = {}
    facts, references = folder / FACTS_FILE, folder / REFERENCES_FILE
    if facts.is_file():
        found |= _facts(facts)
    if references.is_file():
        for number, line in enumerate(references.read_bytes().splitlines(), start=1):
            if line.strip():
                key, score = _reference(line, f"{references}, line {number}")
                found[key] = score
    return References(found) if found else None


def said(answer: str, text: str) -> bool:
    """Whether an answer occurs in a text as whole words; case, articles and punctuation do not matter."""
    wanted, words = normalised(answer), normalised(text)
    n = len(wanted)
    return n > 0 and any(words[i : i + n] == wanted for i in range(len(words) - n + 1))


def gqa(answers: Sequence[str], text: str) -> float:
    """1 where the answer of GQA is said. The benchmark asks for whole sentences, so that equality would fail them."""
    return float(any(said(answer, text) for answer in answers))


def vqa(answers: Sequence[str], text: str) -> float:
    """TextVQA's soft accuracy: min(1, annotators whose answer is said / 3); of fewer than 3, of their number."""
    return min(1.0, sum(said(answer, text) for answer in answers) / min(N_AGREE, len(answers)))


def choice(answers: Sequence[str], text: str) -> float:
    """1 where the letter chosen is the right one (MMMU-Pro)."""
    return float(chosen_letter(text) in {answer.strip().strip("()").upper() for answer in answers})


def chosen_letter(text: str) -> str | None:
    """The option a text decides for: what follows the last "answer is" or "Answer:", else the last letter in brackets,
    else a letter that is all there is."""
    for pattern in (r"(?i:answer(?:\s+is|\s*:))[\s*:(]*([A-J])\b", r"\(([A-J])\)", r"^\s*([A-J])[\s.)]*$"):
        if found := re.findall(pattern, text):
            return str(found[-1])
    return None


def normalised(text: str) -> list[str]:
    """Words in lower case, without articles and punctuation."""
    words = re.findall(r"\w+(?:[.,:]\d+)*", text.lower())
    return [word for word in words if word not in ("a", "an", "the")]


METRICS: dict[str, Callable[[Sequence[str], str], float]] = {"gqa": gqa, "vqa": vqa, "choice": choice}


def _facts(path: Path) -> dict[tuple[str, int], Callable[[str], float]]:
    """The share of a turn's facts that an answer contains. Raises InputError where they are none."""
    # Only here: a real data folder must not pay for importing the renderer.
    from mmspec.synth import Fact, check

    by_turn: dict[tuple[str, int], list[Any]] = {}
    try:
        for id, entries in json.loads(path.read_bytes()).items():
            for entry in entries:
                fact = Fact(**entry)
                check(fact, "")  # or it would raise when the first answer is scored
                by_turn.setdefault((id, fact.turn + 1), []).append(fact)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} holds no facts ({type(error).__name__}: {error}); of each id give a list of turn, kind and "
            f"expected, or remove the file and use {REFERENCES_FILE}"
        ) from None

    def scored(facts: Sequence[Any]) -> Callable[[str], float]:
        return lambda text: sum(check(fact, text) for fact in facts) / len(facts)

    return {key: scored(facts) for key, facts in by_turn.items()}


def _reference(line: bytes, where: str) -> tuple[tuple[str, int], Callable[[str], float]]:
    try:
        entry = json.loads(line)
        key = str(entry["id"]), int(entry.get("turn", 1))
        metric, answers = str(entry["metric"]), [str(answer) for answer in entry["answers"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{where}: no reference ({type(error).__name__}: {error}); give id, metric and answers"
        ) from None
    if metric not in METRICS or not answers:
        raise InputError(
            f"{where}: metric {metric!r} with {len(answers)} answers; use {', '.join(METRICS)} and at least one"
        )
    score = METRICS[metric]
    return key, lambda text: score(answers, text)
