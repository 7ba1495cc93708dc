"""The oracle of policies: had every draft's outcome been known, how fast could decoding have been?

Computed offline, from one rollout with the largest draft and a cost table.

Because decoding is lossless, what a smaller draft of the same round would have accepted is in the record of the larger
one: a tree of the `n` best nodes down to level `d` accepts to the deepest level `k <= d` whose node of the accepted
path is among the first `n` of those no deeper than `d`. Of a chain that is exact. Of a tree with branches it is at
most what the smaller draft accepts: that one has room for nodes which deeper ones had kept out of the record. The
oracle picks `(d, n)` for each round with that known, at the price of time that such picks achieve (renewal reward). It
bounds policies that shape this drafter's chains round by round, up to one approximation: a shorter round would have
begun the next one elsewhere, and rounds there are taken to be like these.

P9 of `eval.policies`; why so: DESIGN 92.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mmspec.policy import Costs
from mmspec.types import Drafter, Forward, Plan, Request, Round, Tree


@dataclass(frozen=True)
class Outcome:
    """What became of a row's draft.

    Args:
        path: index of the accepted node of each level, the root left out; nodes stand best first, so it is a rank.
        depths: level of each node but the root, in their order; 0 is padding.
    """

    path: tuple[int, ...]
    depths: tuple[int, ...]

    def accepted(self, depth: int, nodes: int) -> int:
        """Tokens that the first `nodes` of the nodes no deeper than `depth` would have accepted as a tree."""
        found = 0
        for level, index in enumerate(self.path[:depth], start=1):
            if self.rank(index, depth) > nodes:
                break
            found = level
        return found

    def rank(self, index: int, depth: int) -> int:
        """1-based place of a node among those no deeper than `depth`."""
        return sum(0 < d <= depth for d in self.depths[:index])


Step = tuple[Outcome, ...]
"""One step of the loop: the outcomes of its active rows."""
Priced = tuple[Step, "Prices"]
"""A step and the seconds of its batch."""


class Recorder:
    """A drafter that keeps what became of its drafts. Drafts and text are those of the one it holds.

    Args:
        drafter: whose nodes stand best first, as those of dynamic trees and of chains do.

    Attributes:
        steps: since someone cleared them.
        rows: of the batch that is decoded, idle ones included.
    """

    def __init__(self, drafter: Drafter) -> None:
        self.drafter, self.taps = drafter, drafter.taps
        self.steps: list[Step] = []
        self.rows = 0

    def open(self, max_batch: int, max_tokens: int) -> None:
        self.rows = max_batch
        self.drafter.open(max_batch, max_tokens)

    def admit(self, row: int, request: Request, forward: Forward, root: Tensor) -> None:
        self.drafter.admit(row, request, forward, root)

    def evict(self, row: int) -> None:
        self.drafter.evict(row)

    def propose(self, roots: Tensor, plan: Plan) -> Tree:
        return self.drafter.propose(roots, plan)

    def observe(self, round: Round) -> None:
        depths = round.trees.depths[:, 1:].tolist()
        # A row that has just finished is told no path: its last round, which the end of the text cut, is left out.
        step = tuple(Outcome(path[1:], tuple(row)) for path, row in zip(round.paths, depths) if path)
        if step:
            self.steps.append(step)
        self.drafter.observe(round)


@dataclass(frozen=True)
class Prices:
    """Seconds of a step of one batch size.

    Args:
        verify_s: by nodes a row, the root left out.
        draft_s: by depth.
    """

    verify_s: tuple[float, ...]
    draft_s: tuple[float, ...]

    @staticmethod
    def of(costs: Costs, rows: int, depth: int, budget: int) -> Prices:
        """From a cost table, for the largest draft of a batch of `rows`, idle ones included."""
        verify = tuple(costs.verify(rows, 1 + n) for n in range(budget + 1))
        return Prices(verify, (0.0, *(costs.draft(rows, d) for d in range(1, depth + 1))))


def fixed_rate(steps: Sequence[Priced], depth: int, nodes: int) -> float:
    """Tokens a second of drafting (depth, nodes) in every step; (0, 0) is plain decoding."""
    tokens = sum(1 + (row.accepted(depth, nodes) if nodes else 0) for step, _ in steps for row in step)
    seconds = sum(prices.verify_s[nodes] + (prices.draft_s[depth] if nodes else 0.0) for _, prices in steps)
    return tokens / seconds


def oracle_rate(steps: Sequence[Priced], rounds: int = 30) -> float:
    """Tokens a second of the best choice for every step.

    Args:
        steps: of the largest draft, at least one.
        rounds: of the fixed point (Dinkelbach's: it rises, and converges faster than linearly).
    """
    options = [_options(step, prices) for step, prices in steps]
    rate = 0.0
    for _ in range(rounds):
        picked = [max(choices, key=lambda c: c[0] - rate * c[1]) for choices in options]
        better = sum(tokens for tokens, _ in picked) / sum(seconds for _, seconds in picked)
        if better <= rate * (1 + 1e-12):
            break
        rate = better
    return rate


def _options(step: Step, prices: Prices) -> list[tuple[int, float]]:
    """Tokens and seconds of every draft of a step that no smaller one equals; the first drafts nothing."""
    found = [(len(step), prices.verify_s[0])]
    deepest = min(max(len(row.path) for row in step), len(prices.draft_s) - 1)
    for depth in range(1, deepest + 1):
        ranks = {row.rank(index, depth) for row in step for index in row.path[:depth]}
        for nodes in sorted(n for n in ranks if n < len(prices.verify_s)):
            tokens = sum(1 + row.accepted(depth, nodes) for row in step)
            found.append((tokens, prices.verify_s[nodes] + prices.draft_s[depth]))
    return found
