"""Marginal benefit against marginal cost, without training: stop a draft, prune it, or make none, at the price of time.

Levels go on while the draft's own scores say that one more is worth a pass; nodes are verified while they are worth
their place; and a draft is made at all while drafts of late have paid, looked at again now and then.

Source: SMART (arXiv 2604.09731), from whose rule this differs in the price: tokens per second achieved, not a ratio of
one round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mmspec.policies._parts import Parts, Price, Probing
from mmspec.policies._refine import Refinement, Sureness
from mmspec.policy import FixedPolicy
from mmspec.types import Plan, StepTrace


@dataclass(frozen=True)
class Config:
    """Settings.

    Args:
        probe_share: of the time that drafts which do not seem to pay may lose.
    """

    probe_share: float = 0.005


@dataclass
class _Pace:
    """What was learned at one batch size: the price of time, and of drafts how many there were and what they lost.

    Args:
        weight, lost_s: fading sums of drafts and of the seconds that they lost.
    """

    price: Price
    refine: Refinement
    probing: Probing
    drafts: int = 0
    weight: float = 0.0
    lost_s: float = 0.0


class MarginalPolicy(FixedPolicy):
    """See the module.

    Args:
        parts: with measured costs.
    """

    _FADE = 0.95
    _TRUSTED = 6
    """Drafts that are made before anything is concluded from them."""

    def __init__(self, config: Config, parts: Parts) -> None:
        super().__init__(parts.depth, parts.budget)
        self.costs, self.probe_share = parts.measured("marginal"), config.probe_share
        self._sure: dict[bool, Sureness] = {}
        """By way of sampling, and `_Pace` by batch size as well: a last small batch does not make the others forget."""
        self._paces: dict[tuple[int, bool], _Pace] = {}

    def open(self, max_batch: int, device: torch.device, sampled: bool = False) -> None:
        self.plain_s, self.drafting = self.costs.verify(max_batch, 1), False
        if (max_batch, sampled) not in self._paces:
            price, sure = Price(1 / self.plain_s, max_batch), self._sure.setdefault(sampled, Sureness())
            refine = Refinement(self.costs, max_batch, self.max_depth, self.max_budget, price, sure)
            probing = Probing(self.probe_share, self.costs.draft(max_batch, 1))
            self._paces[max_batch, sampled] = _Pace(price, refine, probing)
        self.pace = self._paces[max_batch, sampled]
        self.price, self.refine, self.probing = self.pace.price, self.pace.refine, self.pace.probing

    def plan(self, sensed: Sequence[Sequence[float]], remaining: Sequence[int]) -> Plan:
        self.price.among(sum(left > 0 for left in remaining))
        full = super().plan(sensed, remaining)
        self.drafting = full.depth > 0 and self._pays()
        if not self.drafting:
            return Plan(0, (0,) * len(remaining))
        self.refine.begin(full.depth, [n > 0 for n in full.budget])
        return Plan(full.depth, full.budget, self.refine.extend, self.refine.prune)

    def _pays(self) -> bool:
        if self.pace.drafts < self._TRUSTED:
            return True
        return self._lost() <= 0 or self.probing.due(self._lost())

    def _lost(self) -> float:
        """Seconds that a draft loses on average: what it costs beyond a plain round, less what its tokens are worth."""
        return self.pace.lost_s / self.pace.weight

    def observe(self, trace: StepTrace) -> None:
        gain = sum(a for a, active in zip(trace.accepted, trace.active) if active)
        seconds = self.refine.seconds(trace.n_nodes, self.drafting)
        self.price.add(gain + sum(trace.active), seconds)
        lost = None
        if self.drafting:
            loss = seconds - self.plain_s - gain / self.price.per_s
            if self.pace.weight and self._lost() > 0:
                lost = loss
            self.refine.settle(trace)
            self.pace.drafts += 1
            self.pace.weight = self._FADE * self.pace.weight + 1
            self.pace.lost_s = self._FADE * self.pace.lost_s + loss
        self.probing.add(seconds, lost)


def make(config: Config, parts: Parts) -> MarginalPolicy:
    """The policy of a drafter."""
    return MarginalPolicy(config, parts)
