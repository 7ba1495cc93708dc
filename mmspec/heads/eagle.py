"""EAGLE: a one-layer autoregressive head on the target's last hidden state, drafting with the dynamic tree of EAGLE-2.

The head reads pairs (f_i, e(x_{i+1})): the target's state and the embedding of the token that followed (at image
positions the projected image feature), and predicts f_{i+1}, whose frozen unembedding gives x_{i+2}. A draft step feeds
the head its own prediction in place of f.

Source: EAGLE (arXiv 2401.15077), EAGLE-2 (arXiv 2406.16858). Deviations, on purpose: trained with the unrolled
attention of EAGLE-3's training-time test instead of noise on f; what it sees of images and which positions it counts
are settings (`_prefix.py`); and those of the training objective (`_unrolled.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmspec.heads._eagle import EagleConfig, EagleHead


@dataclass(frozen=True)
class Config(EagleConfig):
    """See EagleConfig."""

    kind: ClassVar[str] = "eagle"
    image_inputs: ClassVar[tuple[str, ...]] = ("embeds", "aux", "none")


class Head(EagleHead):
    """The EAGLE head."""
