"""Hybrid: copy where the text repeats itself at length, else let the head draft (SAM Decoding, arXiv 2411.10666).

Both drafters follow every row, and each round each row has the tree of one of them: a row that copies is skipped by the
head, which is free, for its pairs wait until they are needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

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


class HybridDrafter:
    """The retrieval's tree for rows with a long match, the head's for the others.

    Args:
        retrieval, head: opened, fed and freed by this drafter alone while it is in use.
        depth, budget: of the head's tree; a plan may allow the retrieval more.
        min_match: see `Config`.
    """

    def __init__(self, retrieval: HostDrafter, head: Drafter, depth: int, budget: int, min_match: int = 5) -> None:
        self.retrieval, self.head = retrieval, head
        self.depth, self.budget, self.min_match = depth, budget, min_match
        self.taps = head.taps

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
        self.retrieval.observe(round)
        self.head.observe(round)

    def propose(self, roots: Tensor, plan: Plan) -> Tree:
        copies = [n > 0 and match >= self.min_match for n, match in zip(plan.budget, self.retrieval.matches())]
        rest = tuple(0 if c else min(n, self.budget) for n, c in zip(plan.budget, copies))
        if not any(copies):
            return self.head.propose(roots, replace(plan, depth=min(plan.depth, self.depth), budget=rest))
        copied = self.retrieval.propose(
            roots, replace(plan, budget=tuple(n if c else 0 for n, c in zip(plan.budget, copies)))
        )
        if not any(rest):
            return copied
        drafted = self.head.propose(roots, replace(plan, depth=min(plan.depth, self.depth), budget=rest))
        return by_row(upload(copies, roots.device), copied, drafted)
