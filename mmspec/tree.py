"""Draft trees as tensors: building, ancestor masks, and the choice of the best nodes of a pool.

Invariant: nodes are in topological order (a parent comes before its children), so an ancestor-closed choice of nodes
stays a tree when it is taken in that order. Nothing here loops over nodes in Python.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mmspec.cache import upload
from mmspec.types import Tree


def ancestors_of(parents: Tensor, max_depth: int) -> Tensor:
    """Ancestor-or-self matrix by repeated squaring: ceil(log2(max_depth)) batched products.

    Args:
        parents: [B, N] int64, -1 for roots and padding.
        max_depth: upper bound of the depth of any node, at most 128: beyond it the products would leave fp32.

    Returns:
        [B, N, N] bool, `[b, i, j]` when `j` is `i` or an ancestor of `i`.

    Raises:
        ValueError: a deeper tree.

    Example: parents `[-1, 0, 0, 1]` give rows `1000, 1100, 1010, 1101`.
    """
    if max_depth > 128:
        raise ValueError(f"trees of depth {max_depth} are not supported; draft at most 128 levels")
    nodes, eye = _nodes(parents.shape[1], parents.device)
    reach = (parents.unsqueeze(-1) == nodes) + eye
    span = 1
    while span < max_depth:
        reach = torch.bmm(reach, reach)
        span *= 2
    return reach > 0


@functools.lru_cache(maxsize=256)
def _nodes(N: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Node numbers [N] and the identity [N, N] in fp32, made once for each size."""
    with torch.inference_mode(False):
        return torch.arange(N, device=device), torch.eye(N, device=device)


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


def from_parents(tokens: Tensor, parents: Tensor, max_depth: int, full: bool = False) -> Tree:
    """A tree from its tokens and parents; depths are counted from the ancestor matrix.

    Args:
        tokens: [B, N] int64, node 0 the root.
        parents: [B, N] int64, -1 for the root and for padding.
        max_depth: upper bound of the depth, at least 1 when there is a node beside the root.
        full: whether there is no padding.
    """
    ancestors = ancestors_of(parents, max_depth)
    return Tree(tokens, parents, ancestors.sum(-1) - 1, ancestors, max_depth, full=full)


def chain(tokens: Tensor) -> Tree:
    """A path without branches.

    Args:
        tokens: [B, N] int64, root first.
    """
    B, N = tokens.shape
    depths = torch.arange(N, device=tokens.device).expand(B, N)
    ancestors = torch.ones(N, N, dtype=torch.bool, device=tokens.device).tril().expand(B, N, N)
    return Tree(tokens, depths - 1, depths, ancestors, N - 1, full=True)


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
        scores=None if trees.scores is None else trees.scores[:, nodes],
    )


def pruned(trees: Tree, kept: Tensor) -> Tree:
    """The same trees without some nodes, and without all that hangs from them.

    Padding remains where another row has a node; on a CPU, where asking is free, columns of nothing else are dropped.

    Args:
        trees: of chosen candidates.
        kept: [B, N] bool, whatever it says of the root.

    Raises:
        ValueError: drawn candidates.
    """
    if trees.proposals is not None:
        raise ValueError("drawn trees cannot be pruned: p / q would not be what their candidates were drawn with")
    lost = (trees.ancestors & ~kept.unsqueeze(1))[..., 1:].any(-1)
    parents, depths = trees.parents.masked_fill(lost, -1), trees.depths.masked_fill(lost, 0)
    trees = replace(trees, parents=parents, depths=depths, full=False)
    return without_padding(trees) if parents.device.type == "cpu" else trees


def first_nodes(trees: Tree, counts: Sequence[int]) -> Tree:
    """The first `counts[b]` nodes behind the root of each row; of trees whose nodes stand best first, the best ones.

    Views where rows agree: nothing is computed that a shorter tree would not have anyway.

    Args:
        trees: of chosen candidates, every prefix of whose nodes is a tree (topological order).
        counts: host numbers, none beyond the width of the trees less the root.

    Raises:
        ValueError: drawn candidates.
    """
    if trees.proposals is not None:
        raise ValueError("drawn trees cannot be pruned: p / q would not be what their candidates were drawn with")
    n = max(counts) + 1
    if n == 1:
        return root_only(trees.tokens[:, 0])
    parents, depths, full = trees.parents[:, :n], trees.depths[:, :n], trees.full
    if min(counts) + 1 < n:
        ranks, _ = _nodes(n, parents.device)
        beyond = ranks > upload(counts, parents.device).unsqueeze(1)
        parents, depths, full = parents.masked_fill(beyond, -1), depths.masked_fill(beyond, 0), False
    scores = None if trees.scores is None else trees.scores[:, :n]
    depth = min(trees.max_depth, n - 1)
    return Tree(trees.tokens[:, :n], parents, depths, trees.ancestors[:, :n, :n], depth, None, scores, full)


def padded(trees: Tree, n_nodes: int) -> Tree:
    """The same trees with padding behind their nodes.

    Args:
        trees: of at most `n_nodes` nodes.
        n_nodes: width of the result.
    """
    more = n_nodes - trees.tokens.shape[1]
    if not more:
        return trees
    ancestors = F.pad(trees.ancestors, (0, more, 0, more))
    ancestors[:, -more:, -more:] = torch.eye(more, dtype=torch.bool, device=ancestors.device)
    tokens, parents, depths = F.pad(trees.tokens, (0, more)), F.pad(trees.parents, (0, more), value=-1), trees.depths
    scores = None if trees.scores is None else F.pad(trees.scores, (0, more), value=float("-inf"))
    return Tree(tokens, parents, F.pad(depths, (0, more)), ancestors, trees.max_depth, scores=scores)


def by_row(first: Tensor, ours: Tree, theirs: Tree) -> Tree:
    """One batch of the trees of two: of `ours` where `first` says so, else of `theirs`.

    Args:
        first: [B] bool.
        ours, theirs: chosen candidates of the same B roots; widths may differ.
    """
    n_nodes = max(ours.tokens.shape[1], theirs.tokens.shape[1])
    ours, theirs = padded(ours, n_nodes), padded(theirs, n_nodes)
    flat = first.unsqueeze(1)
    return Tree(
        torch.where(flat, ours.tokens, theirs.tokens),
        torch.where(flat, ours.parents, theirs.parents),
        torch.where(flat, ours.depths, theirs.depths),
        torch.where(flat.unsqueeze(2), ours.ancestors, theirs.ancestors),
        max(ours.max_depth, theirs.max_depth),
        scores=None if ours.scores is None or theirs.scores is None else torch.where(flat, ours.scores, theirs.scores),
    )


def best_of_pool(
    tokens: Tensor, parents: Tensor, scores: Tensor, budget: Sequence[int], max_depth: int, with_scores: bool = False
) -> Tree:
    """The root, and of the other nodes of a pool those with the best cumulative score, `budget[b]` of them in row `b`.

    A child never scores above its parent and is created after it, so a stable sort puts it behind its parent even where
    scores tie (a child with log q = 0): the best n are ancestor-closed and in topological order. The best first also
    means that an accepted path is often the first nodes in a row, which a commit need not move.

    Args:
        tokens: [B, C] int64, candidate nodes in order of creation, the root first.
        parents: [B, C] int64, index of the parent in the pool, -1 for the root.
        scores: [B, C], cumulative log-probability, non-increasing along paths from the root's 0.
        budget: draft nodes per row; more than C - 1 takes all, 0 leaves the root alone.
        max_depth: deepest level in the pool.
        with_scores: whether the tree shall have them.

    Source: EAGLE-2 (arXiv 2406.16858), re-ranking.
    """
    n = min(max(budget) + 1, tokens.shape[1])
    # A head that overflowed must not put its nodes before the root: NaN would be the largest.
    order = scores.nan_to_num(nan=float("-inf")).sort(dim=1, descending=True, stable=True).indices
    kept, places = order[:, :n], order.argsort(dim=1)
    parents = torch.cat([parents[:, :1], places.gather(1, parents.gather(1, kept[:, 1:]))], 1)
    full = min(budget) + 1 >= n
    if not full:
        ranks, _ = _nodes(n, tokens.device)
        parents = parents.masked_fill(ranks > upload(budget, tokens.device).unsqueeze(1), -1)
    trees = from_parents(tokens.gather(1, kept), parents, max(max_depth, 1), full)
    return replace(trees, scores=scores.gather(1, kept)) if with_scores else trees


def best_products(
    roots: Tensor, tokens: Tensor, scores: Tensor, budget: Sequence[int], with_scores: bool = False
) -> Tree:
    """The root, and of all paths through the candidates of independent levels those with the best sum of scores.

    Exact: nothing that a heap over all paths would find is missing. A path of ranks (r_1, .., r_d) comes behind all
    that are no longer and have a higher rank nowhere: with itself these are sum_e prod_{j <= e} (r_j + 1). So the n
    best are among the paths where that sum is at most n, a few hundred, whatever the scores are.

    Args:
        roots: [B] int64.
        tokens: [B, K, k] int64, candidates of each level, best first.
        scores: [B, K, k], their log-probabilities, at most 0, in falling order.
        budget: draft nodes per row, as in `best_of_pool`; at least one of them 1.
        with_scores: whether the tree shall have them.
    """
    K, k = tokens.shape[1:]
    ranks, levels, parents = _products(max(budget), K, k, tokens.device)
    # Rank k stands for a level that a path does not reach.
    padded, total = F.pad(scores, (0, 1)), scores.new_zeros(())
    for level, column in enumerate(ranks):
        total = total + padded[:, level].index_select(1, column)
    last = levels * k + ranks.gather(0, levels.unsqueeze(0)).squeeze(0)
    pool = torch.cat([roots.unsqueeze(1), tokens.flatten(1).index_select(1, last)], 1)
    total = F.pad(total, (1, 0))
    return best_of_pool(pool, parents.expand(len(roots), -1), total, budget, K, with_scores)


@functools.lru_cache(maxsize=256)
def _products(n: int, depth: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Paths that may be among the n best: ranks [K, C] (`width` beyond a path's end), level of the last one [C], and
    parents [C + 1], with the root as node 0 before them."""
    found: list[tuple[tuple[int, ...], int]] = []  # and the index of the parent
    level: list[tuple[tuple[int, ...], int, int, int]] = [((), 1, 0, 0)]  # path, product, sum of products, index
    while level and len(level[0][0]) < depth:
        below: list[tuple[tuple[int, ...], int, int, int]] = []
        for path, product, total, index in level:
            for rank in range(min(width, (n - total) // product)):
                here = product * (rank + 1)
                found.append(((*path, rank), index))
                below.append(((*path, rank), here, total + here, len(found)))
        level = below
    ranks = [[*path, *[width] * (depth - len(path))] for path, _ in found]
    # Outside of inference mode, or they could never be used where gradients are recorded.
    with torch.inference_mode(False):
        columns = torch.tensor(ranks, device=device).T.contiguous()
        ends = torch.tensor([len(path) - 1 for path, _ in found], device=device)
        return columns, ends, torch.tensor([-1, *(parent for _, parent in found)], device=device)
