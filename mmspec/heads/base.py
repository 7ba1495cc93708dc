"""What every draft head shares. A head is one file here; `kind: foo` in a recipe means `mmspec.heads.foo`."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mmspec.cache import upload
from mmspec.sampling import KeyedSampler, Penalties, gumbel_noise
from mmspec.static_tree import StaticTree
from mmspec.tree import from_parents
from mmspec.types import Drafter, Features, InputError, Objective, Plan, Proposals, Sampler, Target, Tree, Unembed

NOISE_SHARE = 0.3
"""How much of a sampler's noise goes into the choice of candidates, 0 to 1; see `noisy_scores`."""


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


# ---- drafting ----

H = TypeVar("H", bound=DraftHead)


def frozen_head(head: H, target: Target) -> H:
    """A head to draft for a target: in eval mode, of its device and dtype, without gradients.

    A head in training is copied: freezing it here would stop its training without a word.
    """
    frozen = not (head.training or any(p.requires_grad for p in head.parameters()))
    head = head if frozen else copy.deepcopy(head)
    return head.to(target.device, target.dtype).eval().requires_grad_(False)


def candidate_sampler(
    sampler: Sampler | None, width: int, widths: Sequence[int], shape: StaticTree | None
) -> KeyedSampler | None:
    """The sampler whose noise candidates are chosen by, without penalties; None where there is no noise.

    Raises:
        ValueError: the arguments of `DraftHead.drafter` contradict each other.
    """
    if width < 1 or any(w < 1 for w in widths):
        raise ValueError(f"the tree's width must be at least 1, got {width} and {tuple(widths)}")
    if widths and not isinstance(sampler, KeyedSampler):
        raise ValueError("drawing candidates (widths) needs a KeyedSampler; greedy decoding has nothing to draw")
    if widths and shape is not None:
        raise ValueError("a static tree is filled with chosen candidates; give either widths or a shape")
    return replace(sampler, penalties=Penalties()) if isinstance(sampler, KeyedSampler) else None


def noisy_scores(
    logits: Tensor, sampler: KeyedSampler, keys: Tensor, positions: Tensor, share: float, ids: Tensor | None, V: int
) -> Tensor:
    """Log-probability [B, M, V'] that the target will choose each token, given the noise it chooses with.

    The target takes argmax(log p + g), and a head is less sure than the target: where p is a sharper, erring q,
    log p = a (log q + e) with e Gumbel, a token wins with probability softmax(log q + g / a) once g is known. `share`
    is 1 / a: 1 trusts the head to be exact, 0 gives the tree of log q. Scores stay log-probabilities, so their sums
    mean the probability of a path and re-rank a pool as without noise.

    Args:
        logits: [B, M, V'] of the head; keys: [B], of the requests; positions: [B, M] or [B, 1] int64, of the tokens.
        ids: [V'] int64, the head's vocabulary; None: that of the logits.
        V: size of the target's vocabulary, which `ids` are of.
    """
    work = logits if logits.dtype == torch.float64 else logits.float()
    width = work.shape[-1] if ids is None else V
    noise = gumbel_noise(sampler.seed, keys, positions, width, work.dtype)
    noise = noise if ids is None else noise[..., ids]
    return (work / sampler.temperature + share * noise).log_softmax(-1)


def drawn_levels(widths: Sequence[int], plan: Plan, depth: int) -> tuple[list[int], list[int]]:
    """How many candidates are drawn at a node of each level, and how many nodes each level has, the root's first.

    Args:
        widths: see `DraftHead.drafter`.
        depth: levels at most; fewer where the budget is used up.

    Raises:
        ValueError: the plan would let candidates decide how many there are.
    """
    if plan.extend is not None or plan.prune is not None:
        raise ValueError("drawn candidates may not decide the shape of their tree; use a policy that does not prune")
    levels: list[int] = []
    counts = [1]
    while len(levels) < depth and sum(counts) <= max(plan.budget):
        levels.append(widths[len(levels)] if len(levels) < len(widths) else 1)
        counts.append(counts[-1] * levels[-1])
    return levels, counts


def drawn_trees(tokens: list[Tensor], chances: list[Tensor], widths: list[int], budget: Sequence[int]) -> Tree:
    """Trees of drawn candidates, of which the budget keeps the first in level order.

    Args:
        tokens: the roots [B, 1] and the nodes of each level, [B, count].
        chances: the distribution that the children of each node were drawn from, [B, count, V] of each level but the
            last.
        widths: see `drawn_levels`.
        budget: [B], draft nodes a row.
    """
    roots, n_nodes = tokens[0], max(budget) + 1
    parents, created = [torch.full_like(roots, -1)], 0
    for level, width in zip(tokens, widths):
        places = torch.arange(created, created + level.shape[1], device=roots.device)
        parents.append(places.repeat_interleave(width).expand(len(roots), -1))
        created += level.shape[1]
    kept = torch.cat(parents, 1)[:, :n_nodes]
    if min(budget) + 1 < kept.shape[1]:
        limits = upload(budget, roots.device).unsqueeze(1)
        kept = kept.masked_fill(torch.arange(kept.shape[1], device=roots.device) > limits, -1)
    trees = from_parents(torch.cat(tokens, 1)[:, :n_nodes], kept, len(widths))
    return replace(trees, proposals=Proposals(torch.cat(chances, 1)[:, :n_nodes], tuple(widths)))
