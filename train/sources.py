"""Where a head's training data come from: the target itself, or a folder with its states. Both give the same Features.

Invariant: what a thread can do ahead is done ahead. `FeatureSource.batch` (reading; decoding images and tokenizing,
which it shares out to `data.workers` threads more) and `FeatureBatch.load` (states from disk, on their way to the
device) run in the loader's one thread; only `FeatureBatch.features`, which needs the device's own work, runs in the
training loop.

A sample whose picture can no longer be read is left out of its batch and reported; the step's other samples stay where
they are. A batch that loses all of its samples gets a stand-in that weighs nothing, so that no rank skips a pass alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmspec.losses import valid_pairs
from mmspec.records import RecordError
from mmspec.types import Features, InputError, Prompt, Target
from train.answers import Dialogue
from train.clock import StepClock
from train.corpus import Sample
from train.curriculum import Curriculum
from train.dependence import Measured
from train.encode import encode, length_limit
from train.features import FeatureStore, StoredRow, state_names, unpack
from train.fit import Lost, MicroBatch
from train.labels import Labels, open_labels
from train.order import Order, deal
from train.session import Session

LOST = "lost since it was answered"
"""How the reason begins of a sample that could be read when it was answered, and cannot be any more."""


class FeatureBatch(Protocol):
    """One micro-batch of a source.

    Args:
        count: its valid positions, see `valid_pairs`.
        lost: samples that could not be read and are not in it.
    """

    @property
    def count(self) -> int: ...

    @property
    def lost(self) -> Sequence[Lost]: ...

    def load(self) -> None:
        """Fetches what is large."""

    def features(self) -> Features:
        """The batch on the target's device; what was loaded is given up."""


class FeatureSource(Protocol):
    """Gives Features for records."""

    def batch(self, records: Sequence[int]) -> FeatureBatch:
        """A micro-batch of these samples of the corpus, rows in their order.

        Raises:
            InputError: the source as a whole is damaged.
        """


def open_source(session: Session, taps: Sequence[int]) -> FeatureSource:
    """The source that a session's recipe names. Every rank must call.

    Args:
        taps: hidden states of the target that the head reads, beside the last.

    Raises:
        InputError: the features or the labels that it names are of other data.
    """
    data, weighs = session.recipe.data, session.recipe.loss.dependence > 0
    labels = open_labels(session, Path(data.dependence)) if weighs and data.dependence else None
    if session.features is not None:
        if weighs and labels is None:
            raise InputError(
                f"loss.dependence={session.recipe.loss.dependence} with data.features needs data.dependence=DIR: "
                "no image is at hand to leave out (scripts/measure_dependence.py)"
            )
        return Stored(session, session.features, labels)
    return Live(session, taps, labels, Measured(session) if weighs and labels is None else None)


# ---- online ----


class Live:
    """The frozen target computes its states when they are needed.

    Args:
        labels: of the loss weights, where they are stored.
        measured: of the loss weights, where they are measured in every step.
    """

    def __init__(
        self, session: Session, taps: Sequence[int], labels: Labels | None = None, measured: Measured | None = None
    ) -> None:
        self.session, self.taps = session, tuple(taps)
        self.labels, self.measured = labels, measured
        self._limit = length_limit(session.recipe.data, session.target)
        self._workers = ThreadPoolExecutor(session.recipe.data.workers)

    def batch(self, records: Sequence[int]) -> LiveBatch:
        rows: list[tuple[Prompt, Tensor]] = []
        weights: list[Tensor] = []
        lost: list[Lost] = []
        samples, dialogues = self.session.corpus.samples, self.session.prepared.dialogues
        # Records are read here, by one thread; workers open the pictures, tokenise, and are heard in their order.
        given = [(record, samples[record], dialogues[record]) for record in records]
        for record, encoded in zip(records, self._workers.map(lambda row: self._encode(*row), given)):
            if isinstance(encoded, Lost):
                lost.append(encoded)
            else:
                rows.append(encoded)
                weights += [self.labels.of(record, encoded[1])] if self.labels else []
        pack = self.session.recipe.data.pack
        return LiveBatch(self.session.target, self.taps, rows, pack, lost, weights, self.measured)

    def _encode(self, record: int, sample: Sample, dialogue: Dialogue) -> tuple[Prompt, Tensor] | Lost:
        try:
            return encode(sample, dialogue, self.session.target, self._limit)
        except (RecordError, ValueError) as error:
            return Lost(record, f"{LOST}, {(str(error).splitlines() or ['unreadable'])[0]}")


class LiveBatch:
    """Encoded conversations.

    Args:
        target, taps: see `Live`.
        rows: prompt and answer marks of each.
        pack: tokens of a row that several share in the target's pass; 0: none do.
        lost: samples that are not in the rows.
        weights: [L] of each row, loss weights; empty: none.
        measured: makes them of the batch instead.
    """

    def __init__(
        self,
        target: Target,
        taps: Sequence[int],
        rows: Sequence[tuple[Prompt, Tensor]],
        pack: int = 0,
        lost: Sequence[Lost] = (),
        weights: Sequence[Tensor] = (),
        measured: Measured | None = None,
    ) -> None:
        self._target, self._taps, self._pack = target, taps, pack
        self.lost = lost
        self.count = sum(valid_pairs(answer) for _, answer in rows)
        self.rows = rows or [_stand_in(target)]
        self._weights, self._measured = weights, measured

    def load(self) -> None:
        """Nothing: the target's states are computed on its device, where training keeps it busy."""

    def features(self) -> Features:
        prompts, answers = [prompt for prompt, _ in self.rows], [answer for _, answer in self.rows]
        made = self._target.teacher(prompts, answers, self._taps, pack=self._pack, weights=self._weights)
        return made if self._measured is None else self._measured.weigh(made, prompts, answers, self._pack)


def _stand_in(target: Target) -> tuple[Prompt, Tensor]:
    """A conversation for a batch that has none: every weight takes part, and nothing of it counts."""
    ids = torch.full((4,), min(target.stop_ids), dtype=torch.long)
    return Prompt(ids, torch.zeros(4, dtype=torch.bool)), torch.tensor([0, 1, 1, 1])


# ---- stored ----


class Stored:
    """States from a FeatureStore; of the target only the embedding (here) and unembedding (in the loss) are used.

    Args:
        labels: of the loss weights; None: all weigh alike.

    Raises:
        InputError: the store's conversations are not the session's.
    """

    def __init__(self, session: Session, store: FeatureStore, labels: Labels | None = None) -> None:
        self.target, self.store, self.labels = session.target, store, labels
        dialogues = session.prepared.dialogues
        found, wanted = store.manifest.answers, session.prepared.digest
        if found != wanted or any(record not in store for record in dialogues):
            raise InputError(f"features {store.folder} were made of the answers {found}, but the recipe's are {wanted}")
        # Copies run beside the training step, not behind it.
        self._stream = torch.cuda.Stream(self.target.device) if self.target.device.type == "cuda" else None

    def batch(self, records: Sequence[int]) -> StoredBatch:
        weights = [self.labels.of(record, self.store.answer(record)) for record in records] if self.labels else []
        return StoredBatch(self.target, self.store, records, self._stream, weights)


class StoredBatch:
    """Rows of a store; padding is zero."""

    def __init__(
        self,
        target: Target,
        store: FeatureStore,
        records: Sequence[int],
        stream: Any,
        weights: Sequence[Tensor] = (),
    ) -> None:
        self._target, self._store, self._records, self._stream = target, store, records, stream
        self._weights = weights
        self.count = sum(valid_pairs(store.answer(record)) for record in records)
        self.lost: Sequence[Lost] = ()
        self._tensors: dict[str, Tensor] = {}

    def load(self) -> None:
        """Reads and pads, and starts the copies to the device."""
        tensors = _collate([self._store.read(record) for record in self._records])
        if self._weights:
            tensors["weight"] = pad_sequence(list(self._weights), batch_first=True)
        if self._stream is None:
            self._tensors = tensors
            return
        with torch.cuda.stream(self._stream):
            pinned = {name: tensor.pin_memory() for name, tensor in tensors.items()}
            self._tensors = {name: t.to(self._target.device, non_blocking=True) for name, t in pinned.items()}

    @torch.no_grad()
    def features(self) -> Features:
        if not self._tensors:
            self.load()
        tensors, self._tensors = self._tensors, {}
        if self._stream is not None:
            now = torch.cuda.current_stream(self._target.device)
            now.wait_stream(self._stream)
            for tensor in tensors.values():
                tensor.record_stream(now)
        ids, answer, valid, visual = (tensors[name] for name in ("ids", "answer", "valid", "visual"))
        images = self._states(tensors, "images") if "images" in tensors else None
        embeds = self._target.place(ids, visual, images)
        last, *tapped = (self._states(tensors, name) for name in state_names(self._store.taps))
        hidden = dict(zip(self._store.taps, tapped))
        return Features(ids, valid, answer, visual, last, embeds, hidden, weight=tensors.get("weight"))

    def _states(self, tensors: Mapping[str, Tensor], name: str) -> Tensor:
        return unpack(tensors[name], tensors.get(f"{name}.scale"), self._target.dtype)


def _collate(rows: Sequence[StoredRow]) -> dict[str, Tensor]:
    """Rows of a batch, right-padded with zeros: [B, T] and [B, T, D], image features one after the other [n, D]."""
    tensors = {
        "ids": pad_sequence([row.ids for row in rows], batch_first=True),
        "answer": pad_sequence([row.answer for row in rows], batch_first=True),
        "visual": pad_sequence([row.visual for row in rows], batch_first=True),
        "valid": pad_sequence([torch.ones_like(row.visual) for row in rows], batch_first=True),
    }
    for name in rows[0].states:
        _fill(tensors, name, [row.states[name] for row in rows], partial(pad_sequence, batch_first=True))
    if images := [row.image for row in rows if row.image is not None]:
        _fill(tensors, "images", images, torch.cat)
    return tensors


def _fill(
    tensors: dict[str, Tensor],
    name: str,
    packed: Sequence[tuple[Tensor, Tensor | None]],
    join: Callable[[list[Tensor]], Tensor],
) -> None:
    stored = [states for states, _ in packed]
    kind = stored[0].dtype
    # Bytes are padded as bytes: not every operation knows the 8-bit float.
    bits = torch.uint8 if kind == torch.float8_e4m3fn else kind
    tensors[name] = join([states.view(bits) for states in stored]).view(kind)
    if packed[0][1] is not None:
        tensors[f"{name}.scale"] = join([scale for _, scale in packed if scale is not None])


# ---- the order of training ----


class Loader:
    """This rank's micro-batches of every step, prepared in a thread: records a step ahead, states a micro-batch ahead.

    Args:
        session: with its answers.
        source: of their features.
        clock: told when training waits for data and when the target works.
    """

    def __init__(self, session: Session, source: FeatureSource, clock: StepClock) -> None:
        self.session, self.source, self.clock = session, source, clock
        self.usable = array("q", session.prepared.usable)
        if not self.usable:
            raise InputError("no record is left to train on after quarantine")
        corpus = session.corpus
        self.order = self._order()
        self.lengths = array("q", session.prepared.lengths[self.usable].tolist())
        self._pool = ThreadPoolExecutor(1)
        self._steps: dict[int, Future[list[tuple[FeatureBatch, tuple[str, ...]]]]] = {}
        self._lost = {record for place in session.lost for record in corpus.samples.find(*place)}
        self._loads: dict[tuple[int, int], Future[None]] = {}

    def _order(self) -> Order | Curriculum:
        corpus, run, text_first = self.session.corpus, self.session.recipe.run, self.session.recipe.data.text_first
        weights = corpus.weights[self.usable]
        if text_first is None:
            return Order(weights, run.seed)
        return Curriculum(weights, corpus.samples.pictured[self.usable], run.seed, run.max_steps, text_first)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def micro_batches(self, step: int) -> Sequence[MicroBatch]:
        """This rank's micro-batches of a step; features are made when one is asked for."""
        self.clock.enter("data")
        batches = self._ahead(step).result()
        self._steps = {number: future for number, future in self._steps.items() if number == step}
        if step + 1 < self.session.recipe.run.max_steps:
            self._ahead(step + 1)
        return [
            MicroBatch(partial(self._make, step, number, batch), batch.count, names, tuple(batch.lost))
            for number, (batch, names) in enumerate(batches)
        ]

    def quarantine(self, lost: Sequence[Lost]) -> None:
        """Notes samples that any rank lost, each once. Every rank must call, with the same ones.

        Raises:
            InputError: on every rank, when there are more than `data.max_bad_share` allows.
        """
        session = self.session
        for record, reason in sorted(set(lost)):
            if record not in self._lost:
                self._lost.add(record)
                sample = session.corpus.samples[record]
                session.quarantine.add(sample.file, sample.line, sample.id, reason)
                session.tracker.say(f"record {sample.id} ({sample.file}:{sample.line}) is left out: {reason}")
        session.quarantine.check(session.corpus.n_read, session.recipe.data.max_bad_share)

    def settle(self) -> None:
        """Waits for the thread."""
        self._pool.submit(int).result()

    def _ahead(self, step: int) -> Future[list[tuple[FeatureBatch, tuple[str, ...]]]]:
        if step not in self._steps:
            self._steps[step] = self._pool.submit(self._batches, step)
        return self._steps[step]

    def _batches(self, step: int) -> list[tuple[FeatureBatch, tuple[str, ...]]]:
        """Micro-batches and the names of their samples."""
        world, optim = self.session.world, self.session.recipe.optim
        batch = self.order.batch(step, world.size * optim.micro_batch * optim.accumulate)
        mine = deal(batch, self.lengths, world.rank, world.size, optim.accumulate)
        chosen = [[self.usable[position] for position in micro] for micro in mine]
        return [(self.source.batch(records), tuple(map(self._name, records))) for records in chosen]

    def _name(self, record: int) -> str:
        # The sample is not decoded for this: it may hold megabytes of pictures.
        file, line = self.session.corpus.samples.place(record)
        return f"{self.session.prepared.entry(record)['id']} ({Path(file).name}:{line})"

    def _make(self, step: int, number: int, batch: FeatureBatch) -> dict[str, Any]:
        self.clock.enter("data")
        self._load(step, number).result()
        del self._loads[step, number]
        if number + 1 < self.session.recipe.optim.accumulate:
            self._load(step, number + 1)
        elif step + 1 in self._steps:
            self._load(step + 1, 0)
        self.clock.enter("target")
        features = batch.features()
        return {item.name: getattr(features, item.name) for item in fields(features)}

    def _load(self, step: int, number: int) -> Future[None]:
        """Lets the thread load a micro-batch; its records come first, in the same thread."""
        if (step, number) not in self._loads:
            batches = self._ahead(step)
            self._loads[step, number] = self._pool.submit(lambda: batches.result()[number][0].load())
        return self._loads[step, number]
