"""What every draft head shares. A head is one file here; `kind: foo` in a recipe means `mmspec.heads.foo`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import nn

from mmspec.types import Drafter, Features, Objective, Sampler, Target, Unembed


class DraftHead(nn.Module, ABC):
    """A trained drafter: its forward contains the objective, so one module is what the training engine wraps."""

    config: Any
    taps: tuple[int, ...] = ()
    """Indices into the target's hidden_states that the head reads, in training and when drafting."""

    @abstractmethod
    def forward(self, features: Features, unembed: Unembed) -> Objective:
        """Loss sums over the answer positions of a teacher-forced batch."""

    @abstractmethod
    def drafter(
        self, target: Target, width: int, sampler: Sampler | None = None, widths: Sequence[int] = ()
    ) -> Drafter:
        """The same weights, drafting for a target.

        Args:
            target: frozen.
            width: beams a level, and children a beam.
            sampler: the run's, to draft with the noise that will decide (it changes no token).
            widths: draw candidates instead of choosing them, this many at a node of each level, 1 beyond.
        """
