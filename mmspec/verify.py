"""Verification: how far does the target agree with each tree?

`MatchVerifier` is lossless for any tree whose candidates do not depend on the verification noise: the target's own
choice is drawn at every node, and the child that equals it is followed. What is emitted are target samples, by
construction, so the output equals plain decoding's with the same sampler.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmspec.types import Accepted, Tree


class MatchVerifier:
    """Sample the target at each node, follow the child that matches; greedy is the noiseless case."""

    def accept(self, trees: Tree, scores: Tensor) -> Accepted:
        """Find the accepted path of every row, without a host sync.

        Args:
            trees: draft trees, siblings distinct.
            scores: [B, N, V] from a sampler; their argmax is the target's choice after each node.

        Returns:
            Paths of at most `max_depth + 1` nodes.
        """
        choices = scores.argmax(-1)
        B, N = choices.shape
        if N == 1:
            zeros = torch.zeros((B, 1), dtype=torch.long, device=choices.device)
            return Accepted(zeros, zeros[:, 0] + 1, choices[:, 0])
        matches = trees.tokens == choices.gather(1, trees.parents.clamp_min(0))
        matches &= trees.parents >= 0
        matches[:, 0] = True
        # A node counts when no ancestor-or-self fails; siblings differ, so these nodes form one path from the root.
        accepted = ~(trees.ancestors & ~matches.unsqueeze(1)).any(-1)
        n_kept = accepted.sum(1)
        nodes = torch.arange(N, device=choices.device).expand(B, N)
        path = torch.zeros((B, trees.max_depth + 2), dtype=torch.long, device=choices.device)
        path.scatter_(1, trees.depths.masked_fill(~accepted, trees.max_depth + 1), nodes)
        path = path[:, :-1]
        last = path.gather(1, n_kept.unsqueeze(1) - 1)
        return Accepted(path, n_kept, choices.gather(1, last).squeeze(1))
