"""An unembedding of a head's own, which starts as the target's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmspec.types import Target

T = TypeVar("T")


class Unembedding(nn.Linear):
    """W_d. Whatever needs the weight itself is done in its forward: elsewhere ZeRO-3 has only a shard of it."""

    def __init__(self, width: int, n_tokens: int) -> None:
        super().__init__(width, n_tokens, bias=False)

    def forward(self, x: Tensor, use: Callable[[Tensor, Tensor], T] = F.linear) -> T:  # type: ignore[assignment]
        """Logits of x [..., D], or what else `use` makes of x and the weight."""
        return use(x, self.weight)

    @torch.no_grad()
    def start_from(self, target: Target, ids: Tensor) -> None:
        """Become the target's rows of some tokens, before training.

        Args:
            ids: [V'] int64, one for each of this one's own.
        """
        # A target hands out no weights, but its unembedding of unit vectors is their transpose, exactly.
        for column in torch.arange(self.in_features).split(256):
            units = F.one_hot(column, self.in_features).to(target.device, target.dtype)
            self.weight[:, column] = target.unembed(units)[:, ids].T.to(self.weight)
