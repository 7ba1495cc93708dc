"""EAGLE: a one-layer autoregressive head on the target's last hidden state, drafting with the dynamic tree of EAGLE-2.

The head reads pairs (f_i, e(x_{i+1})): the target's state and the embedding of the token that followed (at image
positions the projected image feature), and predicts f_{i+1}, whose frozen unembedding gives x_{i+2}. A draft step feeds
the head its own prediction in place of f.

Source: EAGLE (arXiv 2401.15077), EAGLE-2 (arXiv 2406.16858). Deviations, on purpose: trained with the unrolled
attention of EAGLE-3's training-time test instead of noise on f; positions are 1-D pair indices whatever the target
uses; and those of the training objective (`_unrolled.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mmspec.heads._unrolled import UnrolledHead
from mmspec.losses import LossConfig
from mmspec.nn import DecoderBlock, RotaryTable
from mmspec.types import Features, Forward, TargetShape


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


class Head(UnrolledHead):
    """The EAGLE head.

    Args:
        config: a resolved Config.
        loss: weights of the objective and number of unrolled steps; not needed for drafting.
    """

    def __init__(self, config: Config, loss: LossConfig | None = None) -> None:
        super().__init__(config, loss)
        if not config.hidden_size:
            raise ValueError("eagle.Config has hidden_size 0; call config.resolve(target.shape) first")
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

    def read(self, outputs: Forward | Features) -> Tensor:
        return outputs.last_hidden

    def pair(self, embeds: Tensor, states: Tensor) -> Tensor:
        """Block input u = W_fc [e; f] + b; both [..., D]."""
        return self.fc(torch.cat([embeds, states], -1))
