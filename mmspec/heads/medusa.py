"""Medusa: several heads on the target's newest state, each predicting one token further ahead than the last.

Head j (1 to K) is one or more residual blocks r + SiLU(W r + b) on f_i, the target's last hidden state, and estimates
f_{i+j}, whose unembedding, the target's frozen one or one of the head's own, gives x_{i+1+j}; x_{i+1} is known, it is
the root. Nothing else is read, no token and no image: what a picture shows is in f, or lost. So there is no cache, a
skipped row costs nothing, and the levels of a tree are independent of each other: the best tree of any budget is found
exactly (`tree.best_products`).

Source: Medusa (arXiv 2401.10774). Deviations, on purpose: soft labels; each head's loss ends with the reply, so the
masks are shifted head by head; and those of the training objective (`_objective.py`). Its typical acceptance is not
here, as it changes what the target says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmspec.cache import upload
from mmspec.heads._objective import SteppedHead
from mmspec.heads._packed import Packed, pack
from mmspec.heads._unembedding import Unembedding
from mmspec.heads.base import NOISE_SHARE, candidate_sampler, drawn_levels, drawn_trees, frozen_head, noisy_scores
from mmspec.losses import Aims, LossConfig, vocabulary_losses
from mmspec.nn import joined
from mmspec.sampling import DRAFT_STREAM, gumbel_noise
from mmspec.static_tree import StaticTree
from mmspec.tree import best_products, root_only
from mmspec.types import (
    Features,
    Forward,
    InputError,
    Plan,
    Request,
    Round,
    Sampler,
    Target,
    TargetShape,
    Tree,
    Unembed,
)


@dataclass(frozen=True)
class Config:
    """Shape of the head; 0 means "as the target".

    Args:
        hidden_size, vocab_size: the target's own; checked when the head is loaded.
        n_ahead: K, tokens that are predicted, one head each; in training loss.steps is the same number.
        n_blocks: residual blocks of a head.
        own_head: an unembedding of its own for each head, which starts as the target's (Medusa-1); else the target's,
            frozen, serves them all.
        image_input: `none`: the head sees a picture in the target's state alone.
    """

    hidden_size: int = 0
    vocab_size: int = 0
    n_ahead: int = 4
    n_blocks: int = 1
    own_head: bool = False
    image_input: str = "none"

    def __post_init__(self) -> None:
        for name in ("n_ahead", "n_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"head.{name} must be at least 1, got {getattr(self, name)}")
        if self.image_input != "none":
            raise ValueError(f"head.image_input: the medusa head reads no image, only 'none', got '{self.image_input}'")

    def resolve(self, shape: TargetShape) -> Config:
        """Fill in what was left at 0 from the target's shape."""
        return replace(
            self,
            hidden_size=self.hidden_size or shape.hidden_size,
            vocab_size=self.vocab_size or shape.vocab_size,
        )


class ResidualBlock(nn.Module):
    """r + SiLU(W r + b): at first the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class Head(SteppedHead):
    """The Medusa heads.

    Args:
        config: a resolved Config.
        loss: weights of the objective; not needed for drafting.

    Raises:
        InputError: the loss is not about as many steps as there are heads.
    """

    def __init__(self, config: Config, loss: LossConfig | None = None) -> None:
        super().__init__()
        if not config.hidden_size:
            raise ValueError("medusa.Config has hidden_size 0; call config.resolve(target.shape) first")
        if loss is not None and loss.steps != config.n_ahead:
            raise InputError(
                f"loss.steps={loss.steps} must be head.n_ahead={config.n_ahead}: each of the medusa heads is a step"
            )
        self.config = config
        self.loss = loss or LossConfig(steps=config.n_ahead)
        width = config.hidden_size
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(width) for _ in range(config.n_blocks))) for _ in range(config.n_ahead)
        )
        owners = config.n_ahead if config.own_head else 0
        self.lm_heads = nn.ModuleList(Unembedding(width, config.vocab_size) for _ in range(owners))
        self.fused: tuple[Tensor, Tensor] | None = None

    def prepare(self, target: Target, answer_counts: object) -> None:
        """Start each unembedding as the target's."""
        ids = torch.arange(self.config.vocab_size)
        for own in self.lm_heads:
            own.start_from(target, ids)  # type: ignore[operator]

    def fuse(self) -> None:
        """For drafting: the first blocks of all heads, which read the same, by one product; see `DecoderBlock.fuse`."""
        first: list[nn.Linear] = [blocks[0].linear for blocks in self.blocks]  # type: ignore[index]
        biases = torch.cat([layer.bias.data for layer in first])
        for layer, part in zip(first, biases.chunk(len(first))):
            layer.bias.data = part
        self.fused = joined(first), biases

    def ahead(self, states: Tensor) -> Tensor:
        """The target's states [..., D] as those that K tokens ahead are estimated from, [..., K, D]."""
        if self.fused is None:
            return torch.stack([blocks(states) for blocks in self.blocks], -2)
        inner = F.silu(F.linear(states, *self.fused)).unflatten(-1, (self.config.n_ahead, -1))
        inner = states.unsqueeze(-2) + inner
        if self.config.n_blocks == 1:
            return inner
        each = zip(self.blocks, inner.unbind(-2))
        return torch.stack([blocks[1:](own) for blocks, own in each], -2)  # type: ignore[index]

    def logits(self, states: Tensor, unembed: Unembed) -> Tensor:
        """Of the first k heads, [..., k, V], from their states [..., k, D]."""
        if not self.lm_heads:
            return unembed(states)
        return torch.stack([own(state) for own, state in zip(self.lm_heads, states.unbind(-2))], -2)

    def step_logits(self, step: int, states: Tensor, unembed: Unembed) -> Tensor:
        logits: Tensor = self.lm_heads[step](states) if self.lm_heads else unembed(states)
        return logits

    def unroll(self, features: Features, steps: int) -> tuple[Packed, list[Tensor]]:
        packed = pack(features)
        # The parameters' dtype, not the target's: the two may differ (bf16 target, fp32 master weights).
        dtype = next(self.parameters()).dtype
        states = features.last_hidden.flatten(0, 1)[packed.tokens[packed.drafts]].to(dtype)
        return packed, [blocks(states) for blocks, _ in zip(self.blocks, range(steps))]

    def score(self, states: Tensor, aims: Aims, unembed: Unembed) -> tuple[Tensor, Tensor, Tensor]:
        if not self.lm_heads:
            return super().score(states, aims, unembed)
        assert aims.steps is not None
        total = torch.zeros((), device=states.device)
        hits, covers = (torch.zeros(len(states), dtype=torch.bool, device=states.device) for _ in range(2))
        for step, own in enumerate(self.lm_heads):
            mine = (aims.steps == step).nonzero().squeeze(1)
            part = Aims(aims.truth, aims.of[mine], aims.weight[mine])

            def losses(x: Tensor, weight: Tensor, part: Aims = part) -> tuple[Tensor, Tensor, Tensor]:
                return vocabulary_losses(x, part, unembed, self.loss, weight)

            loss, hits[mine], covers[mine] = own(states[mine], losses)
            total = total + loss
        return total, hits, covers

    def drafter(
        self,
        target: Target,
        width: int,
        sampler: Sampler | None = None,
        widths: Sequence[int] = (),
        shape: StaticTree | None = None,
    ) -> MedusaDrafter:
        """See `DraftHead.drafter`; trees are the best over all tokens where the width is at least the budget."""
        return MedusaDrafter(self, target, width, sampler, widths, shape)


class MedusaDrafter:
    """Drafts all levels from the newest state of each row, by one pass.

    Invariant: `states[b]` is f of the row's last committed position, n - 1, and `lengths[b]` is n, the root's index.

    Args:
        head: in eval mode, on the target's device and dtype.
        target: for its frozen unembedding.
        width: candidates of a level.
        sampler, widths, shape, noise_share: see `PairDrafter`. Levels being independent, all nodes of one have the same
            candidates.
    """

    def __init__(
        self,
        head: Head,
        target: Target,
        width: int,
        sampler: Sampler | None = None,
        widths: Sequence[int] = (),
        shape: StaticTree | None = None,
        noise_share: float = NOISE_SHARE,
    ) -> None:
        self.sampler = candidate_sampler(sampler, width, widths, shape)
        self.widths, self.noise_share = tuple(widths), noise_share
        self.head = frozen_head(head, target)
        self.head.fuse()
        self.taps = head.taps
        self.target, self.width = target, min(width, head.config.vocab_size)
        self.shape = shape and shape.to(target.device)
        self.max_depth = head.config.n_ahead

    def open(self, max_batch: int, max_tokens: int) -> None:
        """Allocate for `max_batch` rows."""
        size = (max_batch, self.head.config.hidden_size)
        self.states = torch.zeros(size, dtype=self.target.dtype, device=self.target.device)
        self.keys = torch.zeros(max_batch, dtype=torch.long, device=self.target.device)
        self.lengths = [0] * max_batch

    def admit(self, row: int, request: Request, forward: Forward, root: Tensor) -> None:
        self.states[row] = forward.last_hidden[0, -1]
        self.keys[row] = request.key
        self.lengths[row] = len(request.prompt)

    def evict(self, row: int) -> None:
        self.lengths[row] = 0

    def observe(self, round: Round) -> None:
        """Note the state of the last kept node; a skipped row has one as well."""
        newest = round.accepted.path.gather(1, round.accepted.n_kept.unsqueeze(1) - 1)
        index = newest.unsqueeze(-1).expand(-1, -1, self.states.shape[-1])
        self.states = round.forward.last_hidden.gather(1, index).squeeze(1)
        self.lengths = [n + len(path) for n, path in zip(self.lengths, round.paths)]

    def propose(self, roots: Tensor, plan: Plan) -> Tree:
        """Draft the best `plan.budget[b]` nodes of each row, down to `plan.depth` or as far as there are heads.

        All levels are there at once, so `plan.extend` would end nothing early and is not asked.

        Args:
            roots: [B] int64.
            plan: depth at least 1 to draft at all.

        Returns:
            Trees of at most `max(plan.budget) + 1` nodes.

        Raises:
            ValueError: candidates are drawn, and the plan would let them decide how many there are.
        """
        depth, n = min(plan.depth, self.max_depth), max(plan.budget)
        if depth < 1 or n < 1:
            return root_only(roots)
        logits = self.head.logits(self.head.ahead(self.states)[:, :depth], self.target.unembed)
        if self.widths:
            return self._draw(roots, logits, plan)
        scores = self._scored(logits)
        if self.shape is not None:
            return self._fill(self.shape.cut(n, depth), roots, scores, plan.budget)
        best = scores.topk(min(self.width, n), dim=-1)
        return best_products(roots, best.indices, best.values, plan.budget, plan.prune is not None)

    def _positions(self, depth: int) -> Tensor:
        """[B, depth] int64, indices of the drafted tokens in their sequences."""
        lengths = upload(self.lengths, self.states.device).unsqueeze(1)
        return lengths + torch.arange(1, depth + 1, device=lengths.device)

    def _scored(self, logits: Tensor) -> Tensor:
        """Log-probability [B, K, V] that the target will choose each token, as `PairDrafter` has it."""
        if self.sampler is None:
            return logits.log_softmax(-1)
        positions, V = self._positions(logits.shape[1]), logits.shape[-1]
        return noisy_scores(logits, self.sampler, self.keys, positions, self.noise_share, None, V)

    def _fill(self, shape: StaticTree, roots: Tensor, scores: Tensor, budget: Sequence[int]) -> Tree:
        """Trees of one shape, no deeper than there are scores, whose nodes are candidates of given ranks."""
        best = scores.topk(shape.n_ranks, dim=-1).indices
        drafted = best[:, shape.depths[1:] - 1, shape.ranks[1:]]
        return shape.trees(torch.cat([roots.unsqueeze(1), drafted], 1), budget)

    def _draw(self, roots: Tensor, logits: Tensor, plan: Plan) -> Tree:
        """Trees of one shape whose candidates are drawn from the heads' distributions, siblings without replacement."""
        assert self.sampler is not None
        widths, counts = drawn_levels(self.widths, plan, logits.shape[1])
        weights = self.sampler.weights(logits[:, : len(widths)])
        noise = gumbel_noise(
            self.sampler.seed, self.keys, self._positions(len(widths)), weights.shape[-1], weights.dtype, DRAFT_STREAM
        )
        # The best of log q + Gumbel noise, in order, are draws without replacement (arXiv 1903.06059).
        drawn, each = (weights + noise).topk(max(widths), dim=-1).indices, weights.softmax(-1)
        tokens, chances = [roots.unsqueeze(1)], []
        for level, (width, above) in enumerate(zip(widths, counts)):
            tokens.append(drawn[:, level, :width].repeat(1, above))
            chances.append(each[:, level : level + 1].expand(-1, above, -1))
        return drawn_trees(tokens, chances, widths, plan.budget)
