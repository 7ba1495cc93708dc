"""EAGLE: a one-layer autoregressive head on the target's last hidden state, drafting with the dynamic tree of EAGLE-2.

The head reads pairs (f_i, e(x_{i+1})): the target's state and the embedding of the token that followed (at image
positions the projected image feature), and predicts f_{i+1}, whose frozen unembedding gives x_{i+2}. A draft step feeds
the head its own prediction in place of f.

Source: EAGLE (arXiv 2401.15077), EAGLE-2 (arXiv 2406.16858). Deviations, on purpose: trained with the unrolled
attention of EAGLE-3's training-time test instead of noise on f; the first reply pair (last prompt state, first reply
token), which is the very first draft input, is in the loss; positions are 1-D pair indices whatever the target uses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mmspec.heads._drafter import PairHead
from mmspec.losses import LossConfig, vocabulary_losses
from mmspec.nn import DecoderBlock, RotaryTable, UnrolledAttention
from mmspec.types import Features, Forward, Objective, TargetShape, Unembed


@dataclass(frozen=True)
class Config:
    """Shape of the head; 0 means "as the target".

    Args:
        hidden_size, vocab_size: the target's own; checked when the head is loaded.
        intermediate_size, n_heads, n_kv_heads, head_dim: of the block.
        rope_theta: base of the 1-D rotary positions over pair indices.
        rms_eps: of the norms.
        input_norm: RMSNorm before attention (the papers' block has none).
        image_input: what the head sees at image positions; `embeds` is the projected image feature.
        rope: `1d`, pair indices.
    """

    hidden_size: int = 0
    vocab_size: int = 0
    intermediate_size: int = 0
    n_heads: int = 0
    n_kv_heads: int = 0
    head_dim: int = 0
    rope_theta: float = 10000.0
    rms_eps: float = 0.0
    input_norm: bool = False
    image_input: str = "embeds"
    rope: str = "1d"

    def __post_init__(self) -> None:
        if self.image_input != "embeds":
            raise ValueError(f"head.image_input: the eagle head knows only 'embeds', got '{self.image_input}'")
        if self.rope != "1d":
            raise ValueError(f"head.rope: the eagle head knows only '1d', got '{self.rope}'")

    def resolve(self, shape: TargetShape) -> Config:
        """Fill in what was left at 0 from the target's shape."""
        return replace(
            self,
            hidden_size=self.hidden_size or shape.hidden_size,
            vocab_size=self.vocab_size or shape.vocab_size,
            intermediate_size=self.intermediate_size or shape.intermediate_size,
            n_heads=self.n_heads or shape.n_heads,
            n_kv_heads=self.n_kv_heads or shape.n_kv_heads,
            head_dim=self.head_dim or shape.head_dim,
            rms_eps=self.rms_eps or shape.rms_eps,
        )


class Head(PairHead):
    """The EAGLE head.

    Args:
        config: a resolved Config.
        loss: weights of the objective and number of unrolled steps; not needed for drafting.
    """

    def __init__(self, config: Config, loss: LossConfig | None = None) -> None:
        super().__init__()
        if not config.hidden_size:
            raise ValueError("eagle.Config has hidden_size 0; call config.resolve(target.shape) first")
        self.config = config
        self.loss = loss or LossConfig()
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.block = DecoderBlock(
            config.hidden_size,
            config.n_heads,
            config.n_kv_heads,
            config.head_dim,
            config.intermediate_size,
            config.rms_eps,
            config.input_norm,
        )
        self.rotary = RotaryTable(config.head_dim, config.rope_theta)

    def read(self, forward: Forward) -> Tensor:
        return forward.last_hidden

    def pair(self, embeds: Tensor, states: Tensor) -> Tensor:
        """Block input u = W_fc [e; f] + b; both [..., D]."""
        return self.fc(torch.cat([embeds, states], -1))

    def unroll(self, features: Features, steps: int) -> list[Tensor]:
        """Block outputs of each simulated draft step.

        Args:
            features: a teacher-forced batch.
            steps: S.

        Returns:
            S tensors [B, T - 2, D]; entry s at index t estimates f_{t+1+s}, having seen s of its own predictions.
            Indices whose inputs lie beyond the sequence hold repeats of the last one; the mask leaves them out.
        """
        T = features.last_hidden.shape[1]
        index = torch.arange(T - 2, device=features.last_hidden.device)
        states, attention, outputs = features.last_hidden[:, : T - 2], UnrolledAttention(), []
        for step in range(steps):
            embeds = features.embeds[:, (index + 1 + step).clamp_max(T - 1)]
            rope = self.rotary.at((index + step).unsqueeze(0), T + steps, states.dtype)
            states = self.block(self.pair(embeds, states), rope, attention)
            outputs.append(states)
        return outputs

    def forward(self, features: Features, unembed: Unembed) -> Objective:
        """Objective over answer tokens.

        The shift contract: at step s the input token x_{t+1+s} and the predicted token x_{t+2+s}, and all drafted ones
        between, belong to the same reply, so t runs from the last prompt token of the turn on.
        """
        answer, T = features.answer, features.input_ids.shape[1]
        # The parameters' dtype, not the target's: the two may differ (bf16 target, fp32 master weights).
        dtype = self.fc.weight.dtype
        features = _cast(features, dtype)
        index = torch.arange(T - 2, device=answer.device)
        reply = answer[:, 1 : T - 1]
        valid = joint = reply > 0
        total = features.last_hidden.new_zeros((), dtype=torch.float32)
        sums: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        n_valid = tau = total
        for step, states in enumerate(self.unroll(features, self.loss.steps)):
            ahead = (index + 2 + step).clamp_max(T - 1)
            valid = valid & (answer[:, ahead] == reply) & (index + 2 + step < T)
            if step == 0:
                n_valid = valid.sum()
                joint, tau = valid, n_valid.float()
            truth = features.last_hidden[:, (index + 1 + step).clamp_max(T - 1)]
            loss, hit = vocabulary_losses(states[valid], truth[valid], unembed, self.loss)
            total = total + self.loss.step_decay**step * loss
            hits = torch.zeros_like(valid)
            hits[valid] = hit
            offered = joint & valid
            joint = offered & hits
            sums[f"pos_{step + 1}"], counts[f"pos_{step + 1}"] = joint.sum().float(), offered.sum().float()
            tau = tau + joint.sum()
        sums |= {"tau_sim": tau, "top1": sums["pos_1"], "loss": total.detach()}
        counts |= {name: n_valid.float() for name in ("tau_sim", "top1", "loss")}
        return Objective(total, n_valid, sums, counts)


def _cast(features: Features, dtype: torch.dtype) -> Features:
    return replace(features, last_hidden=features.last_hidden.to(dtype), embeds=features.embeds.to(dtype))
