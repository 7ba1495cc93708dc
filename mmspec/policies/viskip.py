"""The trained controller, asked before drafting: whether, and how deep.

P7 of `eval.policies`; P5 and P6 with controllers that read less.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmspec.policies._learned import LearnedPolicy
from mmspec.policies._parts import Parts


@dataclass(frozen=True)
class Config:
    """Settings.

    Args:
        bias_rate: of the online correction of each depth's logit; 0: none.
    """

    bias_rate: float = 0.02


def make(config: Config, parts: Parts) -> LearnedPolicy:
    """The policy of a drafter."""
    return LearnedPolicy(parts, refine=False, bias_rate=config.bias_rate)
