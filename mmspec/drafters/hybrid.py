"""Hybrid: copy where the text repeats itself at length, else let the head draft (SAM Decoding, arXiv 2411.10666).

Both drafters follow every row, and each round each row has the tree of one of them: a row that copies is skipped by the
head, which is free, for its pairs wait until they are needed. Where costs are known a copy must be worth more than the
head's tree at the going price of time, by what came of earlier copies from matches of that length.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from mmspec.cache import upload
from mmspec.drafters._host import HostDrafter
from mmspec.tree import by_row
from mmspec.types import Drafter, Forward, Plan, Request, Round, Tree


@dataclass(frozen=True)
class Config:
    """Settings.

    Args:
        retrieval: the method that copies; any whose streams know how long their match is.
        min_match: tokens that must have occurred before, in a row, for a copy to be preferred to the head's tree.
        settings: of the retrieval; what is not given has its own default.
    """

    retrieval: str = "sam"
    min_match: int = 5
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.min_match < 1:
            raise ValueError(f"hybrid: min_match must be at least 1, got {self.min_match}")


class Costs(Protocol):
    """Seconds of this drafter: see `mmspec.policy.Costs`."""

    def verify(self, batch: int, nodes: int) -> float: ...
    def draft(self, batch: int, depth: int) -> float: ...


class HybridDrafter:
    """The retrieval's tree for rows with a long match, the head's for the others.

    Args:
        retrieval, head: opened, fed and freed by this drafter alone while it is in use.
        depth, budget: of the head's tree; a plan may allow the retrieval more.
        min_match: see `Config`.

    Attributes:
        costs: measured ones, once they are there; None: the length of the match alone decides.
    """

    _MEMORY = 0.98

    def __init__(self, retrieval: HostDrafter, head: Drafter, depth: int, budget: int, min_match: int = 5) -> None:
        self.retrieval, self.head = retrieval, head
        self.depth, self.budget, self.min_match = depth, budget, min_match
        self.taps = head.taps
        self.costs: Costs | None = None
        self.copying: list[bool] = []
        self._head_tokens, self._tokens, self._seconds = [2.0, 1.0], 0.0, 0.0

    def open(self, max_batch: int, max_tokens: int) -> None:
        self.retrieval.open(max_batch, max_tokens)
        self.head.open(max_batch, max_tokens)

    def admit(self, row: int, request: Request, forward: Forward, root: Tensor) -> None:
        self.retrieval.admit(row, request, forward, root)
        self.head.admit(row, request, forward, root)

    def evict(self, row: int) -> None:
        self.retrieval.evict(row)
        self.head.evict(row)

    def observe(self, round: Round) -> None:
        if self.costs is not None:
            self._learn(self.costs, round)
        self.retrieval.observe(round)
        self.head.observe(round)

    def _learn(self, costs: Costs, round: Round) -> None:
        """Tokens a second, and tokens of the head's drafts, both fading; per row, at the costs of a row alone."""
        for path, copies in zip(round.paths, self.copying):
            if not path:
                continue
            seconds = costs.verify(1, round.trees.tokens.shape[1])
            if not copies:
                seconds += costs.draft(1, self.depth)
                self._head_tokens = [self._MEMORY * s + x for s, x in zip(self._head_tokens, (len(path) - 1, 1.0))]
            self._tokens = self._MEMORY * self._tokens + len(path)
            self._seconds = self._MEMORY * self._seconds + seconds
        self.copying = []

    def _length(self, match: int, budget: int) -> int:
        """Tokens to copy behind a match, 0 where the head's tree is worth more."""
        if self.costs is None or match < self.min_match or not self._seconds:
            return budget if match >= self.min_match else 0
        price = self._tokens / self._seconds
        head = self._head_tokens[0] / self._head_tokens[1]
        head -= price * (self.costs.verify(1, 1 + self.budget) + self.costs.draft(1, self.depth))
        lengths = {n for n in (2, 4, 8, 16, budget) if n <= budget}
        trust = self.retrieval.trust
        worth = {n: trust.expected(match, n) - price * self.costs.verify(1, 1 + n) for n in lengths}
        best = max(worth, key=worth.__getitem__)
        return best if worth[best] > head else 0

    def propose(self, roots: Tensor, plan: Plan) -> Tree:
        self.retrieval.learns = self.costs is not None
        lengths = [self._length(match, n) if n else 0 for n, match in zip(plan.budget, self.retrieval.matches())]
        copies = self.copying = [n > 0 for n in lengths]
        rest = tuple(0 if c else min(n, self.budget) for n, c in zip(plan.budget, copies))
        if not any(copies):
            return self.head.propose(roots, replace(plan, depth=min(plan.depth, self.depth), budget=rest))
        copied = self.retrieval.propose(
            roots, replace(plan, budget=tuple(min(n, m) for n, m in zip(plan.budget, lengths)))
        )
        if not any(rest):
            return copied
        drafted = self.head.propose(roots, replace(plan, depth=min(plan.depth, self.depth), budget=rest))
        return by_row(upload(copies, roots.device), copied, drafted)
