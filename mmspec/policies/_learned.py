"""The policy of a trained controller: the depth with the best expected gain at the going price of time.

The controller is asked where that pays: where on held-out rounds, at this machine's costs, it was ahead of the best
single depth by more than it may cost. Elsewhere every round gets that single depth, which follows what comes of drafts,
and nothing is computed. Text may be of another kind than those rounds: so what the controller says is mixed with what
drafts of late say, each weighed by how well it foresaw the rounds just past. A step's share of the controller is meant
to stay below 2%: the device makes a handful of operations, whose results ride on the step's one transfer; history,
network and choice are the host's (`heads/viskip.py`, `Deployed`). While nothing pays it sleeps, and costs nothing.

Why so: DESIGN 6, 105 and 115 to 121.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

from mmspec.policies._parts import Parts, Price, Probing
from mmspec.policies._refine import Refinement, Sureness
from mmspec.policies._usual import NEVER, UsualDepth, advantage, expected_seconds
from mmspec.policy import Records
from mmspec.types import Evidence, Plan, StepTrace

_SCALARS = 9
"""What `Records.scalars` is told of a row."""
_OWN_S = 4e-4
"""Seconds of a round that sensing and planning take (0.27 to 0.43 ms, DESIGN 121): a smaller gain is none."""
_UNSAID = 0.25
"""Of what foresight gains, the part that remains where the draft's own scores have a say as well (DESIGN 118)."""
_TRUST = 4.0
"""Log-odds of the controller against what drafts of late say, at most and at least: either is heard again soon."""
_NEWS, _FEWER = 0.05, 0.8
"""Of the share of rows that there are drafts for: a change that is reckoned with; and of what it was, at which the
controller is judged again, which takes some milliseconds."""
_PROBE_SHARE = 0.005
"""Of the time, which drafts may lose that are made to see whether drafting pays by now."""


@dataclass
class _Met:
    """What was learned of drafts while decoding.

    Args:
        usual: how far they have come of late.
        bias: [Dmax] correction of the controller's logits.
        sure: how sure the drafter's scores are.
        trust: log-odds of what the controller says against what `usual` says.
    """

    usual: UsualDepth
    bias: list[float]
    sure: Sureness
    trust: float = _TRUST / 2


@dataclass
class _Pace:
    """What was learned at one batch size: the price of time, and how many nodes are usual.

    Args:
        asks: whether the controller is worth asking.
        share: of the rows that there were drafts for, when that was judged.
    """

    price: Price
    refine: Refinement
    probing: Probing
    usual_nodes: float
    asks: bool
    share: float


class LearnedPolicy:
    """See the module.

    Args:
        parts: with measured costs and a controller.
        refine: whether the draft's own scores have a say as well: early exit and pruning.
        bias_rate: of the additive correction of each depth's logit, by what came of the drafts; 0: none.

    The batch shares a depth; a row that cannot pay for its nodes gets none. Without `refine` every plan but a skip gets
    the whole budget: the survival model was trained with it, and fewer nodes would accept less than it says.
    """

    mass_layer: int | None = None
    _PATIENCE, _AGAIN, _SLEEP, _LONGEST = 12, 2, 24, 96
    """Skips in a row after which it sleeps, those after another look, rounds of the first sleep and of the longest."""

    def __init__(self, parts: Parts, refine: bool = False, bias_rate: float = 0.02) -> None:
        self.controller, self.costs = parts.trained("viskip"), parts.measured("viskip")
        self.max_depth = min(parts.depth, len(self.controller.at(False).prior))
        self.max_budget, self.refines, self.bias_rate = parts.budget, refine, bias_rate
        self.offered = [parts.nodes(d) for d in range(self.max_depth + 1)]
        self.outcomes: list[tuple[list[float], int]] | None = None
        """If a list, each draft's chances of the levels that were observed, and how many were accepted, are added."""
        self._met: dict[bool, _Met] = {}
        """What was learned of drafts, by way of sampling; the batch has no say in it."""
        self._paces: dict[tuple[int, bool], _Pace] = {}
        """By batch size as well: a last small batch does not make the others forget."""
        self.asks, self.senses = True, True
        self.opened: tuple[int, bool] | None = None
        self.skips, self.nap = 0, self._SLEEP

    def open(self, max_batch: int, device: torch.device, sampled: bool = False) -> None:
        self.records = Records(max_batch)
        self.said = [[0.5] * self.max_depth] * max_batch
        """What the controller said of each row for the plan that is under way, and drafts of late of every row."""
        self.usually: Sequence[float] = [0.5] * self.max_depth
        self.left = [0] * max_batch
        self.asleep, self.planned, self.tries, self.senses = 0, 0, False, self.asks
        if (max_batch, sampled) == self.opened:
            return
        self.opened = max_batch, sampled
        calibration = self.controller.at(sampled)
        self.prior, self.trials = calibration.prior[: self.max_depth], calibration.trials
        self.calibrated = list(zip(calibration.scale.tolist(), calibration.offset.tolist()))
        if sampled not in self._met:
            self._met[sampled] = _Met(UsualDepth(self.prior), [0.0] * self.max_depth, Sureness())
        self.met = self._met[sampled]
        self.verify_s = [self.costs.verify(max_batch, 1 + n) for n in range(self.max_budget + 1)]
        self.draft_s = [0.0, *(self.costs.draft(max_batch, d) for d in range(1, self.max_depth + 1))]
        self.rows, pace = max_batch, self._paces.get(self.opened)
        seconds = self._reckon(pace.usual_nodes if pace else self.max_budget)
        if pace is None:
            share = self.met.usual.share
            price = Price(max((1 + share * sum(self.prior[:d])) / s for d, s in enumerate(seconds)), max_batch)
            refine = Refinement(self.costs, max_batch, self.max_depth, self.max_budget, price, self.met.sure)
            probing, asks = Probing(_PROBE_SHARE, self.draft_s[1]), self._worth_asking()
            pace = self._paces[self.opened] = _Pace(price, refine, probing, self.max_budget, asks, share)
        self.pace, self.price, self.refine, self.probing = pace, pace.price, pace.refine, pace.probing
        self.asks = self.senses = pace.asks
        self._judge_anew()

    def _judge_anew(self) -> None:
        """Whether to go on asking, where there is less to draft from than when that was judged."""
        if self.pace.asks and self.met.usual.share < _FEWER * self.pace.share:
            self.pace.asks, self.pace.share = self._worth_asking(), self.met.usual.share
            self.asks = self.pace.asks
            self.senses = self.senses and self.asks

    def _reckon(self, usual_nodes: float) -> list[float]:
        """Seconds to expect of a round by planned depth, which depths are compared by from now on."""
        self.usual_nodes, self.reckoned_share = round(usual_nodes), self.met.usual.share
        # Where drafts are pruned, the usual nodes are those of the widest row already.
        rows = 1 if self.refines else self.rows
        self.round_s = [self.cost(d) for d in range(self.max_depth + 1)]
        """Of a round by depth, where every row has a draft as deep as planned."""
        seconds = expected_seconds(self.trials, self.round_s, rows, self.met.usual.share)
        self.extra_s = [s - seconds[0] for s in seconds[1:]]
        """Of a draft of each depth, beyond a round without one."""
        self.met.usual.price(seconds)
        return seconds

    def _worth_asking(self) -> bool:
        """Whether the controller is ahead of what plans would be without it; one that brings no trials is trusted."""
        if self.trials is None:
            return True
        gain, error = advantage(self.trials, self.round_s, self.rows, self.met.usual.share)
        left = (gain - error) * (_UNSAID if self.refines else 1.0)
        return left > _OWN_S / self.round_s[self.met.usual.depth]

    def unasked(self, max_batch: int, device: torch.device, sampled: bool) -> tuple[object, ...] | None:
        """What plans follow from where the controller is asked at no batch size up to `max_batch`; None where it is.

        Policies that say the same, with the same costs, make the same plans.
        """
        for rows in range(1, max_batch + 1):
            self.open(rows, device, sampled)
            if self.asks or self.trials is None:
                return None
        assert self.trials is not None
        return self.refines, self.max_depth, self.max_budget, tuple(self.prior), self.trials.reach.tobytes()

    def cost(self, depth: int) -> float:
        """Predicted seconds of a round."""
        return self.verify_s[self.nodes(depth)] + self.draft_s[depth]

    def nodes(self, depth: int) -> int:
        """Draft nodes to expect in a round."""
        return min(self.usual_nodes, self.offered[depth]) if self.refines else self.offered[depth]

    def sense(self, evidence: Evidence, rows: Tensor) -> Tensor:
        """What the host needs of each row: see `Records.scalars` and `Deployed.look`."""
        e = evidence
        counts = torch.stack([e.n_kept, e.reach, e.n_committed, e.n_prompt, e.n_visual], 1)
        p = e.logits.float().softmax(-1)
        looks = [torch.special.entr(p).sum(-1, keepdim=True), p.topk(2, dim=-1).values]
        looks.append(p.gather(1, e.roots.unsqueeze(1)))
        return torch.cat([counts, *looks, *self.controller.look(e.last_hidden, e.roots)], 1)

    def plan(self, sensed: Sequence[Sequence[float]], remaining: Sequence[int]) -> Plan:
        deepest, self.tries = min(self.max_depth, max(remaining) - 1), False
        active = [row for row, left in enumerate(remaining) if left > 0]
        self.price.among(len(active))
        if not self.asks:
            return self._as_usual(deepest, remaining)
        fresh = any(now not in (0, expected) for now, expected in zip(remaining, self.left))
        self.left = list(remaining)
        if self.asleep or deepest < 1:
            self.asleep = 0 if fresh else max(self.asleep - 1, 0)
            self.senses = not self.asleep
            return self._skip(remaining)
        chances = self._chances([sensed[row] for row in active], active)
        # A row may have nothing to draft from, which is known only once it is asked for a draft.
        share = self.met.usual.share
        gains = [[share * gain for gain in accumulate(accumulate(of_row, mul))] for of_row in chances]
        values = [0.0, *(sum(gain) - self.price.per_s * s for gain, s in zip(zip(*gains), self.extra_s))]
        depth = max(range(deepest + 1), key=values.__getitem__)
        if not depth:
            self.skips += 1
            if self.skips >= self._PATIENCE:
                self.skips = self._PATIENCE - self._AGAIN
                if trial := self._trial(deepest):
                    return self._draft(trial, deepest, self._whole(remaining))
                self.asleep, self.senses, self.nap = self.nap, False, min(2 * self.nap, self._LONGEST)
            return self._skip(remaining)
        self.skips, self.nap = 0, self._SLEEP
        budget = self._budget([gain[depth - 1] for gain in gains], self.nodes(depth), active, remaining)
        if not any(budget):
            return self._skip(remaining)
        if not self.refines:
            return self._draft(depth, deepest, budget)
        of_row: list[Sequence[float]] = [[0.0] * self.max_depth] * len(remaining)
        for row, mixed in zip(active, chances):
            of_row[row] = mixed
        return self._draft(depth, deepest, budget, of_row)

    def _draft(
        self, depth: int, deepest: int, budget: tuple[int, ...], said: Sequence[Sequence[float]] | None = None
    ) -> Plan:
        """A draft of `depth` levels, or as far as its own scores say."""
        if not self.refines:
            self.planned = depth
            return Plan(depth, budget)
        self.planned = deepest
        self.refine.begin(deepest, [n > 0 for n in budget], said)
        return Plan(deepest, budget, self.refine.extend, self.refine.prune)

    def _as_usual(self, deepest: int, remaining: Sequence[int]) -> Plan:
        """The single depth that pays best; where none does, a draft now and then to see whether that still holds."""
        depth = min(self.met.usual.depth, deepest) if self.met.usual.depth else self._trial(deepest)
        if depth < 1:
            return self._skip(remaining)
        return self._draft(depth, deepest, self._whole(remaining))

    def _trial(self, deepest: int) -> int:
        """Depth of a draft that is not thought to pay, where one is due to see whether that still holds; else 0."""
        depth = min(self.met.usual.drafting, deepest)
        self.tries = depth > 0 and self.probing.due(self.cost(depth) - self.cost(0))
        return depth if self.tries else 0

    def _whole(self, remaining: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.max_budget if left > 1 else 0 for left in remaining)

    def _skip(self, remaining: Sequence[int]) -> Plan:
        self.planned = 0
        return Plan(0, (0,) * len(remaining))

    def _chances(self, told: Sequence[Sequence[float]], rows: Sequence[int]) -> list[list[float]]:
        """Of each level once the one before is accepted, [R, Dmax]: what the controller says, its logits corrected by
        what came of drafts, mixed with what drafts of late say."""
        self._correct(told, rows)
        scalars = self.records.scalars([of_row[:_SCALARS] for of_row in told], rows)
        logits = self.controller.logits([of_row[_SCALARS:] for of_row in told], scalars)
        self.usually = usually = self.met.usual.chances()
        weight, half, mixed = 1 / (1 + math.exp(-self.met.trust)), 0.5 - NEVER, []
        for row, of_row in zip(rows, logits):
            # The logistic function from NEVER to 1 - NEVER: none is quite sure.
            self.said[row] = said = [
                0.5 + half * math.tanh(0.5 * (scale * logit + offset + bias))
                for logit, (scale, offset), bias in zip(of_row, self.calibrated, self.met.bias)
            ]
            mixed.append([usual + weight * (chance - usual) for chance, usual in zip(said, usually)])
        return mixed

    def _correct(self, told: Sequence[Sequence[float]], rows: Sequence[int]) -> None:
        """Moves bias and trust by what came of the levels that were reached; a fresh row and a skip have none."""
        trust = self.met.trust
        for (n_kept, reach, *_), row in zip(told, rows):
            accepted, said = int(n_kept) - 1, self.said[row]
            observed = min(accepted + 1, int(reach), self.max_depth)
            # Few levels of few rows: cheaper one by one than as arrays.
            for level in range(observed):
                right, chance, usual = level < accepted, said[level], self.usually[level]
                self.met.bias[level] += self.bias_rate * (right - chance)
                trust += math.log(chance / usual if right else (1 - chance) / (1 - usual))
            if self.outcomes is not None and observed:
                self.outcomes.append((said[:observed], accepted))
        self.met.trust = min(max(trust, -_TRUST), _TRUST)

    def _budget(
        self, gains: Sequence[float], nodes: int, active: Sequence[int], remaining: Sequence[int]
    ) -> tuple[int, ...]:
        """Nodes for the rows that pay for them; alone in its batch a row has paid already."""
        price = 0.0
        if len(active) > 1:
            price = self.price.per_s * (self.verify_s[nodes] - self.verify_s[0]) / len(active)
        budget = [0] * len(remaining)
        for row, gain in zip(active, gains):
            if (remaining[row] > 1 and gain > price) or len(active) == 1:
                budget[row] = self.max_budget
        return tuple(budget)

    def observe(self, trace: StepTrace) -> None:
        """Measured times stay out of the decisions."""
        self.left = [left - emitted for left, emitted in zip(self.left, trace.emitted)]
        tokens, levels = sum(a + 1 for a, active in zip(trace.accepted, trace.active) if active), self.planned
        if self.refines and self.planned:
            seconds, levels = self.refine.seconds(trace.n_nodes, True), self.refine.levels
            self.refine.settle(trace)
            self.pace.usual_nodes += 0.02 * (trace.n_nodes - 1 - self.pace.usual_nodes)
            if round(self.pace.usual_nodes) != self.usual_nodes:
                self._reckon(self.pace.usual_nodes)
        else:
            nodes = min(trace.n_nodes - 1, self.max_budget)
            seconds = self.verify_s[nodes] + self.draft_s[self.planned]
        self.price.add(tokens, seconds)
        self.probing.add(seconds, seconds - self.cost(0) if self.tries else None)
        # A copy may end before the others of its batch, and a pruned tree before its levels do.
        reach = (self.refine.reach if self.refines else ()) or trace.nodes
        for accepted, budget, deep in zip(trace.accepted, trace.plan.budget, reach):
            if budget and levels and (deep or not self.refines):  # a draft that was pruned away says nothing
                self.met.usual.learn(accepted, min(levels, deep))
        if abs(self.met.usual.share - self.reckoned_share) > _NEWS:
            self._reckon(self.pace.usual_nodes)
            self._judge_anew()
