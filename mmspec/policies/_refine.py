"""What draft scores say while and after a draft is made: when to stop, and which nodes are worth verifying.

Invariant: everything here depends on chosen candidates and the committed context alone, so no choice changes a token
(`types.Plan`). Drawn candidates are refused by their drafters.

Source: SMART (arXiv 2604.09731), marginal benefit against marginal cost. Deviations: the gain of a
node is its path's probability, sharpened by what came of earlier drafts; verification is padded to the widest row, so
what water-filling fills are columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmspec.policies._parts import Price
from mmspec.policy import Costs
from mmspec.tree import first_nodes
from mmspec.types import StepTrace, Tree

_Level = tuple[float, float, float]
"""Chance of a level once the one before is accepted, by the scores and by a controller, and the scores' mass of it."""


class Sureness:
    """What was learned of a drafter's scores; neither the batch nor the machine has a say in it.

    Attributes:
        sharpness: exponent of the draft's path probabilities that makes them chances of acceptance.
        hazard: fading sums of chances of a level and of the one before: their ratio is the usual chance of the next.
        trust: log-odds of the scores against what a controller says of the same levels.
    """

    def __init__(self) -> None:
        self.sharpness, self.hazard, self.trust = 1.0, [4.0, 5.0], 0.0


class Refinement:
    """Early exit and pruning of one draft at a time, at the going price of time.

    `plan.extend` and `plan.prune` are its methods of these names.

    Args:
        costs: measured seconds.
        rows: of the batch.
        depth, budget: the largest plan.
        price: of time; read here, kept by the policy.
        sure: of the drafter; learned here, kept by the policy.
    """

    _RATE = 0.02
    """Of the sharpness: how fast it follows predicted and accepted tokens."""
    _FADE = 0.99
    _UNLIKELY = 1e-3
    """Nodes below this chance are not worth a row's place even where a column is free."""
    _TRUST = 4.0
    """Of the log-odds, at most and at least: neither scores nor controller is ever given up."""

    def __init__(self, costs: Costs, rows: int, depth: int, budget: int, price: Price, sure: Sureness) -> None:
        self.price, self.sure = price, sure
        self.verify_s = [costs.verify(rows, 1 + n) for n in range(budget + 1)]
        self.draft_s = [0.0, *(costs.draft(rows, d) for d in range(1, depth + 1))]
        self.levels = 0
        self._levels: list[list[_Level]] = []
        """Of each row, the levels that were weighed and remained."""
        self.reach: list[int] = []
        """Deepest level of each row that is left to verify; empty where a draft had no scores to prune by."""
        self._expected = 0.0

    def begin(self, depth: int, active: Sequence[bool], next_level: Sequence[Sequence[float]] | None = None) -> None:
        """A draft is about to be made.

        Args:
            depth: planned levels, all of which are made unless `extend` ends it.
            active: [B], rows with a budget.
            next_level: [B][depth], a controller's chance that each level is accepted once the one before is; None:
                nobody says.
        """
        self.levels, self.active, self.next_level, self._grown = depth, active, next_level, False
        self._before: list[float] = [1.0 if a else 0.0 for a in active]
        self._expected, self.reach, self._levels = 0.0, [], []

    def extend(self, level: int, scores: Tensor) -> bool:
        """Whether any number of further levels is worth its draft passes and a node more to verify for each.

        A level may pay by those after it alone: verification is often paid for by several nodes at a time.
        """
        self._grown = True
        reached = [
            min(sum(math.exp(self.sure.sharpness * s) for s in row), before) if before else 0.0
            for row, before in zip(scores.tolist(), self._before)
        ]
        # The first level says how sure the root's state is, not how chances go on; a head that overflowed says nothing.
        if level > 1 and math.isfinite(sum(reached)):
            self.sure.hazard[0] = self._FADE * self.sure.hazard[0] + sum(reached)
            self.sure.hazard[1] = self._FADE * self.sure.hazard[1] + sum(self._before)
        self._before = reached
        usual, gain = self.sure.hazard[0] / self.sure.hazard[1], 0.0
        for deeper in range(level, self.levels):
            if self.next_level is None:
                reached = [chance * usual for chance in reached]
            else:
                reached = [chance * of_row[deeper] for chance, of_row in zip(reached, self.next_level)]
            gain += sum(reached)
            if gain > self.price.per_s * (self._cost(deeper + 1) - self._cost(level)):
                return True
        self.levels = level
        return False

    def _cost(self, level: int) -> float:
        """Seconds of a draft of so many levels and as many nodes."""
        return self.draft_s[level] + self.verify_s[min(level, len(self.verify_s) - 1)]

    def prune(self, trees: Tree) -> Tree:
        """The nodes that pay, best first: columns of the padded batch while their summed chances are worth them.

        Scores never rise from one column to the next, so a row's best nodes are its first ones, and they are a tree.
        A draft that is made in one go (a copy, Medusa's) was not grown by what a controller foresees of its levels: its
        chances are weighed with that here.
        """
        assert trees.scores is not None
        scores, depths = torch.stack([trees.scores, trees.depths.to(trees.scores.dtype)]).tolist()
        scored = chances = [
            [math.exp(self.sure.sharpness * s) for s in row[1:]] if active else []
            for row, active in zip(scores, self.active)
        ]
        if self.next_level is not None and not self._grown:
            chances = [
                self._weighed(row, levels, of_row) for row, levels, of_row in zip(scored, depths, self.next_level)
            ]
        widest = trees.tokens.shape[1] - 1
        best, best_value, gain = 0, -self.price.per_s * self.verify_s[0], 0.0
        for n in range(1, widest + 1):
            gain += sum(row[n - 1] for row in chances if row)
            value = gain - self.price.per_s * self.verify_s[n]
            if value > best_value:
                best, best_value = n, value
        counts = [sum(chance >= self._UNLIKELY for chance in row[:best]) for row in chances]
        for levels, row, places, count in zip(self._levels, scored, depths, counts):
            _drop_thinned(levels, row[count:], places[count + 1 :])
        self._expected = sum(sum(row[:n]) for row, n in zip(scored, counts))
        self.reach = [int(max(row[: n + 1])) for row, n in zip(depths, counts)]
        return first_nodes(trees, counts)

    def _weighed(self, chances: list[float], depths: Sequence[float], said: Sequence[float]) -> list[float]:
        """A row's chances, so that each level comes true as often as scores and controller say, each by its trust.

        Args:
            chances: of the nodes behind the root, by their scores; none of an idle row.
            depths: of all nodes, the root first.
            said: [depth], a controller's chance that each level is accepted once the one before is.
        """
        mass = [1.0] + [0.0] * int(max(depths))
        for chance, depth in zip(chances, depths[1:]):
            mass[int(depth)] += chance
        weight, factors, mixed = 1 / (1 + math.exp(-self.sure.trust)), [1.0], 1.0
        levels: list[_Level] = []
        for before, here, foreseen in zip(mass, mass[1:] if chances else (), said):
            scored = min(max(here / before, 1e-3), 1 - 1e-3) if before else 1e-3
            levels.append((scored, foreseen, here))
            mixed *= foreseen + weight * (scored - foreseen)
            factors.append(mixed / here if here else 1.0)
        self._levels.append(levels)
        return [chance * factors[int(depth)] for chance, depth in zip(chances, depths[1:])]

    def settle(self, trace: StepTrace) -> None:
        """Learn how sure drafts should have been, from a round that `prune` was asked in."""
        trust = self.sure.trust
        for levels, accepted, reach in zip(self._levels, trace.accepted, self.reach):
            for level, (scored, foreseen, _) in enumerate(levels[: min(accepted + 1, reach)]):
                right = level < accepted
                trust += math.log(scored / foreseen if right else (1 - scored) / (1 - foreseen))
        self.sure.trust = min(max(trust, -self._TRUST), self._TRUST)
        if not 0 < self._expected < math.inf:  # not a number of a head that overflowed
            return
        got = sum(a for a, active in zip(trace.accepted, trace.active) if active)
        # Divided by what was known before: a quotient that what came of the draft is in has no mean of zero.
        surprise = (self._expected - got) / (1.0 + self._expected)
        self.sure.sharpness = min(max(self.sure.sharpness * math.exp(self._RATE * surprise), 0.1), 10.0)
        self._expected = 0.0

    def seconds(self, n_nodes: int, drafted: bool) -> float:
        """Predicted seconds of a round as it was made; `n_nodes` with the root."""
        return self.verify_s[min(n_nodes, len(self.verify_s)) - 1] + (self.draft_s[self.levels] if drafted else 0.0)


def _drop_thinned(levels: list[_Level], chances: Sequence[float], depths: Sequence[float]) -> None:
    """Keeps the levels before the first that lost more than a tenth: its failure says less than what was foreseen.

    Args:
        levels: of a row, the first one at 0.
        chances, depths: of its nodes that are not verified, in their order; depth 0 is padding.
    """
    lost = [0.0] * (len(levels) + 1)
    for chance, depth in zip(chances, depths):
        if 0 < depth <= len(levels):
            lost[int(depth)] += chance
    del levels[next((k for k, (_, _, mass) in enumerate(levels) if lost[k + 1] > 0.1 * mass), len(levels)) :]
