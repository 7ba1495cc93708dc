"""Pure per-position losses of draft heads, and their chunked sum over answer positions.

Each loss maps [M, ...] to [M] and reduces nothing: sums and counts are formed once, in `Objective`, so that ranks and
micro-batches add up to the same number however the batch was split.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmspec.types import Unembed


@dataclass(frozen=True)
class LossConfig:
    """Weights of the objective; a weight of 0 leaves the term out.

    Args:
        regression: SmoothL1 between predicted and true last hidden state (EAGLE).
        soft_ce: cross-entropy against the target's distribution (EAGLE, EAGLE-3).
        total_variation: sum of |q - p|: 2 (1 - acceptance probability of a sampled token).
        steps: unrolled draft steps; step s sees s of its own predictions, as drafting does.
        step_decay: weight of step s is step_decay ** s.
        chunk: predictions whose [chunk, V] logits exist at a time.
    """

    regression: float = 0.0
    soft_ce: float = 1.0
    total_variation: float = 0.0
    steps: int = 3
    step_decay: float = 0.8
    chunk: int = 1024

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"loss.steps must be at least 1, got {self.steps}")
        if self.chunk < 1:
            raise ValueError(f"loss.chunk must be at least 1, got {self.chunk}")
        if self.regression + self.soft_ce + self.total_variation <= 0:
            raise ValueError("loss: every weight is 0; set soft_ce, regression or total_variation above 0")


def smooth_l1(prediction: Tensor, truth: Tensor) -> Tensor:
    """Mean over the width of SmoothL1 (beta 1): [M, D], [M, D] -> [M]. Source: EAGLE, L_reg."""
    return F.smooth_l1_loss(prediction, truth, reduction="none").mean(-1)


def soft_cross_entropy(logits: Tensor, p: Tensor) -> Tensor:
    """-sum_x p(x) log q(x) of draft logits and the target's distribution: [M, V], [M, V] -> [M].

    Source: EAGLE, L_cls; EAGLE-3.
    """
    return -(p * logits.log_softmax(-1)).sum(-1)


def total_variation(logits: Tensor, p: Tensor) -> Tensor:
    """sum_x |q(x) - p(x)| of draft logits and the target's distribution: [M, V], [M, V] -> [M].

    Source: ViSpec stage 2, L_tv.
    """
    return (logits.softmax(-1) - p).abs().sum(-1)


def valid_pairs(answer: Tensor) -> int:
    """From how many positions of a conversation a reply goes on: what sums of the loss are divided by.

    Args:
        answer: [L] int64 reply numbers, 0 outside replies.

    Returns:
        Positions i whose tokens i + 1 (read by the head) and i + 2 (predicted) are of the same reply.
    """
    return int(((answer[1:-1] > 0) & (answer[1:-1] == answer[2:])).sum())


@dataclass(frozen=True)
class Aims:
    """What M predictions aim at; several (those of different draft steps) may aim at one position of the target.

    Args:
        truth: [P, D] the target's last hidden states at those positions.
        of: [M] int64, ascending: the row of `truth` that each prediction estimates.
        weight: [M], factors of the losses.
    """

    truth: Tensor
    of: Tensor
    weight: Tensor


def vocabulary_losses(
    predicted: Tensor,
    aims: Aims,
    unembed: Unembed,
    config: LossConfig,
    weight: Tensor | None = None,
    draft_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss of predictions, in chunks: no [M, V] tensor outlives its chunk.

    The gradients are formed chunk by chunk along with the sum, as the logits of a chunk are there anyway: the backward
    pass computes none a second time. They are written out (`_LogitLosses`) rather than recorded: what autograd keeps of
    a softmax would be several times the logits. The target's distribution is computed once for all predictions that
    aim at it.

    Args:
        predicted: [M, D] draft states; gradient flows here.
        unembed: the target's, frozen: of `aims.truth`, and of `predicted` where the head has no `weight`.
        weight: [V', D] of the head's own unembedding; trained, unless it asks for no gradient.
        draft_ids: [V'] int64, ascending, where that has a vocabulary of its own: the target's distribution is
            restricted to it and renormalised, and predictions whose target argmax lies outside have no loss.

    Returns:
        The weighted sum, a scalar; [M] bool, draft and target have the same argmax; [M] bool, the target's argmax is in
        the draft vocabulary.
    """
    grows = torch.is_grad_enabled()
    trained = weight is not None and weight.requires_grad
    leaves = [predicted, weight] if weight is not None and trained else [predicted]
    gradients = [torch.zeros_like(leaf) for leaf in leaves] if grows else []
    own = None if weight is None else weight.detach()
    total = torch.zeros((), dtype=_work(predicted[:0]).dtype, device=predicted.device)
    hits, covers = [], []
    size, P = max(config.chunk // config.steps, 1), len(aims.truth)
    starts = torch.arange(0, P + size, size, device=predicted.device)
    for index, (low, high) in enumerate(pairwise(torch.searchsorted(aims.of, starts).tolist())):
        truth, of = aims.truth[index * size : (index + 1) * size], aims.of[low:high] - index * size
        with torch.no_grad():
            p, best, covered = _restricted(_work(unembed(truth)), draft_ids)
        scale = aims.weight[low:high].to(p.dtype) * covered[of]
        g = predicted[low:high].detach().requires_grad_(grows)
        with torch.set_grad_enabled(grows and own is None):
            logits = unembed(g) if own is None else F.linear(g, own)
        found = _LogitLosses(logits.detach(), p, of, scale, config, grows)
        total = total + found.loss
        covers.append(covered[of])
        hits.append(covers[-1] & (found.best == best[of]))
        if grows and own is None:
            gradients[0][low:high] = torch.autograd.grad(logits, g, found.gradient)[0]
        elif grows and own is not None:
            torch.mm(found.gradient, own, out=gradients[0][low:high])
            if trained:
                gradients[1].addmm_(found.gradient.T, g.detach())
        del logits, found  # or the next chunk's would stand beside them
        if config.regression:
            close = config.regression * (smooth_l1(_work(g), _work(truth)[of]) * scale).sum()
            total = total + close.detach()
            if grows:
                gradients[0][low:high] += torch.autograd.grad(close, g)[0]
    none = aims.of.new_zeros(0, dtype=torch.bool)
    if grows:
        total = _Known.apply(total, gradients, *leaves)
    return total, torch.cat([none, *hits]), torch.cat([none, *covers])


class _LogitLosses:
    """Weighted `soft_cross_entropy` and `total_variation` of one chunk, and their gradient for the logits.

    With q the draft's distribution: soft_cross_entropy has q - p, total_variation has q (s - <q, s>), s = sign(q - p).

    Args:
        logits: [C, V].
        p: [P, V] the target's distributions; of: [C], the row that each prediction aims at; scale: [C].
        grows: whether the gradient is wanted.

    Attributes:
        loss: the weighted sum; best: [C], argmax; gradient: [C, V] in the dtype of the logits.
    """

    def __init__(self, logits: Tensor, p: Tensor, of: Tensor, scale: Tensor, config: LossConfig, grows: bool) -> None:
        dtype, self.best = logits.dtype, logits.argmax(-1)
        log_q, p = _work(logits).log_softmax(-1), p[of]
        # One contraction, without the [C, V] product in between.
        self.loss = -config.soft_ce * torch.einsum("cv,cv,c->", p, log_q, scale)
        q = log_q.exp_()
        if config.total_variation:
            apart = q - p
            self.loss = self.loss + config.total_variation * (apart.abs().sum(-1) * scale).sum()
        if not grows:
            return
        self.gradient = q - p if config.total_variation else q.sub_(p)
        if config.total_variation:
            side = apart.sign_()
            side -= torch.einsum("cv,cv->c", q, side).unsqueeze(1)
            self.gradient.mul_(config.soft_ce).add_(side.mul_(q), alpha=config.total_variation)
        else:
            scale = scale * config.soft_ce
        self.gradient = self.gradient.mul_(scale.unsqueeze(1)).to(dtype)


def _work(x: Tensor) -> Tensor:
    """At least fp32: sums over a vocabulary need it."""
    return x if x.dtype == torch.float64 else x.float()


def _restricted(logits: Tensor, draft_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The target's distribution [P, V'] over the draft vocabulary, its best index there, and whether that is its best
    token of all."""
    best = logits.argmax(-1)
    if draft_ids is None:
        return logits.softmax(-1), best, torch.ones_like(best, dtype=torch.bool)
    logits = logits[:, draft_ids]
    inside = logits.argmax(-1)
    return logits.softmax(-1), inside, draft_ids[inside] == best


class _Known(torch.autograd.Function):
    """A scalar whose gradients for some tensors are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(known * upstream[0].to(known.dtype) for known in ctx.saved_tensors)
