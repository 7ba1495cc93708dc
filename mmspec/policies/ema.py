"""Draft while drafts have been accepted of late: a row whose accepted share fell below a threshold is skipped.

Failures come in runs, so this free signal is strong. A skipped row is drafted for again after some rounds, or nothing
would ever be learned of it.

P3 of `eval.policies`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mmspec.policies._parts import Parts
from mmspec.policy import FixedPolicy
from mmspec.types import InputError, Plan, StepTrace


@dataclass(frozen=True)
class Config:
    """Settings.

    Args:
        threshold: share of the planned levels, mean of late, below which a row is skipped.
        decay: of the mean, per drafted round.
        patience: skipped rounds after which a draft is made all the same.
    """

    threshold: float = 0.1
    decay: float = 0.5
    patience: int = 4

    def __post_init__(self) -> None:
        if not (0 <= self.threshold <= 1 and 0 <= self.decay < 1 and self.patience >= 1):
            raise InputError(f"ema: threshold in 0..1, decay in 0..1 and patience from 1 on, got {self}")


class EmaPolicy(FixedPolicy):
    """See the module. A fresh row starts with trust."""

    def __init__(self, config: Config, parts: Parts) -> None:
        super().__init__(parts.depth, parts.budget)
        self.config = config

    def open(self, max_batch: int, device: torch.device, sampled: bool = False) -> None:
        self.share, self.skipped, self.left = [1.0] * max_batch, [0] * max_batch, [0] * max_batch

    def plan(self, sensed: Sequence[Sequence[float]], remaining: Sequence[int]) -> Plan:
        full = super().plan(sensed, remaining)
        for row, left in enumerate(remaining):
            if left != self.left[row]:  # another request
                self.share[row], self.skipped[row] = 1.0, 0
        self.left = list(remaining)
        trusted = [s >= self.config.threshold for s in self.share]
        again = [n >= self.config.patience for n in self.skipped]
        budget = tuple(n if t or a else 0 for n, t, a in zip(full.budget, trusted, again))
        return Plan(full.depth if any(budget) else 0, budget)

    def observe(self, trace: StepTrace) -> None:
        self.left = [left - emitted for left, emitted in zip(self.left, trace.emitted)]
        for row, active in enumerate(trace.active):
            if active and trace.plan.budget[row]:
                share = trace.accepted[row] / trace.plan.depth
                self.share[row] = self.config.decay * self.share[row] + (1 - self.config.decay) * share
                self.skipped[row] = 0
            elif active:
                self.skipped[row] += 1


def make(config: Config, parts: Parts) -> EmaPolicy:
    """The policy of a drafter."""
    return EmaPolicy(config, parts)
