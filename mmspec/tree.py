"""Draft trees as tensors: building, ancestor masks, and the choice of the best nodes of a pool.

Invariant: nodes are in topological order (a parent comes before its children), so an ancestor-closed choice of nodes
stays a tree when it is taken in that order. Nothing here loops over nodes in Python.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from mmspec.types import Tree


def ancestors_of(parents: Tensor, max_depth: int) -> Tensor:
    """Ancestor-or-self matrix by repeated squaring: ceil(log2(max_depth)) batched products.

    Args:
        parents: [B, N] int64, -1 for roots and padding.
        max_depth: upper bound of the depth of any node.

    Returns:
        [B, N, N] bool, `[b, i, j]` when `j` is `i` or an ancestor of `i`.

    Example: parents `[-1, 0, 0, 1]` give rows `1000, 1100, 1010, 1101`.
    """
    B, N = parents.shape
    reach = torch.eye(N, device=parents.device).repeat(B, 1, 1)
    if N > 1:
        rows = parents.clamp_min(0).unsqueeze(-1)
        reach.scatter_add_(2, rows, (parents >= 0).to(reach.dtype).unsqueeze(-1))
    span = 1
    while span < max_depth:
        reach = torch.bmm(reach, reach).clamp_max_(1.0)
        span *= 2
    return reach > 0


def root_only(roots: Tensor) -> Tree:
    """The tree of a plain decoding step.

    Args:
        roots: [B] int64.
    """
    return Tree(roots.unsqueeze(1), *_bare(roots.shape[0], roots.device), max_depth=0)


@functools.lru_cache(maxsize=64)
def _bare(B: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Parents, depths and ancestors of roots alone, made once: plain decoding asks for them every step."""
    # Outside of inference mode, or they could never be used where gradients are recorded.
    with torch.inference_mode(False):
        parents = torch.full((B, 1), -1, dtype=torch.long, device=device)
        return parents, torch.zeros_like(parents), torch.ones((B, 1, 1), dtype=torch.bool, device=device)


def from_parents(tokens: Tensor, parents: Tensor, max_depth: int) -> Tree:
    """A tree from its tokens and parents; depths are counted from the ancestor matrix.

    Args:
        tokens: [B, N] int64, node 0 the root.
        parents: [B, N] int64, -1 for the root and for padding.
        max_depth: upper bound of the depth, at least 1 when there is a node beside the root.
    """
    ancestors = ancestors_of(parents, max_depth)
    return Tree(tokens, parents, ancestors.sum(-1) - 1, ancestors, max_depth)


def chain(tokens: Tensor) -> Tree:
    """A path without branches.

    Args:
        tokens: [B, N] int64, root first.
    """
    B, N = tokens.shape
    depths = torch.arange(N, device=tokens.device).expand(B, N)
    ancestors = torch.ones(N, N, dtype=torch.bool, device=tokens.device).tril().expand(B, N, N)
    return Tree(tokens, depths - 1, depths, ancestors, N - 1)


def without_padding(trees: Tree) -> Tree:
    """The same trees less the nodes that are padding in every row. The device is asked how many those are: a sync."""
    kept = (trees.parents >= 0).any(0)
    kept[0] = True
    nodes = kept.nonzero().squeeze(1)
    if len(nodes) == len(kept):
        return trees
    if len(nodes) == 1:
        return root_only(trees.tokens[:, 0])
    parents = trees.parents[:, nodes]
    return Tree(
        trees.tokens[:, nodes],
        torch.where(parents >= 0, (kept.cumsum(0) - 1)[parents], -1),
        trees.depths[:, nodes],
        trees.ancestors[:, nodes.unsqueeze(1), nodes],
        trees.max_depth,
    )


def best_of_pool(
    roots: Tensor, tokens: Tensor, parents: Tensor, scores: Tensor, budget: Sequence[int], max_depth: int
) -> Tree:
    """The nodes with the best cumulative score, `budget[b]` of them in row `b`, and the root.

    A child never scores above its parent and is created after it, so a stable sort keeps the choice ancestor-closed
    even where scores tie (a child with log q = 0).

    Args:
        roots: [B] int64.
        tokens: [B, C] int64, candidate nodes in order of creation.
        parents: [B, C] int64, index of the parent in the pool, -1 for children of the root.
        scores: [B, C], cumulative log-probability, non-increasing along paths.
        budget: draft nodes per row; more than C takes all, 0 leaves the root alone.
        max_depth: deepest level in the pool.

    Source: EAGLE-2 (arXiv 2406.16858), re-ranking.
    """
    B, C = tokens.shape
    n = min(max(budget), C)
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :n]
    ragged = min(budget) < n
    if ragged:
        limits = torch.tensor([min(b, n) for b in budget], device=tokens.device)
        dropped = torch.arange(n, device=tokens.device) >= limits.unsqueeze(1)
        order = order.masked_fill(dropped, C)  # sorts to the end: creation order again, padding last
    order = order.sort(dim=1).values
    place = torch.zeros((B, C + 2), dtype=torch.long, device=tokens.device)  # pool index + 1 -> tree index
    place.scatter_(1, order + 1, torch.arange(1, n + 1, device=tokens.device).expand(B, n))
    picked = order.clamp_max(C - 1)
    # Children of the root carry parent -1: slot 0 of `place`, which holds tree index 0.
    new_parents = place.gather(1, parents.gather(1, picked) + 1)
    new_tokens = tokens.gather(1, picked)
    if ragged:
        new_parents = new_parents.masked_fill(order == C, -1)
    head = torch.full((B, 1), -1, dtype=torch.long, device=tokens.device)
    return from_parents(
        torch.cat([roots.unsqueeze(1), new_tokens], 1), torch.cat([head, new_parents], 1), max(max_depth, 1)
    )
