"""The target's own answers to the training questions: what the head learns to predict.

Invariant: every sample of the corpus ends up either with its answers and its length in tokens, or with the reason why
it cannot be used, in shards keyed by data, target and settings. Shards are only ever appended to and belong to samples,
not to processes, so an interrupted pass goes on with any number of processes and nothing is computed twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmspec.drafters.null import NullDrafter
from mmspec.loop import generate
from mmspec.policy import SkipPolicy
from mmspec.recipe import Data, Recipe
from mmspec.records import Quarantine, RecordError
from mmspec.sampling import GreedySampler
from mmspec.types import Output, Prompt, Request, Target
from train.corpus import IMAGE_MARK, Corpus, Sample
from train.encode import encode, fitted, length_limit
from train.placement import uneven
from train.stopping import Stopped, Stopper
from train.tracking import Tracker
from train.world import World

VERSION = 1
CHUNK_BATCHES = 4
"""Samples whose images are open at a time, in decoding batches."""


@dataclass(frozen=True)
class Dialogue:
    """The answers a sample is trained on.

    Args:
        answers: one per answered turn.
        finished: whether each ended in a stop token (else it was cut at a limit, and no stop token is trained).
        length: tokens of the whole conversation.
    """

    answers: tuple[str, ...]
    finished: tuple[bool, ...]
    length: int


@dataclass
class Prepared:
    """A corpus with answers: `dialogues[k]` belongs to `corpus.samples[k]`; unusable samples are in `bad`."""

    dialogues: dict[int, Dialogue] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)


def answer_counts(corpus: Corpus, prepared: Prepared, target: Target, world: World) -> Tensor:
    """How often each token occurs in the replies, [V] float64, weighted as the sources are; the same on every rank.

    Every rank must call. Pictures are left out: they change no token of a reply.
    """
    counts = torch.zeros(target.shape.vocab_size, dtype=torch.float64)
    for index in sorted(prepared.dialogues)[world.rank :: world.size]:
        sample = replace(corpus.samples[index], pictures=())
        sample = replace(sample, turns=tuple(turn.replace(IMAGE_MARK, "") for turn in sample.turns))
        prompt, answer = encode(sample, prepared.dialogues[index], target, target.max_length)
        counts += corpus.weights[index] * prompt.input_ids[answer > 0].bincount(minlength=len(counts))
    return world.sum(counts)


def answers_key(recipe: Recipe, corpus: Corpus, target: Target) -> str:
    """Names exactly this data, target and these settings."""
    data = recipe.data
    settings = [VERSION, corpus.digest, target.fingerprint, recipe.target.arithmetic, data.answers, data.max_new_tokens]
    return hashlib.sha256(json.dumps([*settings, length_limit(data, target)]).encode()).hexdigest()[:12]


def answers_folder(recipe: Recipe, corpus: Corpus, target: Target) -> Path:
    """Where the shards of answers are; stored features bring theirs along."""
    data = recipe.data
    parent = Path(data.answers_dir) if data.answers_dir else recipe.folder / "answers"
    return (Path(data.features) / "answers" if data.features else parent) / answers_key(recipe, corpus, target)


def answers_digest(prepared: Prepared) -> str:
    """Hash of all conversations' answers and lengths."""
    entries = [(k, d.answers, d.finished, d.length) for k, d in sorted(prepared.dialogues.items())]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16]


def prepare(
    recipe: Recipe,
    corpus: Corpus,
    target: Target,
    world: World,
    stopper: Stopper,
    tracker: Tracker,
    quarantine: Quarantine,
) -> Prepared:
    """Answers every sample, this rank its share of what no shard has yet.

    Every rank must call. Unusable samples go to the quarantine.

    Raises:
        InputError: more records are unusable than `data.max_bad_share` allows.
        Stopped: asked to stop; what is done is kept.
    """
    folder = answers_folder(recipe, corpus, target)
    folder.mkdir(parents=True, exist_ok=True)
    done = _read_shards(folder)
    open_ones = [index for index in range(len(corpus)) if index not in done.dialogues and index not in done.bad]
    # All ranks have read the shards before any rank appends to them.
    world.barrier()
    mine = open_ones[world.rank :: world.size]
    # Stops at the number of bad samples that no later good one can make up for.
    tolerated = int(recipe.data.max_bad_share * corpus.n_read)
    tracker.progress("answers", len(mine), 0, "sample")
    if open_ones:
        worker = _Worker(recipe.data, corpus, target, stopper, tracker, quarantine.count + len(done.bad))
        # A request to stop raises inside the decoding loop; the other ranks hear of it below.
        with _Shard(folder / f"part-{world.rank}.jsonl") as shard, contextlib.suppress(Stopped), uneven(target):
            worker.run(mine, shard, tolerated)
        target.free()
    tracker.end_progress()
    stopper.check_together()
    world.barrier()
    done = _read_shards(folder)
    for index in sorted(done.bad):
        sample = corpus.samples[index]
        quarantine.add(sample.file, sample.line, sample.id, done.bad[index])
    quarantine.check(corpus.n_read, recipe.data.max_bad_share)
    return done


class _Shard:
    """A JSONL file that is appended to; a torn last line of a killed process is closed off first."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> _Shard:
        torn = self.path.is_file() and self.path.stat().st_size > 0 and not self.path.read_bytes().endswith(b"\n")
        self._file = self.path.open("a", encoding="utf-8")
        if torn:
            self._file.write("\n")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._file.flush()


class _Worker:
    """One rank's share of the answers."""

    def __init__(
        self, data: Data, corpus: Corpus, target: Target, stopper: Stopper, tracker: Tracker, n_bad: int
    ) -> None:
        self.data, self.corpus, self.target = data, corpus, target
        self.stopper, self.tracker, self.n_bad = stopper, tracker, n_bad
        self.limit = length_limit(data, target)
        self.n_answers = 0

    def run(self, mine: Sequence[int], shard: _Shard, tolerated: int) -> None:
        """Answers samples chunk by chunk; raises Stopped when asked to stop."""
        size = self.data.answer_batch * CHUNK_BATCHES
        # Conversations of a kind together: later turns then still fill a batch.
        ordered = sorted(mine, key=lambda index: len(self.corpus.samples[index].turns))
        for start in range(0, len(ordered), size):
            chunk = ordered[start : start + size]
            self.stopper.check()
            if self.n_bad > tolerated:
                return
            if self.data.answers == "given":
                results: Iterable[tuple[int, Dialogue | str]] = ((i, self._given(i)) for i in chunk)
            else:
                results = self._answer(chunk)
            for index, result in results:
                self._note(index, result, shard)

    def _note(self, index: int, result: Dialogue | str, shard: _Shard) -> None:
        if isinstance(result, str):
            self.n_bad += 1
            shard.write({"index": index, "bad": result})
        else:
            entry = {"answers": result.answers, "finished": result.finished, "length": result.length}
            shard.write({"index": index, "id": self.corpus.samples[index].id, **entry})
        self.tracker.advance(1, answers=self.n_answers, quarantined=self.n_bad)

    def _given(self, index: int) -> Dialogue | str:
        sample = self.corpus.samples[index]
        if not sample.answers:
            return "no given answer"
        return self._measured(sample, sample.answers, (True,) * len(sample.answers))

    def _measured(self, sample: Sample, answers: Sequence[str], finished: Sequence[bool]) -> Dialogue | str:
        """The dialogue with its length, or the reason why it is no training example."""
        dialogue = Dialogue(tuple(answers), tuple(finished), 0)
        try:
            return fitted(sample, dialogue, self.target, self.limit)
        except (RecordError, ValueError) as error:
            return _line(error)

    def _answer(self, chunk: Sequence[int]) -> Iterable[tuple[int, Dialogue | str]]:
        """Turn by turn: all first questions together, then all second ones with the target's own answers as history."""
        answers: dict[int, list[str]] = {index: [] for index in chunk}
        finished: dict[int, list[bool]] = {index: [] for index in chunk}
        live = list(chunk)
        for turn in range(max(len(self.corpus.samples[index].turns) for index in chunk)):
            requests: list[Request] = []
            for index in [i for i in live if len(self.corpus.samples[i].turns) > turn]:
                prompt = self._prompt(index, answers[index])
                if isinstance(prompt, Prompt):
                    requests.append(Request(str(index), prompt, self._room(prompt), index))
                elif turn == 0:
                    yield index, prompt
                    live.remove(index)
            for output in self._generate(requests):
                index = int(output.id)
                if output.error:
                    yield index, output.error
                    live.remove(index)
                    continue
                finished[index].append(output.finish_reason == "stop")
                answers[index].append(self._text(output))
        for index in live:
            yield index, self._measured(self.corpus.samples[index], answers[index], finished[index])

    def _prompt(self, index: int, answers: Sequence[str]) -> Prompt | str:
        sample = self.corpus.samples[index]
        try:
            prompt = self.target.encode(sample.messages(answers, len(answers) + 1), sample.images())
        except (RecordError, ValueError) as error:
            return _line(error)
        if len(prompt) >= self.limit:
            return f"prompt of {len(prompt)} tokens is longer than the context ({self.limit} tokens)"
        return prompt

    def _room(self, prompt: Prompt) -> int:
        return min(self.data.max_new_tokens, self.limit - len(prompt))

    def _generate(self, requests: Sequence[Request]) -> list[Output]:
        if not requests:
            return []
        return generate(
            self.target,
            requests,
            NullDrafter(),
            SkipPolicy(),
            GreedySampler(),
            max_batch=self.data.answer_batch,
            on_output=self._heard,
        )

    def _heard(self, output: Output) -> None:
        self.n_answers += 1
        self.tracker.advance(0, answers=self.n_answers, quarantined=self.n_bad)
        self.stopper.check()

    def _text(self, output: Output) -> str:
        tokens = output.tokens[:-1] if output.finish_reason == "stop" else output.tokens
        return self.target.decode(tokens).strip()


def _read_shards(folder: Path) -> Prepared:
    """Everything that is known so far, whichever process wrote it."""
    known = Prepared()
    for path in sorted(folder.glob("part-*.jsonl")):
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                entry = json.loads(line)
            except ValueError:
                # The torn last line of a process that was killed: its sample is answered again.
                continue
            index = int(entry["index"])
            if "bad" in entry:
                known.bad[index] = str(entry["bad"])
            else:
                known.dialogues[index] = Dialogue(
                    tuple(entry["answers"]), tuple(entry["finished"]), int(entry["length"])
                )
    return known


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
