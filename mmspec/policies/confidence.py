"""Stop a draft where it is no longer sure of itself: after a level whose best path has less than a given probability.

P4 of `eval.policies`: the dynamic depth of many drafters. Costs are not asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from mmspec.policies._parts import Parts
from mmspec.policy import FixedPolicy
from mmspec.types import InputError, Plan


@dataclass(frozen=True)
class Config:
    """Settings.

    Args:
        threshold: probability of the best path, by the draft's own account, below which no level follows.
    """

    threshold: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise InputError(f"confidence: threshold must be above 0 and at most 1, got {self.threshold}")


class ConfidencePolicy(FixedPolicy):
    """See the module. A batch goes on for the surest of the rows that are drafted for."""

    def __init__(self, config: Config, parts: Parts) -> None:
        super().__init__(parts.depth, parts.budget)
        self.floor = math.log(config.threshold)

    def plan(self, sensed: Sequence[Sequence[float]], remaining: Sequence[int]) -> Plan:
        plan = super().plan(sensed, remaining)
        self.drafted = [row for row, nodes in enumerate(plan.budget) if nodes]
        return replace(plan, extend=self.extend)

    def extend(self, level: int, scores: Tensor) -> bool:
        """Whether any candidate is sure enough; what an idle row of the batch would draft means nothing."""
        said = scores.tolist()
        return any(max(said[row]) >= self.floor for row in self.drafted)


def make(config: Config, parts: Parts) -> ConfidencePolicy:
    """The policy of a drafter."""
    return ConfidencePolicy(config, parts)
