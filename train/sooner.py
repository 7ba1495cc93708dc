"""How much sooner the answers come when somebody drafts them: the same samples with and without, timed in turn."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from mmspec.metrics import mat
from mmspec.recipe import Data
from mmspec.types import InputError, Output
from train.asking import chunks
from train.drafting import PLAIN, Drafting, drafting
from train.regenerate import CHUNK_BATCHES, Worker
from train.session import Session

WARM_UP = 8
"""Samples that both answer once before the clock starts."""


@dataclass
class Side:
    """One way to the answers.

    Args:
        how: who drafts.
        seconds: of everything that regeneration does: pictures, prompts, decoding, measuring.
        outputs: of each sample, turn by turn.
    """

    how: Drafting
    seconds: float = 0.0
    outputs: dict[int, list[Output]] = field(default_factory=dict)

    @property
    def said(self) -> list[Output]:
        """All answers."""
        return [output for turns in self.outputs.values() for output in turns]

    @property
    def n_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(len(output.tokens) for output in self.said)

    def line(self) -> str:
        """Name, seconds, tokens/s, tokens per pass of the target."""
        rate = self.n_tokens / self.seconds
        return f"  {self.how.name:<16} {self.seconds:8.2f} s  {rate:8.0f} tokens/s  MAT {mat(self.said):.2f}"


def check(data: Data, processes: int) -> None:
    """What can be known before anything is loaded.

    Raises:
        InputError: nobody drafts, or there is more than one process.
    """
    if data.answers != "regenerated":
        raise InputError(f"--compare times the target's own answers, but data.answers={data.answers} asks for none")
    if data.answer_head is None and data.answer_method is None:
        raise InputError("--compare needs somebody to draft: --ckpt FOLDER, --method NAME, or the recipe's keys")
    if processes > 1:
        raise InputError(f"--compare times one process, not {processes}; leave --procs out")


def compare(session: Session, n: int) -> tuple[Side, Side]:
    """Answers n samples, evenly spread over the corpus, without and with the recipe's drafter; nothing is kept.

    Of a corpus of fewer all. They take turns chunk by chunk, and who comes first changes each time, so that a drift of
    the machine falls on both.

    Raises:
        InputError: as `check` does.
    """
    data, corpus = session.recipe.data, session.corpus
    check(data, session.world.size)
    n = min(n, len(corpus))
    picked = {k * len(corpus) // n for k in range(n)}
    sides = Side(PLAIN), Side(drafting(data, session.target))
    size = data.answer_batch * CHUNK_BATCHES
    ordered = [index for chunk in chunks(corpus, data, size) for index in chunk if index in picked]
    for side in sides:
        _answer(session, Side(side.how), ordered[:: max(1, len(ordered) // WARM_UP)])
    for number, start in enumerate(range(0, len(ordered), size)):
        for side in sides if number % 2 else sides[::-1]:
            _answer(session, side, ordered[start : start + size])
    session.tracker.say(_report(sides, len(ordered), data.answer_batch))
    return sides


def n_equal(sides: tuple[Side, Side]) -> int:
    """Answers that are equal token for token."""
    plain, other = sides
    pairs = ((k, turn) for k, turns in plain.outputs.items() for turn in range(len(turns)))
    return sum(_tokens(plain, k, turn) == _tokens(other, k, turn) for k, turn in pairs)


def _tokens(side: Side, index: int, turn: int) -> list[int] | None:
    turns = side.outputs.get(index, [])
    return turns[turn].tokens if turn < len(turns) else None


def _answer(session: Session, side: Side, chunk: Sequence[int]) -> None:
    def keep(output: Output) -> None:
        side.outputs.setdefault(int(output.id), []).append(output)

    worker = Worker(
        session.recipe.data, session.corpus, session.target, session.stopper, session.tracker, side.how, keep
    )
    began = time.perf_counter()
    for _ in worker.results(chunk):
        pass
    side.seconds += time.perf_counter() - began


def _report(sides: tuple[Side, Side], n: int, batch: int) -> str:
    plain, other = sides
    equal = f"{n_equal(sides)} of {len(plain.said)} answers equal token for token"
    lines = [
        f"{n} conversations, {len(plain.said)} answers, {plain.n_tokens} tokens, batch {batch}",
        *(side.line() for side in sides),
        f"  ratio {plain.seconds / other.seconds:.2f}; {equal}",
    ]
    return "\n".join(lines)
