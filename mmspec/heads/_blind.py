"""The vision-blind twin of a head: the same head, which reads constants wherever an image stands.

At image positions a twin sees the means over the training images instead: of the projected image features, and of each
state of the target that the head reads (those have seen the image as well). Nothing else is changed: positions and
lengths stay, and so do the target's states at text positions, through which what the *target* saw reaches every head
that reads states. A twin therefore tells what a head's own look at the image is worth, not what the target's is.

Invariant: `head.blind: true` of a recipe is this class over any head, in training, measurement and drafting alike. A
head's own file knows nothing of it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmspec.heads.base import DraftHead
from mmspec.losses import LossConfig
from mmspec.static_tree import StaticTree
from mmspec.types import Drafter, Features, Forward, Objective, Plan, Request, Round, Sampler, Target, Tree, Unembed

T = TypeVar("T", Features, Forward)


class BlindHead(DraftHead):
    """What a twin does differently; mixed in before the head's own class (`blind_twin`)."""

    means: Tensor
    """[2 + n_taps, D], saved with the weights: of embeddings, last hidden and tapped states at image positions."""

    def __init__(self, config: Any, loss: LossConfig | None = None) -> None:
        # Behind this class comes a head of its own (`blind_twin`), whose arguments these are.
        super().__init__(config, loss)  # type: ignore[call-arg]
        self.register_buffer("means", torch.zeros(2 + len(self.taps), int(config.hidden_size)))

    def blindfold(self, outputs: T) -> T:
        """A pass of the target as the twin reads it: Features, or the Forward of a prefill."""
        assert outputs.embeds is not None
        assert outputs.visual is not None
        here = outputs.visual.unsqueeze(-1)
        embeds, last, *tapped = self.means.to(outputs.embeds).unbind()
        hidden = {tap: torch.where(here, mean, outputs.hidden[tap]) for tap, mean in zip(self.taps, tapped)}
        return replace(
            outputs,
            embeds=torch.where(here, embeds, outputs.embeds),
            last_hidden=torch.where(here, last, outputs.last_hidden),
            hidden={**outputs.hidden, **hidden},
        )

    def forward(self, features: Features, unembed: Unembed) -> Objective:
        return super().forward(self.blindfold(features), unembed)  # type: ignore[safe-super]

    def drafter(
        self,
        target: Target,
        width: int,
        sampler: Sampler | None = None,
        widths: Sequence[int] = (),
        shape: StaticTree | None = None,
    ) -> Drafter:
        drafter = super().drafter(target, width, sampler, widths, shape)  # type: ignore[safe-super]
        return BlindDrafter(drafter, self)


class BlindDrafter:
    """A drafter that is shown prompts without their images; generated tokens are text.

    Args:
        drafter: the head's own.
        head: its twin, which knows what stands there instead.
    """

    def __init__(self, drafter: Drafter, head: BlindHead) -> None:
        self._drafter, self._head = drafter, head
        self.taps = drafter.taps

    def open(self, max_batch: int, max_tokens: int) -> None:
        self._drafter.open(max_batch, max_tokens)

    def admit(self, row: int, request: Request, forward: Forward, root: Tensor) -> None:
        self._drafter.admit(row, request, self._head.blindfold(forward), root)

    def propose(self, roots: Tensor, plan: Plan) -> Tree:
        return self._drafter.propose(roots, plan)

    def observe(self, round: Round) -> None:
        self._drafter.observe(round)

    def evict(self, row: int) -> None:
        self._drafter.evict(row)


@functools.cache
def blind_twin(head: type[DraftHead]) -> type[DraftHead]:
    """The class of a head's twin: that head with BlindHead in front, so whatever looks for the head finds it."""
    return type(f"Blind{head.__name__}", (BlindHead, head), {"__module__": __name__})


def image_means(features: Features, taps: Sequence[int]) -> tuple[Tensor, int]:
    """What a twin's `means` are made of.

    Args:
        features: any batch.
        taps: of the head.

    Returns:
        [2 + n_taps, D] float64, sums over the image positions, and their number.
    """
    states = [features.embeds, features.last_hidden, *(features.hidden[tap] for tap in taps)]
    return torch.stack([state[features.visual].double().sum(0) for state in states]), int(features.visual.sum())
