"""What every draft head shares. A head is one file here; `kind: foo` in a recipe means `mmspec.heads.foo`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from mmspec.types import Drafter, Features, Objective, Target, Unembed


class DraftHead(nn.Module, ABC):
    """A trained drafter: its forward contains the objective, so one module is what the training engine wraps."""

    config: Any

    @abstractmethod
    def forward(self, features: Features, unembed: Unembed) -> Objective:
        """Loss sums over the answer positions of a teacher-forced batch."""

    @abstractmethod
    def drafter(self, target: Target, width: int) -> Drafter:
        """The same weights, drafting for a target with beams of `width`."""
