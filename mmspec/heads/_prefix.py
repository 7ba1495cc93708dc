"""What a head's block reads of the tokens that the target has been through: one rule for training and drafting.

A pair is visual when its next token is an image placeholder. `image_input` says what becomes of visual pairs:

  embeds      all are kept: the target's state and the projected image feature.
  aux         all are kept: the target's state and the embedding of the placeholder, as engines draft that know no
              image features (vLLM, SGLang). The image is seen through the target's states alone.
  none        visual pairs are left out. The pair behind an image has the target's state at its last placeholder, so
              the head still reads states that have seen the image, but none of it directly.
  compressed  visual pairs are left out but for a few, which a head makes of the image itself.

Text keeps its place in the whole sequence whatever is left out, so the text of one conversation stands at the same
positions for every head. `rope` says which positions those are:

  1d          pair i stands at i.
  mrope       pair i stands where token i does for the target, on three axes; the last visual token of an image, whose
              pair is a text pair, right before the text that follows it. So text pairs all have three equal positions
              that count up, and only visual pairs differ. For a target that counts tokens it is 1d.

Adjacent placeholders are one image: between two images there is text (Qwen's markers, a newline).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROPES = ("1d", "mrope")


def check_inputs(kind: str, image_input: str, known: Sequence[str], rope: str) -> None:
    """Checks two settings that every head has.

    Raises:
        ValueError: a value that the head does not know.
    """
    for key, value, values in (("image_input", image_input, known), ("rope", rope, ROPES)):
        if value not in values:
            raise ValueError(f"head.{key}={value!r}: the {kind} head knows {', '.join(values)}")


@dataclass(frozen=True)
class Pairs:
    """Pairs of conversations, one behind another: N in all.

    Args:
        embeds: [N, D] input embeddings of the next tokens, image features merged in.
        features: [N, W], what the head reads of the target.
        index: [N] int64, of each pair in its conversation; None: one conversation, 0..N-1.
        bound: above all positions.
        visual: [N] bool, on the host when drafting, on the device in training; None where the head does not ask.
        axes: [3, N] int64, see `pair_axes`; None where the head does not ask.
        starts: the first pair of each conversation.
    """

    embeds: Tensor
    features: Tensor
    index: Tensor | None
    bound: int
    visual: Tensor | None = None
    axes: Tensor | None = None
    starts: tuple[int, ...] = (0,)

    def only(self, kept: Tensor) -> Pairs:
        """Without some of them: kept is [N] bool on the host."""
        where = kept.nonzero().squeeze(1)
        chosen = where.to(self.embeds.device)
        before = torch.cat([torch.zeros(1, dtype=torch.long), kept.cumsum(0)]).tolist()
        return Pairs(
            self.embeds[chosen],
            self.features[chosen],
            chosen if self.index is None else self.index[chosen],
            self.bound,
            None if self.visual is None else self.visual[where.to(self.visual.device)],
            None if self.axes is None else self.axes[:, chosen],
            tuple(before[start] for start in self.starts),
        )

    def visual_here(self) -> Tensor:
        """`visual` on the device, [N, 1]."""
        assert self.visual is not None
        return self.visual.to(self.embeds.device).unsqueeze(1)


@dataclass(frozen=True)
class Prefix:
    """What the block reads: M of N pairs.

    Args:
        inputs: [1, M, U], the block's inputs.
        rope: cos, sin of their positions, [1, 1, M, Dh].
        kept: [N] bool on the host, which pairs they stand for; None: all.
        notes: [1, M, D], what the head keeps in mind besides the state (see `PairHead.pair`), or None.
        latest: [1, 1, D], the note of what comes behind them.
    """

    inputs: Tensor
    rope: tuple[Tensor, Tensor]
    kept: Tensor | None = None
    notes: Tensor | None = None
    latest: Tensor | None = None


def pair_axes(axes: Tensor, visual: Tensor) -> Tensor:
    """Positions of the pairs of tokens, [3, .., T - 1].

    Args:
        axes: [3, .., T] int64, the target's, in each conversation.
        visual: [.., T] bool.
    """
    leaves = visual[..., :-1] & ~visual[..., 1:]
    return torch.where(leaves, axes[..., 1:] - 1, axes[..., :-1])


def image_spans(visual: Tensor) -> list[tuple[int, int]]:
    """First and last (excluded) pair of each image.

    Args:
        visual: [N] bool on the host.
    """
    edges = torch.diff(visual.long(), prepend=torch.zeros(1).long(), append=torch.zeros(1).long())
    return list(zip((edges > 0).nonzero().flatten().tolist(), (edges < 0).nonzero().flatten().tolist()))
