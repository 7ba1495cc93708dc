"""EAGLE-3: a one-layer autoregressive head on three intermediate states of the target, with a vocabulary of its own.

The head reads pairs (a_i, e(x_{i+1})): the target's states after a low, a middle and a high layer, and the embedding of
the token that followed (at image positions the projected image feature). Its state s_i = W_fc a_i is the residual
stream of one decoder layer whose attention reads [e; s]. What leaves that layer is the next draft step's state as it
is, past W_fc; RMSNorm and W_d make of it the logits over the draft vocabulary.

A draft vocabulary of V' < V tokens is the most frequent ones of the training answers. As in the paper the target's
distribution is restricted to it and renormalised for the loss, and a position whose most likely token lies outside has
no loss; counted as acceptance it is a miss. The loss is divided by all positions, covered or not (`_unrolled.py` says
why): a smaller vocabulary then weighs less, it does not make the others weigh more.

Source: EAGLE-3 (arXiv 2503.01840). Deviations, on purpose: W_d starts as the target's own rows; stop tokens, digits and
punctuation are always in the draft vocabulary and the image placeholder never is; what it sees of images and which
positions it counts are settings (`_prefix.py`); and those of the training objective (`_unrolled.py`).
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmspec.heads._prefix import check_inputs
from mmspec.heads._unembedding import Unembedding
from mmspec.heads._unrolled import UnrolledHead
from mmspec.losses import Aims, LossConfig, vocabulary_losses
from mmspec.nn import DecoderBlock, RMSNorm, RotaryTable
from mmspec.types import Features, Forward, InputError, Target, TargetShape, Unembed

N_TAPS = 3


@dataclass(frozen=True)
class Config:
    """Shape of the head; 0 means "as the target".

    Args:
        hidden_size, vocab_size: the target's own; checked when the head is loaded.
        draft_vocab_size: V', tokens that the head can draft; 0 is all of the target's.
        taps: three indices into the target's hidden_states (0 the embeddings, k what leaves the k-th layer); empty is
            (2, L / 2, L - 3), and the three below the last in a target of fewer than 7 layers L.
        intermediate_size, n_heads, n_kv_heads, head_dim: of the block.
        rope_theta: base of the rotary positions.
        rms_eps: of the norms.
        image_input, rope: see `mmspec.heads._prefix`.
    """

    image_inputs: ClassVar[tuple[str, ...]] = ("embeds", "aux", "none")
    """Values of `image_input` that the head knows."""

    hidden_size: int = 0
    vocab_size: int = 0
    draft_vocab_size: int = 0
    taps: tuple[int, ...] = ()
    intermediate_size: int = 0
    n_heads: int = 0
    n_kv_heads: int = 0
    head_dim: int = 0
    rope_theta: float = 10000.0
    rms_eps: float = 0.0
    image_input: str = "embeds"
    rope: str = "1d"

    def __post_init__(self) -> None:
        check_inputs("eagle3", self.image_input, self.image_inputs, self.rope)
        if self.taps and (len(self.taps) != N_TAPS or len(set(self.taps)) != N_TAPS):
            raise ValueError(f"head.taps must be {N_TAPS} different indices, or empty, got {list(self.taps)}")
        if self.draft_vocab_size < 0:
            raise ValueError(f"head.draft_vocab_size must be at least 0 (all tokens), got {self.draft_vocab_size}")

    def resolve(self, shape: TargetShape) -> Config:
        """Fill in what was left open from the target's shape.

        Raises:
            InputError: the target has no such hidden states, or fewer tokens.
        """
        n, taps = shape.n_layers, self.taps
        if not taps:
            taps = (2, n // 2, n - 3) if n >= 7 else (n - 3, n - 2, n - 1)
        # The last hidden state is the normed one for some libraries and not for others: none is left to guess.
        if not all(0 <= tap < n for tap in taps):
            raise InputError(f"head.taps={list(taps)} must lie in 0..{n - 1}: the target has {n} layers")
        if self.draft_vocab_size > shape.vocab_size:
            raise InputError(
                f"head.draft_vocab_size={self.draft_vocab_size} is more than the target's {shape.vocab_size} tokens"
            )
        return replace(
            self,
            hidden_size=self.hidden_size or shape.hidden_size,
            vocab_size=self.vocab_size or shape.vocab_size,
            draft_vocab_size=self.draft_vocab_size or shape.vocab_size,
            taps=taps,
            intermediate_size=self.intermediate_size or shape.intermediate_size,
            n_heads=self.n_heads or shape.n_heads,
            n_kv_heads=self.n_kv_heads or shape.n_kv_heads,
            head_dim=self.head_dim or shape.head_dim,
            rms_eps=self.rms_eps or shape.rms_eps,
        )


class Head(UnrolledHead):
    """The EAGLE-3 head.

    Args:
        config: a resolved Config.
        loss: weights of the objective and number of unrolled steps; not needed for drafting.

    Raises:
        InputError: the loss asks for states of the target, which this head does not predict.
    """

    def __init__(self, config: Config, loss: LossConfig | None = None) -> None:
        super().__init__(config, loss)
        if not config.hidden_size or not config.taps:
            raise ValueError("eagle3.Config is not resolved; call config.resolve(target.shape) first")
        if self.loss.regression:
            raise InputError(f"loss.regression={self.loss.regression}: eagle3 predicts no states of the target; use 0")
        width = config.hidden_size
        self.taps = config.taps
        self.fc = nn.Linear(N_TAPS * width, width, bias=False)
        self.block = DecoderBlock(
            width,
            config.n_heads,
            config.n_kv_heads,
            config.head_dim,
            config.intermediate_size,
            config.rms_eps,
            input_norm=True,
            paired=True,
        )
        self.norm = RMSNorm(width, config.rms_eps)
        self.lm_head = Unembedding(width, config.draft_vocab_size)
        self.rotary = RotaryTable(config.head_dim, config.rope_theta)
        if config.draft_vocab_size < config.vocab_size:
            self.draft_ids = torch.arange(config.draft_vocab_size)

    @property
    def feature_size(self) -> int:
        return N_TAPS * int(self.config.hidden_size)

    def read(self, outputs: Forward | Features) -> Tensor:
        """a: the tapped states side by side, low to high as in the configuration, not normed."""
        return torch.cat([outputs.hidden[tap] for tap in self.taps], -1)

    def enter(self, features: Tensor) -> Tensor:
        """s = W_fc a."""
        return self.fc(features)

    def pair(self, embeds: Tensor, states: Tensor, note: Tensor | None = None) -> Tensor:
        return torch.cat([embeds, states], -1)

    def logits(self, states: Tensor, unembed: Unembed) -> Tensor:
        """W_d RMSNorm(g)."""
        return self.lm_head(self.norm(states))

    def score(self, states: Tensor, aims: Aims, unembed: Unembed) -> tuple[Tensor, Tensor, Tensor]:
        def losses(normed: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return vocabulary_losses(normed, aims, unembed, self.loss, weight, self.draft_ids)

        return self.lm_head(self.norm(states), losses)

    @torch.no_grad()
    def prepare(self, target: Target, answer_counts: Callable[[], Tensor]) -> None:
        """Choose the draft vocabulary, and start W_d as the target's own rows."""
        super().prepare(target, answer_counts)
        ids = torch.arange(self.config.vocab_size)
        if self.draft_ids is not None:
            ids = draft_vocabulary(answer_counts(), self.config.draft_vocab_size, target)
            self.draft_ids.copy_(ids)
        self.lm_head.start_from(target, ids)


def draft_vocabulary(counts: Tensor, size: int, target: Target) -> Tensor:
    """The target's ids that a head of a smaller vocabulary can draft.

    Args:
        counts: [V], how often each token is to be predicted.
        size: V' < V.
        target: tells its stop ids, its image placeholder and what a token says.

    Returns:
        [V'] int64, ascending: stop tokens, single ASCII digits and punctuation marks (numbers and lists need them
        whatever the training data counts), then the most frequent ones; never the image placeholder.

    Raises:
        InputError: the size leaves no room for those that are always in.
    """
    signs = set(string.digits + string.punctuation)
    always = set(target.stop_ids) | {i for i in range(len(counts)) if target.decode([i]).strip() in signs}
    always.discard(target.image_token_id)
    if size < len(always):
        raise InputError(
            f"head.draft_vocab_size={size} is too small: {len(always)} stop tokens, digits and punctuation marks are "
            "always in"
        )
    wanted = counts.double().cpu().clone()
    wanted[sorted(always)] = torch.inf
    wanted[target.image_token_id] = -torch.inf
    return wanted.argsort(descending=True, stable=True)[:size].sort().values
