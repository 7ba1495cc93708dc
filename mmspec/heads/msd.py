"""MSD: EAGLE with text and image decoupled where they enter.

A text pair enters as EAGLE's, W_fc [e(x_{i+1}); f_i] + b. A visual pair, one whose next token is an image placeholder,
enters as the projected image feature itself: without W_fc, which so learns of language alone, and without the target's
state. The pair behind an image is a text pair: it has the target's state at the image's last token. There are no
weights beyond EAGLE's.

Its recipe trains on text first and then on more and more images (`data.text_first`).

Source: MSD (arXiv 2505.14260). Deviations, on purpose: those of `eagle.py`, one block for all targets (no biases, an
input norm where the recipe says so), and the true positions and image tokens of every target; the reference gave
Qwen's images positions of text, forgot the row's offset while drafting, and let tree nodes see their siblings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from mmspec.heads._eagle import EagleConfig, EagleHead
from mmspec.heads._prefix import Pairs, Prefix


@dataclass(frozen=True)
class Config(EagleConfig):
    """See EagleConfig."""

    kind: ClassVar[str] = "msd"
    image_inputs: ClassVar[tuple[str, ...]] = ("embeds",)


class Head(EagleHead):
    """The MSD head."""

    @property
    def marks_images(self) -> bool:
        return True

    def prefix(self, pairs: Pairs) -> Prefix:
        prefix = super().prefix(pairs)
        return replace(prefix, inputs=torch.where(pairs.visual_here(), pairs.embeds, prefix.inputs))
