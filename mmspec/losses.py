"""Pure per-position losses of draft heads, and the chunked sum over answer positions.

Each loss maps [M, ...] to [M] and reduces nothing: sums and counts are formed once, in `Objective`, so that ranks and
micro-batches add up to the same number however the batch was split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class LossConfig:
    """Weights of the objective; a weight of 0 leaves the term out.

    Args:
        regression: SmoothL1 between predicted and true last hidden state (EAGLE).
        soft_ce: cross-entropy against the target's distribution (EAGLE, EAGLE-3).
        total_variation: sum of |q - p|: 2 (1 - acceptance probability of a sampled token).
        steps: unrolled draft steps; step s sees s of its own predictions, as drafting does.
        step_decay: weight of step s is step_decay ** s.
        chunk: answer positions whose [chunk, V] logits exist at a time.
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


def soft_cross_entropy(draft_logits: Tensor, target_logits: Tensor) -> Tensor:
    """-sum_x p(x) log q(x): [M, V], [M, V] -> [M]. Source: EAGLE, L_cls; EAGLE-3."""
    return -(target_logits.softmax(-1) * draft_logits.log_softmax(-1)).sum(-1)


def total_variation(draft_logits: Tensor, target_logits: Tensor) -> Tensor:
    """sum_x |q(x) - p(x)|: [M, V], [M, V] -> [M]. Source: ViSpec stage 2, L_tv."""
    return (draft_logits.softmax(-1) - target_logits.softmax(-1)).abs().sum(-1)


def vocabulary_losses(
    predicted: Tensor, truth: Tensor, unembed: Callable[[Tensor], Tensor], config: LossConfig
) -> tuple[Tensor, Tensor]:
    """Summed loss over positions and which argmax agree, in chunks: no [M, V] tensor outlives its chunk.

    Args:
        predicted: [M, D] draft states, gradient flows here.
        truth: [M, D] the target's last hidden states they estimate.
        unembed: frozen, shared.

    Returns:
        Scalar sum, and [M] bool: draft and target have the same argmax.
    """

    def chunk_loss(g: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            target_logits = unembed(f).float()
        draft_logits = unembed(g).float()
        loss = draft_logits.new_zeros(())
        if config.soft_ce:
            loss = loss + config.soft_ce * soft_cross_entropy(draft_logits, target_logits).sum()
        if config.total_variation:
            loss = loss + config.total_variation * total_variation(draft_logits, target_logits).sum()
        if config.regression:
            loss = loss + config.regression * smooth_l1(g.float(), f.float()).sum()
        return loss, draft_logits.argmax(-1) == target_logits.argmax(-1)

    total = predicted.new_zeros((), dtype=torch.float32)
    hits: list[Tensor] = []
    many = predicted.shape[0] > config.chunk
    for g, f in zip(predicted.split(config.chunk), truth.split(config.chunk)):
        # Recompute a chunk's logits in the backward pass instead of keeping them, when there is more than one.
        loss, hit = checkpoint(chunk_loss, g, f, use_reentrant=False) if many else chunk_loss(g, f)
        total = total + loss
        hits.append(hit)
    return total, torch.cat(hits) if hits else torch.zeros(0, dtype=torch.bool, device=predicted.device)
