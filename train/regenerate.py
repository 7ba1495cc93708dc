"""The target's own answers to the training questions: what the head learns to predict.

Invariant: every sample of the corpus ends up either with its answers and its length in tokens, or with the reason why
it cannot be used, in a folder keyed by data, target and settings. Samples are answered in chunks, which depend on data
and settings alone, so an interrupted pass goes on with any number of processes and ends with the same file, byte for
byte, as far as the target's arithmetic repeats itself. What is drafted, and by whom, changes no token of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmspec import checkpoint
from mmspec.loop import generate
from mmspec.recipe import Data, Recipe
from mmspec.records import Quarantine, RecordError
from mmspec.types import InputError, Output, Prompt, Request, Target
from train.answers import (
    BAD,
    DEGENERATE,
    FINAL,
    MANIFEST,
    OPEN,
    Dialogue,
    Part,
    Prepared,
    merge,
    read,
    tidy,
)
from train.asking import answer_limit, chunks, is_sampled, sampler_of, settings
from train.corpus import IMAGE_MARK, Corpus, Picture, Sample
from train.degenerate import fault
from train.drafting import PLAIN, Drafting, described, drafting
from train.encode import encode, fitted, length_limit
from train.placement import uneven
from train.stopping import Stopped, Stopper
from train.tracking import Tracker
from train.world import World

SCHEMA = 2
"""Of the folder; another one is another key."""
CHUNK_BATCHES = 4
"""Samples whose images are open at a time, in decoding batches."""
SAMPLE_FAULTS = ("RecordError:", "ValueError:")
"""How the error of an output begins that is the sample's own. What else goes wrong (memory, the device) says nothing of
it, and ends the run instead of the sample."""


def answer_counts(corpus: Corpus, prepared: Prepared, target: Target, world: World) -> Tensor:
    """How often each token occurs in the replies, [V] float64, weighted as the sources are; the same on every rank.

    Every rank must call. Pictures are left out: they change no token of a reply.
    """
    counts = torch.zeros(target.shape.vocab_size, dtype=torch.float64)
    for index in prepared.usable[world.rank :: world.size]:
        sample = replace(corpus.samples[index], pictures=())
        sample = replace(sample, turns=tuple(turn.replace(IMAGE_MARK, "") for turn in sample.turns))
        prompt, answer = encode(sample, prepared.dialogues[index], target, target.max_length)
        counts += corpus.weights[index] * prompt.input_ids[answer > 0].bincount(minlength=len(counts))
    return world.sum(counts)


def answers_key(recipe: Recipe, corpus: Corpus, target: Target) -> str:
    """Names exactly this data, target and these settings."""
    asked = settings(recipe.data, length_limit(recipe.data, target))
    told = [SCHEMA, corpus.digest, target.fingerprint, recipe.target.arithmetic, asked]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]


def answers_folder(recipe: Recipe, corpus: Corpus, target: Target) -> Path:
    """Where the answers are; stored features bring theirs along."""
    data = recipe.data
    parent = Path(data.answers_dir) if data.answers_dir else recipe.folder / "answers"
    return (Path(data.features) / "answers" if data.features else parent) / answers_key(recipe, corpus, target)


def prepare(
    recipe: Recipe,
    corpus: Corpus,
    target: Target,
    world: World,
    stopper: Stopper,
    tracker: Tracker,
    quarantine: Quarantine,
) -> Prepared:
    """Answers every sample, this rank its share of the chunks that are not known whole.

    Every rank must call. Unusable samples go to the quarantine.

    Raises:
        InputError: more records are unusable than `data.max_bad_share` allows, or more answers degenerate than
            `data.max_degenerate_share` does; or (a fault of ours) some are still open after all.
        Stopped: asked to stop; what is done is kept.
    """
    folder = answers_folder(recipe, corpus, target)
    folder.mkdir(parents=True, exist_ok=True)
    known = read(folder, len(corpus))
    # All ranks have read what is there before any rank appends to it.
    if world.largest(int(not known.complete)):
        world.lead(lambda: _begin(folder, recipe, corpus, target))
        _answer_open(recipe, corpus, target, world, stopper, tracker, known, quarantine.count, folder)
    world.lead(lambda: _finish(folder, corpus))
    done = read(folder, len(corpus))
    dropped = Quarantine(quarantine.path)
    for index, reason in done.bad.items():
        file, line = corpus.samples.place(index)
        listed = dropped if done.status[index] == DEGENERATE else quarantine
        listed.add(file, line, str(done.entry(index).get("id", "")), reason)
    quarantine.check(corpus.n_read, recipe.data.max_bad_share)
    dropped.check(
        corpus.n_read,
        recipe.data.max_degenerate_share,
        "records were dropped, for the target's answers are degenerate",
        "data.max_degenerate_share",
    )
    if not done.complete:
        n_open = int((done.status == OPEN).sum())
        raise InputError(f"{n_open} of {len(corpus)} samples have no answer in {folder}; the same command answers them")
    return done


def _answer_open(
    recipe: Recipe,
    corpus: Corpus,
    target: Target,
    world: World,
    stopper: Stopper,
    tracker: Tracker,
    known: Prepared,
    n_quarantined: int,
    folder: Path,
) -> None:
    """Answers the chunks in which a sample is open. Every rank must call.

    A chunk of which something is known is answered again as a whole: it is decoded as it would have been at first. What
    is known of it stays.

    A process ends early when what is known and what it found itself are more bad samples than are allowed. It does not
    hear of the others' before all are done: of R processes one sees 1/R of the samples, so a larger allowed share than
    that is only found to be exceeded at the end.
    """
    data = recipe.data
    whole = chunks(corpus, data, data.answer_batch * CHUNK_BATCHES)
    unfinished = [chunk for chunk in whole if bool((known.status[list(chunk)] == OPEN).any())]
    mine = unfinished[world.rank :: world.size]
    n_open = sum(int((known.status[list(chunk)] == OPEN).sum()) for chunk in mine)
    tracker.progress("answers", n_open, 0, "sample")
    # A request to stop raises inside the decoding loop; the other ranks hear of it below.
    with Part(folder, world.rank) as part, contextlib.suppress(Stopped), uneven(target):
        how = drafting(data, target) if data.answers == "regenerated" else PLAIN
        worker = Worker(data, corpus, target, stopper, tracker, how)
        worker.n_bad = n_quarantined + int((known.status == BAD).sum())
        worker.n_dropped = int((known.status == DEGENERATE).sum())
        worker.settled = frozenset(np.flatnonzero(known.status != OPEN).tolist())
        for chunk in mine:
            stopper.check()
            shares = worker.n_bad / corpus.n_read, worker.n_dropped / corpus.n_read
            if shares[0] > data.max_bad_share or shares[1] > data.max_degenerate_share:
                # No later sample can make up for these; the run is about to be stopped.
                break
            for index, id, result in worker.results(chunk):
                part.write(index, id, result)
    target.free()
    tracker.end_progress()
    stopper.check_together()
    world.barrier()


def _begin(folder: Path, recipe: Recipe, corpus: Corpus, target: Target) -> None:
    """Notes in the manifest what the answers are made from, and who works on them now beside who did."""
    data = recipe.data
    before = _manifest(folder)
    work: dict[str, Any] = {"commit": checkpoint.git_commit()}
    if data.answers == "regenerated":
        work = {"drafted_by": described(data), **work}
    sources = [{**asdict(source), "path": checkpoint.discreet(source.path)} for source in data.sources]
    manifest = {
        "schema": SCHEMA,
        "complete": False,
        "target": {
            "name": checkpoint.discreet(target.name),
            "fingerprint": target.fingerprint,
            "arithmetic": recipe.target.arithmetic,
        },
        "data": {"digest": corpus.digest, "read": corpus.n_read, "samples": len(corpus), "sources": sources},
        "settings": settings(data, length_limit(data, target)),
        "work": [*(done for done in before.get("work", []) if done != work), work],
    }
    checkpoint.write_json(folder / MANIFEST, manifest)


def _finish(folder: Path, corpus: Corpus) -> None:
    """Makes the final file once every sample is known, and counts in the manifest what is in it."""
    if not (folder / FINAL).is_file():
        parts = read(folder, len(corpus))
        if not parts.complete:
            return
        # First: whoever finds the final file finds a manifest that is complete.
        counts = {"kept": len(parts.usable), "tokens": int(parts.lengths.sum()), "dropped": parts.reasons()}
        complete = {"complete": True, "counts": counts, "answers": parts.digest}
        checkpoint.write_json(folder / MANIFEST, _manifest(folder) | complete)
        merge(folder, parts)
    tidy(folder)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


class Worker:
    """Answers samples, chunk by chunk.

    Args:
        data: settings.
        corpus, target: questions, and who answers them.
        stopper: is asked for after every answer.
        tracker: is told of each.
        how: who drafts.
        on_output: is given every answer as the loop returned it, `Output.id` being the sample's place.

    Attributes:
        settled: samples of which something is known: answered with their chunk, but neither counted nor given.
        n_bad, n_dropped: samples that cannot be used, and whose answers are degenerate.
    """

    def __init__(
        self,
        data: Data,
        corpus: Corpus,
        target: Target,
        stopper: Stopper,
        tracker: Tracker,
        how: Drafting,
        on_output: Callable[[Output], None] | None = None,
    ) -> None:
        self.data, self.corpus, self.target, self.how = data, corpus, target, how
        self.stopper, self.tracker, self.on_output = stopper, tracker, on_output
        self.limit = length_limit(data, target)
        self.n_answers = self.n_bad = self.n_dropped = 0
        self.samples: dict[int, Sample] = {}
        self.settled: frozenset[int] = frozenset()

    def results(self, chunk: Sequence[int]) -> Iterator[tuple[int, str, Dialogue | str]]:
        """Place and id of each sample of a chunk, with its answers or the reason why there are none.

        Raises:
            Stopped: asked to stop.
            RuntimeError: the target failed in a way that is not the sample's fault.
        """
        self.samples = {index: _held(self.corpus.samples[index]) for index in chunk}
        answered = self._answer(chunk) if self.data.answers == "regenerated" else map(self._given, chunk)
        for index, result, degenerate in answered:
            if index in self.settled:
                continue
            self.n_dropped += degenerate
            self.n_bad += isinstance(result, str) and not degenerate
            self.tracker.advance(1, answers=self.n_answers, quarantined=self.n_bad, dropped=self.n_dropped)
            yield index, self.samples[index].id, result

    def _given(self, index: int) -> tuple[int, Dialogue | str, bool]:
        said = self.samples[index].answers
        return index, self._measured(index, said, (True,) * len(said)) if said else "no given answer", False

    def _measured(self, index: int, answers: Sequence[str], finished: Sequence[bool]) -> Dialogue | str:
        """The dialogue with its length, or the reason why it is no training example."""
        dialogue = Dialogue(tuple(answers), tuple(finished), 0)
        try:
            return fitted(self.samples[index], dialogue, self.target, self.limit)
        except (RecordError, ValueError) as error:
            return _line(error)

    def _answer(self, chunk: Sequence[int]) -> Iterator[tuple[int, Dialogue | str, bool]]:
        """Turn by turn: all first questions together, then all second ones with the target's own answers as history."""
        answers: dict[int, list[str]] = {index: [] for index in chunk}
        finished: dict[int, list[bool]] = {index: [] for index in chunk}
        live = list(chunk)
        for turn in range(max(len(self.samples[index].turns) for index in chunk)):
            requests: list[Request] = []
            # Whose prompt grew too long has an answer less: it is asked no more.
            for index in [i for i in live if len(answers[i]) == turn < len(self.samples[i].turns)]:
                prompt = self._prompt(index, answers[index])
                if isinstance(prompt, Prompt):
                    room = min(answer_limit(self.data, index), self.limit - len(prompt))
                    requests.append(Request(str(index), prompt, room, index))
                elif turn == 0:
                    yield index, prompt, False
                    live.remove(index)
            for output in self._generate(requests):
                index, text = int(output.id), self._text(output)
                if output.finish_reason == "error" and not str(output.error).startswith(SAMPLE_FAULTS):
                    raise RuntimeError(f"answering {self.samples[index].id} failed: {output.error}")
                degenerate = fault(output, text, self.target, self.data.drop) if output.tokens else None
                if output.finish_reason == "error" or degenerate:
                    yield index, degenerate or str(output.error), degenerate is not None
                    live.remove(index)
                    continue
                finished[index].append(output.finish_reason == "stop")
                answers[index].append(text)
        for index in live:
            yield index, self._measured(index, answers[index], finished[index]), False

    def _prompt(self, index: int, answers: Sequence[str]) -> Prompt | str:
        sample = self.samples[index]
        try:
            n = len(answers) + 1
            prompt = self.target.encode(sample.messages(answers, n), sample.images()[: len(sample.shown(n))])
        except (RecordError, ValueError) as error:
            return _line(error)
        if len(prompt) >= self.limit:
            return f"prompt of {len(prompt)} tokens is longer than the context ({self.limit} tokens)"
        return prompt

    def _generate(self, requests: Sequence[Request]) -> Iterable[Output]:
        """Greedy ones first, then sampled ones; chunks are mostly of one kind."""
        for sampled in (False, True):
            if batch := [request for request in requests if is_sampled(self.data, request.key) == sampled]:
                yield from generate(
                    self.target,
                    batch,
                    self.how.drafter,
                    self.how.policy,
                    sampler_of(self.data, sampled),
                    max_batch=self.data.answer_batch,
                    on_output=self._heard,
                )

    def _heard(self, output: Output) -> None:
        self.n_answers += 1
        if self.on_output:
            self.on_output(output)
        self.tracker.advance(0, answers=self.n_answers, quarantined=self.n_bad, dropped=self.n_dropped)
        self.stopper.check()

    def _text(self, output: Output) -> str:
        tokens = output.tokens[:-1] if output.finish_reason == "stop" else output.tokens
        return self.target.decode(tokens).strip()


class _Held(Picture):
    """A picture that is decoded once, however often it is opened."""

    def open(self) -> Image.Image:
        return self._opened

    @cached_property
    def _opened(self) -> Image.Image:
        return super().open()


def _held(sample: Sample) -> Sample:
    return replace(sample, pictures=tuple(_Held(p.name, p.path, p.data) for p in sample.pictures))


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
