"""The order in which a run visits its samples, and how a batch is dealt out to processes.

Invariant: the global batch of a step is a function of weights, seed, step and batch size: whoever asks, in whatever
order, on any number of processes, gets the same. What is held is one epoch or two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mmspec.types import InputError


class Order:
    """The stream of sample indices, epoch after epoch.

    In each epoch a sample of weight w is drawn floor(w) times, and once more with the probability of the remainder.

    Args:
        weights: of the samples.
        seed: of the run.
    """

    def __init__(self, weights: Sequence[float] | NDArray[np.float64], seed: int) -> None:
        weights = np.asarray(weights, dtype=np.float64)
        if not (weights > 0).any():
            raise InputError("no sample is left to train on")
        self._whole = np.floor(weights).astype(np.int32)
        self._rest = weights - self._whole
        self._seed = seed
        self._last = -1, np.empty(0, dtype=np.int32)
        self._enter(0, 0)

    def batch(self, step: int, size: int) -> list[int]:
        """Indices of the global batch of a step, counted from 0."""
        begin, end = step * size, (step + 1) * size
        if begin < self._start:
            self._enter(0, 0)
        while begin >= self._start + self._length:
            self._enter(self._epoch + 1, self._start + self._length)
        picked: list[int] = []
        epoch, start = self._epoch, self._start
        while start < end:
            stream = self._stream(epoch)
            picked += stream[max(begin - start, 0) : end - start].tolist()
            epoch, start = epoch + 1, start + len(stream)
        return picked

    def _enter(self, epoch: int, start: int) -> None:
        """Goes to an epoch, which begins at a position of the stream."""
        self._epoch, self._start, self._length = epoch, start, int(self._times(epoch)[1].sum())

    def _times(self, epoch: int) -> tuple[np.random.RandomState, NDArray[np.int32]]:
        """How often each sample is drawn in an epoch, and the generator that shuffles it."""
        # RandomState: its streams are promised never to change, so a run can be resumed on another NumPy.
        words = np.frombuffer(hashlib.sha256(f"{self._seed}/{epoch}".encode()).digest(), dtype="<u4")
        rng = np.random.RandomState(words)
        if not self._rest.any():
            return rng, self._whole
        return rng, self._whole + (rng.random_sample(len(self._rest)) < self._rest)

    def _stream(self, epoch: int) -> NDArray[np.int32]:
        """An epoch in its order."""
        if self._last[0] != epoch:
            rng, times = self._times(epoch)
            drawn = np.repeat(np.arange(len(times), dtype=np.int32), times)
            rng.shuffle(drawn)
            self._last = epoch, drawn
        return self._last[1]


def deal(batch: Sequence[int], lengths: Sequence[int], rank: int, size: int, accumulate: int) -> list[list[int]]:
    """This rank's micro-batches of a global batch, neighbours in length together so that little is padding.

    Args:
        batch: indices of the global batch.
        lengths: token counts by index.
        rank, size: this process among all.
        accumulate: micro-batches per rank; len(batch) is a multiple of size * accumulate.

    Returns:
        `accumulate` lists of equal length. Over all ranks they hold the batch exactly once.
    """
    ordered = sorted(batch, key=lambda index: (lengths[index], index))
    each = len(ordered) // (size * accumulate)
    micro = [ordered[start : start + each * size] for start in range(0, len(ordered), each * size)]
    return [group[rank::size] for group in micro]
