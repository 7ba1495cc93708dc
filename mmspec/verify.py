"""Verification: how far does the target agree with each tree?

`MatchVerifier` is lossless for any tree at all: the target's own choice is drawn at every node, and the child that
equals it is followed. What is emitted are target samples, by construction, so the output equals plain decoding's with
the same sampler, token for token.

`RejectionVerifier` is the classical rule for candidates that were drawn from a known distribution. Its output follows
the target's distribution, and is another text than plain decoding's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmspec.sampling import ACCEPT_STREAM, BONUS_STREAM, KeyedSampler, gumbel_noise, uniform_noise
from mmspec.types import Accepted, Choices, Tree


class MatchVerifier:
    """Sample the target at each node, follow the child that matches; greedy is the noiseless case."""

    def accept(self, trees: Tree, scores: Tensor, choices: Choices | None = None) -> Accepted:
        """Find the accepted path of every row, without a host sync.

        Args:
            trees: draft trees, siblings distinct.
            scores: [B, N, V] from a sampler; their argmax is the target's choice after each node.
            choices: not needed.

        Returns:
            Paths of at most `max_depth + 1` nodes.
        """
        chosen = scores.argmax(-1)
        B, N = chosen.shape
        if N == 1:
            zeros = torch.zeros((B, 1), dtype=torch.long, device=chosen.device)
            return Accepted(zeros, zeros[:, 0] + 1, chosen)
        parents = trees.parents
        missed = trees.tokens != chosen.gather(1, parents.clamp_min(0))
        if not trees.full:
            missed |= parents < 0
        # A node counts unless it or one above it missed; siblings differ, so these nodes form one path from the root,
        # which was chosen before.
        lost, path = (trees.ancestors & missed.unsqueeze(1))[..., 1:].any(-1).sort(dim=1, stable=True)
        # Nodes are in topological order: the accepted ones, moved to the front, are the path.
        path = path[:, : trees.max_depth + 1]
        return Accepted(path, N - lost.sum(1), chosen.gather(1, path))


class RejectionVerifier:
    """Accept a drawn candidate with probability min(1, p / q), else go on with what of p the proposal did not cover.

    Siblings are tried in the order they were drawn in, each against the proposal without its predecessors. The noise
    is keyed like the sampler's, in streams of its own. A position's noise decides its token once: at the one node of
    the accepted path that precedes it.

    Args:
        sampler: the run's: its temperature, truncation and penalties make p of the logits.

    Source: Leviathan et al. 2023 (arXiv 2211.17192) for chains; SpecInfer (arXiv 2305.09781) and recursive rejection
    sampling without replacement (arXiv 2402.14160) for trees.
    """

    def __init__(self, sampler: KeyedSampler) -> None:
        if not isinstance(sampler, KeyedSampler):
            raise ValueError(f"RejectionVerifier needs a KeyedSampler, got {type(sampler).__name__}; use MatchVerifier")
        self.sampler = sampler

    def accept(self, trees: Tree, scores: Tensor, choices: Choices) -> Accepted:
        """Find the accepted path of every row, without a host sync.

        Args:
            trees: with proposals, siblings distinct; root-only trees need none.
            scores: [B, N, V]; their argmax is the bonus of a root-only tree, as in plain decoding.
            choices: what p is made of.

        Returns:
            Paths of at most `max_depth + 1` nodes.

        Raises:
            ValueError: candidates were chosen, not drawn: p / q would give another distribution than the target's.
        """
        B, N = trees.tokens.shape
        if N == 1:
            return MatchVerifier().accept(trees, scores)
        if trees.proposals is None:
            raise ValueError(
                "RejectionVerifier needs sampled trees (Tree.proposals): let the drafter draw its candidates, "
                "or verify chosen candidates with MatchVerifier"
            )
        seed, keys, rows = self.sampler.seed, choices.keys, torch.arange(B, device=scores.device)
        p = self.sampler.weights(choices.logits, choices.paths).softmax(-1)
        q = trees.proposals.probabilities.to(p.dtype)
        tiny = torch.finfo(p.dtype).tiny
        node, n_kept = torch.zeros_like(rows), torch.ones_like(rows)
        path = [node]
        rest, descending = p[:, 0], torch.ones_like(rows, dtype=torch.bool)
        for width in trees.proposals.widths:
            uniform = uniform_noise(seed, keys, choices.positions[rows, node].unsqueeze(1), width, ACCEPT_STREAM)
            uniform = uniform.squeeze(1).to(p.dtype)
            children = trees.parents == node.unsqueeze(1)
            rank = children.cumsum(1)
            left, child, found = q[rows, node.clamp_max(q.shape[1] - 1)], node, torch.zeros_like(descending)
            for sibling in range(width):
                this = children & (rank == sibling + 1)
                candidate = this.long().argmax(1)
                token = trees.tokens[rows, candidate].unsqueeze(1)
                mass = left.sum(-1, keepdim=True)
                drawn = left / mass.clamp_min(tiny)
                tried = descending & ~found & this.any(1) & (mass.squeeze(1) > tiny)
                fits = uniform[:, sibling] * drawn.gather(1, token).squeeze(1) < rest.gather(1, token).squeeze(1)
                child = torch.where(tried & fits, candidate, child)
                found |= tried & fits
                uncovered = (rest - drawn).clamp_min(0)
                total = uncovered.sum(-1, keepdim=True)
                # Nothing is left uncovered only where p equals q: there only rounding can reject.
                uncovered = torch.where(total > 0, uncovered / total.clamp_min(tiny), rest)
                rest = torch.where((tried & ~fits).unsqueeze(1), uncovered, rest)
                left = left.scatter(1, token, 0.0)
            node, descending = child, found
            rest = torch.where(found.unsqueeze(1), p[rows, node], rest)
            n_kept = n_kept + found
            path.append(node)
        position = choices.positions[rows, node].unsqueeze(1)
        noise = gumbel_noise(seed, keys, position, p.shape[-1], p.dtype, BONUS_STREAM).squeeze(1)
        bonus, nodes = (rest.log() + noise).argmax(-1), torch.stack(path, 1)
        tokens = trees.tokens.gather(1, nodes).roll(-1, 1).scatter(1, n_kept.unsqueeze(1) - 1, bonus.unsqueeze(1))
        return Accepted(nodes, n_kept, tokens)
