"""The same draft every round: that of the checkpoint or method, or a smaller one.

P0 of `eval.policies`, and P1 where it was tuned.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmspec.policies._parts import Parts
from mmspec.policy import FixedPolicy
from mmspec.types import InputError


@dataclass(frozen=True)
class Config:
    """Settings.

    Args:
        depth, budget: levels and nodes; 0 is all that is offered.
    """

    depth: int = 0
    budget: int = 0

    def __post_init__(self) -> None:
        if self.depth < 0 or self.budget < 0:
            raise InputError(f"fixed: depth and budget must not be negative, got {self}")


def make(config: Config, parts: Parts) -> FixedPolicy:
    """The policy of a drafter."""
    return FixedPolicy(min(config.depth or parts.depth, parts.depth), min(config.budget or parts.budget, parts.budget))
