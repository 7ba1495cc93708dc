"""EAGLE's network, which MSD and ViSpec share: one projection of embedding and state, and one decoder block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from mmspec.heads._prefix import check_inputs
from mmspec.heads._unrolled import UnrolledHead
from mmspec.losses import LossConfig
from mmspec.nn import DecoderBlock, RotaryTable
from mmspec.types import Features, Forward, TargetShape


@dataclass(frozen=True)
class EagleConfig:
    """Shape of the head; 0 means "as the target".

    Args:
        hidden_size, vocab_size: the target's own; checked when the head is loaded.
        intermediate_size, n_heads, n_kv_heads, head_dim: of the block.
        rope_theta: base of the rotary positions.
        rms_eps: of the norms.
        input_norm: RMSNorm before attention (the papers' block has none).
        image_input, rope: see `mmspec.heads._prefix`.
    """

    kind: ClassVar[str]
    image_inputs: ClassVar[tuple[str, ...]]
    """Values of `image_input` that the head knows."""

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
        check_inputs(self.kind, self.image_input, self.image_inputs, self.rope)

    def resolve(self, shape: TargetShape) -> Self:
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


class EagleHead(UnrolledHead):
    """A head on the target's last hidden state.

    Args:
        config: a resolved EagleConfig.
        loss: weights of the objective and number of unrolled steps; not needed for drafting.
    """

    def __init__(self, config: Any, loss: LossConfig | None = None) -> None:
        super().__init__(config, loss)
        if not config.hidden_size:
            raise ValueError(f"{config.kind}.Config has hidden_size 0; call config.resolve(target.shape) first")
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

    def pair(self, embeds: Tensor, states: Tensor, note: Tensor | None = None) -> Tensor:
        """Block input u = W_fc [e; f] + b; both [..., D]."""
        return self.fc(torch.cat([embeds, states], -1))
