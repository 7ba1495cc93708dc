"""What every draft head shares. A head is one file here; `kind: foo` in a recipe means `mmspec.heads.foo`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from mmspec.static_tree import StaticTree
from mmspec.types import Drafter, Features, InputError, Objective, Sampler, Target, Unembed


class DraftHead(nn.Module, ABC):
    """A trained drafter: its forward contains the objective, so one module is what the training engine wraps."""

    config: Any
    taps: tuple[int, ...] = ()
    """Indices into the target's hidden_states that the head reads, in training and when drafting."""
    draft_ids: Tensor | None
    """[V'] int64, target ids of a vocabulary of its own, ascending, saved with the weights; None: the target's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("draft_ids", None)

    def target_ids(self, indices: Tensor) -> Tensor:
        """Indices into the head's vocabulary as the target's token ids."""
        return indices if self.draft_ids is None else self.draft_ids[indices]

    def prepare(self, target: Target, answer_counts: Callable[[], Tensor]) -> None:
        """Take what training starts from; called once before it, unless it is resumed or starts from another head.

        Args:
            target: frozen.
            answer_counts: [V] float64, how often each token occurs in the answers of the training data; the same on
                every rank. To ask is a pass over the data by all ranks together, so all must ask or none.
        """

    def take_layer(self, target: Target, index: int) -> None:
        """Start as a copy of one of the target's decoder layers. Every rank must call.

        Args:
            index: 0 is the first layer, -1 the last.

        Raises:
            InputError: this head cannot, or not from that layer.
        """
        raise InputError(f"head.init_layer={index}: this head has no decoder block to copy a layer into")

    @abstractmethod
    def forward(self, features: Features, unembed: Unembed) -> Objective:
        """Loss sums over the answer positions of a teacher-forced batch."""

    @abstractmethod
    def drafter(
        self,
        target: Target,
        width: int,
        sampler: Sampler | None = None,
        widths: Sequence[int] = (),
        shape: StaticTree | None = None,
    ) -> Drafter:
        """The same weights, drafting for a target.

        Args:
            target: frozen.
            width: beams a level, and children a beam.
            sampler: the run's, to draft with the noise that will decide (it changes no token).
            widths: draw candidates instead of choosing them, this many at a node of each level, 1 beyond.
            shape: fill this tree instead of searching for the best one.
        """
