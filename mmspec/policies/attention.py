"""The paper's ViSkip, decided before drafting: a row whose target looks at the image is skipped.

P2 of `eval.policies`. Source: MMSpec (arXiv 2603.14989).
"""

from __future__ import annotations

from dataclasses import dataclass

from mmspec.policies._parts import Parts
from mmspec.policy import AttentionPolicy


@dataclass(frozen=True)
class Config:
    """Settings.

    Args:
        threshold: share of the attention on image positions from which on a row is skipped.
        layer: decoder layer, 0-based; -1 is the last.
    """

    threshold: float = 0.35
    layer: int = -1


def make(config: Config, parts: Parts) -> AttentionPolicy:
    """The policy of a drafter."""
    return AttentionPolicy(parts.depth, parts.budget, config.threshold, config.layer)
