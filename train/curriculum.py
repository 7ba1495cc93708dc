"""Text first, pictures later: how likely a step is to draw samples that have a picture (MSD's two stages).

Invariant: like `Order`, a step's batch is a function of weights, seed, step and batch size alone. Which kind of sample
a slot of the batch holds is drawn for the step; which one of its kind it is comes from an `Order` of that kind.

Source: MSD (arXiv 2505.14260): text alone for half of the epochs, then a probability that rises linearly to 1 in the
last one. Here it rises step by step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mmspec.types import InputError
from train.order import Order


def picture_share(step: int, steps: int, text_first: float) -> float:
    """Probability that a sample of a step has a picture: 0 at first, 1 at the last of all steps.

    Args:
        step: from 0.
        steps: of the run.
        text_first: share of the run that is text alone, at least 0 and less than 1.
    """
    done = step / max(steps - 1, 1)
    return max(done - text_first, 0.0) / (1 - text_first)


class Curriculum:
    """An order of samples of two kinds. Ask for batches of one size.

    Args:
        weights: of all samples.
        pictured: [n] bool, which of them have a picture.
        seed: of the run.
        steps: of the run.
        text_first: see `picture_share`.

    Raises:
        InputError: there is but one kind.
    """

    def __init__(
        self,
        weights: Sequence[float] | NDArray[np.float64],
        pictured: Sequence[bool] | NDArray[np.bool_],
        seed: int,
        steps: int,
        text_first: float,
    ) -> None:
        weights, shown = np.asarray(weights, dtype=np.float64), np.asarray(pictured, dtype=bool)
        for kind, some in (("without", ~shown), ("with", shown)):
            if not (weights * some > 0).any():
                raise InputError(f"data.text_first={text_first:g}: no sample is {kind} a picture; leave it out")
        self._orders = Order(weights * ~shown, seed), Order(weights * shown, seed)
        self._seed, self._steps, self._text_first = seed, steps, text_first
        self._drawn = [0]
        """Samples with a picture in all steps before each."""

    def batch(self, step: int, size: int) -> list[int]:
        """Indices of the global batch of a step, counted from 0."""
        while len(self._drawn) <= step:
            self._drawn.append(self._drawn[-1] + int(self._kinds(len(self._drawn) - 1, size).sum()))
        shown = self._drawn[step]
        positions = [step * size - shown, shown]
        picked: list[int] = []
        for kind in self._kinds(step, size).astype(int).tolist():
            picked += self._orders[kind].batch(positions[kind], 1)
            positions[kind] += 1
        return picked

    def _kinds(self, step: int, size: int) -> NDArray[np.bool_]:
        """[size], which slots of a step's batch have a picture."""
        share = picture_share(step, self._steps, self._text_first)
        words = np.frombuffer(hashlib.sha256(f"{self._seed}/pictures/{step}".encode()).digest(), dtype="<u4")
        kinds: NDArray[np.bool_] = np.random.RandomState(words).random_sample(size) < share
        return kinds
