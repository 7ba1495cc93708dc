"""The null drafter: plain decoding by the same loop, and the baseline of every speedup."""

from __future__ import annotations

from torch import Tensor

from mmspec.tree import root_only
from mmspec.types import Forward, Plan, Request, Round, Tree


class NullDrafter:
    """Proposes nothing but the root."""

    taps: tuple[int, ...] = ()

    def open(self, max_batch: int, max_tokens: int) -> None:
        """Nothing to allocate."""

    def admit(self, row: int, request: Request, forward: Forward, root: Tensor) -> None:
        """Nothing to learn from the prompt."""

    def propose(self, roots: Tensor, plan: Plan) -> Tree:
        return root_only(roots)

    def observe(self, round: Round) -> None:
        """Nothing to keep in sync."""

    def evict(self, row: int) -> None:
        """Nothing to free."""
