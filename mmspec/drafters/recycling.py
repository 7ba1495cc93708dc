"""Token Recycling: draft the successors that the target itself last rated best (arXiv 2408.08696).

A matrix A [V, k] holds for each token the k best successors in the logits of the last node with that token, accepted
or not. A static tree is filled from it, top down: the child of rank r below token t is A[t, r]. Nothing leaves the
device. At k = 8 and a vocabulary of 152,064 the matrix takes 4.9 MB a row of the batch (int32).

Deviations from the paper: each request starts with an empty matrix, unless told to persist, and fills it from its own
prompt before it drafts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from mmspec.cache import upload
from mmspec.static_tree import TOKEN_RECYCLING_80, StaticTree
from mmspec.tree import root_only, without_padding
from mmspec.types import Forward, Plan, Request, Round, Target, Tree

_CHUNK = 128
"""Prompt positions whose logits are made at a time: 39 MB in bf16 at a vocabulary of 152,064."""


@dataclass(frozen=True)
class Config:
    """Settings.

    Args:
        k: successors kept of each token.
        tree: JSON file of a static tree fitted to the target (scripts/fit_tree.py); "" is the paper's of 80 nodes.
        persist: all requests of a drafter share one matrix, which is kept between them. They draft more, but how much
            depends on which came before; their text does not.
        seed_prompt: fill the matrix from the prompt's text too: for one unembedding of it, drafts start at once.
    """

    k: int = 8
    tree: str = ""
    persist: bool = False
    seed_prompt: bool = True

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"recycling: k must be at least 1, got {self.k}")
        if (ranks := int(self.shape.ranks.max()) + 1) > self.k:
            raise ValueError(f"recycling: the tree asks for {ranks} successors of a token, but k is {self.k}")

    @functools.cached_property
    def shape(self) -> StaticTree:
        """The tree to fill."""
        return StaticTree.load(self.tree) if self.tree else TOKEN_RECYCLING_80

    @property
    def depth(self) -> int:
        """Levels to ask for."""
        return self.shape.depth

    @property
    def budget(self) -> int:
        """Nodes to ask for."""
        return self.shape.budget


class RecyclingDrafter:
    """Fills static trees with recycled successors.

    Invariant: a row of the matrix is -1 throughout, or holds distinct successors with -1 at image placeholders; so
    siblings are distinct, and an image is never drafted. The row beyond the vocabulary, which the index -1 finds, is
    never written: what is missing has nothing below it.

    Args:
        config: see `Config`.
        target: for its vocabulary and, to seed from prompts, its unembedding.
    """

    taps: tuple[int, ...] = ()

    def __init__(self, config: Config, target: Target) -> None:
        if config.k > target.shape.vocab_size:
            raise ValueError(f"recycling: k {config.k} exceeds the vocabulary of {target.shape.vocab_size}")
        self.config, self.target = config, target
        self.shape = config.shape.to(target.device)
        self.matrix = self._empty(int(config.persist))

    def _empty(self, n: int) -> Tensor:
        """[n, V + 1, k] int32, nothing known."""
        size = (n, self.target.shape.vocab_size + 1, self.config.k)
        return torch.full(size, -1, dtype=torch.int32, device=self.target.device)

    def open(self, max_batch: int, max_tokens: int) -> None:
        """A matrix for each of `max_batch` rows; a shared one stays as it is."""
        if not self.config.persist:
            self.matrix = self._empty(max_batch)
        # Which matrix each row reads, [B, 1].
        self.owners = torch.arange(max_batch, device=self.target.device).unsqueeze(1) * (not self.config.persist)

    def admit(self, row: int, request: Request, forward: Forward, root: Tensor) -> None:
        if not self.config.persist:
            self.matrix[row] = -1
        if self.config.seed_prompt:
            texts = (~request.prompt.visual).nonzero().squeeze(1).to(self.target.device)
            tokens = request.prompt.input_ids.to(self.target.device)[texts].unsqueeze(0)
            hidden = forward.last_hidden[:, texts]
            for some, states in zip(tokens.split(_CHUNK, 1), hidden.split(_CHUNK, 1)):
                self._learn(self.owners[row : row + 1], some, self.target.unembed(states), some >= 0)

    def evict(self, row: int) -> None:
        """Nothing to free: the next request empties its matrix."""

    def propose(self, roots: Tensor, plan: Plan) -> Tree:
        """Fill the tree's best `plan.budget[b]` nodes down to `plan.depth`, without a host sync.

        Args:
            roots: [B] int64.
            plan: of at least a level and a node, else only roots come back.
        """
        if plan.depth < 1 or max(plan.budget) < 1:
            return root_only(roots)
        shape = self.shape.cut(max(plan.budget), plan.depth)
        tokens = roots.unsqueeze(1).repeat(1, shape.budget + 1)
        for level in shape.levels[1:]:
            tokens[:, level] = self.matrix[self.owners, tokens[:, shape.parents[level]], shape.ranks[level]].long()
        trees = shape.trees(tokens, plan.budget)
        # On a CPU every node costs time, also one that is nothing, and looking at them costs no sync.
        return without_padding(trees) if roots.device.type == "cpu" else trees

    def observe(self, round: Round) -> None:
        """Learn from every node that the target saw, accepted or not."""
        active = [bool(path) for path in round.paths]
        if any(active):
            verified = round.trees.parents >= 0
            verified[:, 0] = True
            if not all(active):
                verified &= upload(active, verified.device).unsqueeze(1)
            self._learn(self.owners, round.trees.tokens, round.forward.logits, verified)

    def _learn(self, owners: Tensor, tokens: Tensor, logits: Tensor, verified: Tensor) -> None:
        """Note the best successors of tokens; where one occurs more than once, the last, in a tree the deepest, counts.

        Args:
            owners: [R, 1] int64, the matrix of each row.
            tokens: [R, M] int64.
            logits: [R, M, V].
            verified: [R, M] bool; what is not leaves no trace.
        """
        V, k = self.target.shape.vocab_size, self.config.k
        best = logits.topk(k, dim=-1).indices
        best.masked_fill_((best == self.target.image_token_id) | ~verified.unsqueeze(-1), -1)
        slots = (owners * (V + 1) + torch.where(verified, tokens, V)).flatten()
        # A scatter of several values to one slot keeps any of them: all that share a slot write what the last one says.
        ranked, order = slots.sort(stable=True)
        last = order[torch.searchsorted(ranked, slots, right=True) - 1]
        self.matrix.view(-1, k)[slots] = best.flatten(0, 1)[last].int()


def make(config: Config, target: Target) -> RecyclingDrafter:
    """The method's drafter for a target."""
    return RecyclingDrafter(config, target)
