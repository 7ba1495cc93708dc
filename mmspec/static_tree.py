"""Static draft trees: shapes fixed in advance, whose nodes are ranks among the candidates of their parent.

They are for drafters without scores to choose nodes by (Token Recycling), and cost nothing to build. A shape is drawn
by hand, or fitted to how often each rank turns out right (`fit`). Everything about it is computed once.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from mmspec.cache import upload
from mmspec.tree import ancestors_of
from mmspec.types import InputError, Tree

RankPath = tuple[int, ...]
"""A node by the ranks that lead to it: (0, 2) is the third candidate below the best candidate below the root."""


@dataclass(frozen=True)
class Growth:
    """How the nodes of one level are drafted from those of the level above that have children, the parents.

    Args:
        parents: [m] int64, within the level above.
        above: [m] int64, the parents' own parents, among the parents of the level above.
        width: candidates wanted of each parent.
        picks: [n] int64, the nodes of the level among the m * width candidates.
        mask: [1, 1, m, W] fp32, additive: which of the parents of all levels below the root each parent sees.
    """

    parents: Tensor
    above: Tensor
    width: int
    picks: Tensor
    mask: Tensor


Rates = Sequence[Sequence[float]]
"""`rates[d][r]`: how often the candidate of rank r below an accepted node of depth d is the next token."""


@dataclass(frozen=True)
class StaticTree:
    """A tree of ranks.

    Its nodes are numbered level by level, the root being node 0: parents come before children, and a level is a slice.
    N counts the root.

    Args:
        paths: the draft nodes, best first: the first n of them are the tree for a budget of n. So a node comes after
            its parent and after its siblings of lower rank.
        device: where the tensors are.

    Raises:
        ValueError: a node comes too early, or twice.
    """

    paths: tuple[RankPath, ...]
    device: torch.device = torch.device("cpu")  # noqa: RUF009, a device is a constant
    parents: Tensor = field(init=False, repr=False, compare=False)
    """[N] int64, -1 for the root."""
    ranks: Tensor = field(init=False, repr=False, compare=False)
    """[N] int64, among the children of the parent; 0 for the root."""
    depths: Tensor = field(init=False, repr=False, compare=False)
    """[N] int64."""
    places: Tensor = field(init=False, repr=False, compare=False)
    """[N] int64, index into `paths`; -1 for the root."""
    ancestors: Tensor = field(init=False, repr=False, compare=False)
    """[N, N] bool, `[i, j]` when j is i or an ancestor of i."""
    levels: tuple[slice, ...] = field(init=False, repr=False, compare=False)
    """The nodes of each depth, the root's first."""

    def __post_init__(self) -> None:
        _check(self.paths)
        order = sorted(range(len(self.paths)), key=lambda i: len(self.paths[i]))  # stable: best first within a level
        nodes: list[RankPath] = [(), *(self.paths[i] for i in order)]
        number = {path: i for i, path in enumerate(nodes)}
        ends = list(itertools.accumulate(len(list(level)) for _, level in itertools.groupby(nodes, len)))
        columns = {
            "parents": [-1, *(number[path[:-1]] for path in nodes[1:])],
            "ranks": [0, *(path[-1] for path in nodes[1:])],
            "depths": [len(path) for path in nodes],
            "places": [-1, *order],
        }
        # Outside of inference mode, or the tensors could never be used where gradients are recorded.
        with torch.inference_mode(False):
            for name, column in columns.items():
                object.__setattr__(self, name, torch.tensor(column, device=self.device))
            object.__setattr__(self, "ancestors", ancestors_of(self.parents.unsqueeze(0), len(ends))[0])
        object.__setattr__(self, "levels", tuple(map(slice, [0, *ends], ends)))

    @classmethod
    def parse(cls, notation: str) -> StaticTree:
        """A tree drawn by hand: in `root:4 | 0:3 1:2 | 00:1` the root has the children 0 to 3, its child 0 the children
        0 to 2, and so on; prefixes are single digits, bars are for the reader.

        Low and few ranks are taken to be best where a budget cuts.

        Raises:
            ValueError: see the class; or a word that is not of this form.
        """
        paths: list[RankPath] = []
        for word in notation.replace("|", " ").split():
            name, _, count = word.partition(":")
            if not (count.isdecimal() and (name == "root" or name.isdecimal())):
                raise ValueError(f"static tree: {word!r} is not PREFIX:CHILDREN, like root:4 or 01:2")
            prefix = () if name == "root" else tuple(map(int, name))
            paths += [(*prefix, rank) for rank in range(int(count))]
        return cls(tuple(sorted(paths, key=lambda path: (len(path) + sum(path), len(path), path))))

    @classmethod
    def load(cls, path: Path | str) -> StaticTree:
        """The tree of a JSON file with the key "paths", a list of lists of ranks (scripts/fit_tree.py writes them).

        Raises:
            InputError: the file is missing, or holds no tree.
        """
        try:
            listed = json.loads(Path(path).read_text(encoding="utf-8"))["paths"]
            return cls(tuple(tuple(map(int, nodes)) for nodes in listed))
        except OSError as error:
            raise InputError(f"static tree {path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} holds no static tree ({error}); scripts/fit_tree.py makes one") from None

    @property
    def depth(self) -> int:
        """Draft levels."""
        return len(self.levels) - 1

    @property
    def budget(self) -> int:
        """Draft nodes."""
        return len(self.paths)

    @functools.cached_property
    def n_ranks(self) -> int:
        """Candidates that are told apart, of any node."""
        return 1 + max(map(max, self.paths))

    @functools.cached_property
    def growth(self) -> tuple[Growth, ...]:
        """Of each draft level, for drafters that draft level by level."""
        steps: list[Growth] = []
        parents, seen = [0], torch.zeros(0, dtype=torch.long)
        for level in self.levels[1:]:
            nodes = range(level.start, level.stop)
            above, parents = parents, sorted({int(self.parents[node]) for node in nodes})
            if steps:
                seen = torch.cat([seen, torch.tensor(parents)])
            start, width = self.levels[len(steps)].start, 1 + int(self.ranks[level].max())
            picks = [parents.index(int(self.parents[node])) * width + int(self.ranks[node]) for node in nodes]
            grand = [above.index(int(self.parents[node])) if steps else 0 for node in parents]
            visible = self.ancestors.cpu()[torch.tensor(parents)][:, seen]
            mask = torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))
            columns = [torch.tensor(c, device=self.device) for c in ([p - start for p in parents], grand, picks)]
            steps.append(Growth(columns[0], columns[1], width, columns[2], mask[None, None].to(self.device)))
        return tuple(steps)

    def to(self, device: torch.device) -> StaticTree:
        """The same tree on another device."""
        return self if device == self.device else replace(self, device=device)

    def cut(self, budget: int, depth: int) -> StaticTree:
        """Its best `budget` nodes down to `depth`; kept, because rounds ask for the same few again and again."""
        return self if budget >= self.budget and depth >= self.depth else _cut(self, budget, depth)

    def trees(self, tokens: Tensor, budget: Sequence[int]) -> Tree:
        """Draft trees of this shape. Padding keeps its row of the shape's ancestors, which nobody asks for.

        Args:
            tokens: [B, N] int64, a token for each node; a negative one makes a node padding, and so it must all nodes
                below it.
            budget: draft nodes per row, the best ones; the others are padding.
        """
        kept = tokens >= 0
        if min(budget) < self.budget:
            kept &= self.places < upload(budget, tokens.device).unsqueeze(1)
        ancestors = self.ancestors.expand(len(tokens), -1, -1)
        parents = torch.where(kept, self.parents, -1)
        return Tree(tokens.clamp_min(0), parents, self.depths * kept, ancestors, self.depth)


def fit(rates: Rates, budget: int) -> StaticTree:
    """The tree of at most `budget` nodes from which the most tokens are expected to be accepted.

    The node whose path is most likely accepted is added until the budget is spent; a node is never likelier than its
    parent, nor than a sibling of lower rank (where a small sample says otherwise, the lower rank's rate counts), so no
    other tree of the size is better. Nodes that were never right are left out.

    Args:
        rates: depth 0, the root, first.
        budget: draft nodes.

    Raises:
        ValueError: nothing was ever right.

    Source: Medusa (arXiv 2401.10774), section 2.3.3.
    """
    falling = [list(itertools.accumulate(level, min)) for level in rates]
    queue: list[tuple[float, RankPath]] = [(-_likelihood((0,), falling), (0,))]
    paths: list[RankPath] = []
    while queue and len(paths) < budget:
        likelihood, path = heapq.heappop(queue)
        if not likelihood:
            break
        paths.append(path)
        for candidate in ((*path, 0), (*path[:-1], path[-1] + 1)):
            heapq.heappush(queue, (-_likelihood(candidate, falling), candidate))
    if not paths:
        raise ValueError("a static tree cannot be fitted: no candidate was ever right")
    return StaticTree(tuple(paths))


def expected_tau(tree: StaticTree, rates: Rates) -> float:
    """Tokens a round that a tree is expected to emit, the bonus included, when each level's rate does not depend on
    the ranks before it."""
    return 1 + sum(_likelihood(path, rates) for path in tree.paths)


def _likelihood(path: RankPath, rates: Rates) -> float:
    """Of all nodes on a path being accepted; 0 beyond what was measured."""
    if len(path) > len(rates):
        return 0.0
    return math.prod(level[rank] if rank < len(level) else 0.0 for rank, level in zip(path, rates))


def _check(paths: Sequence[RankPath]) -> None:
    """Raises ValueError unless every prefix of the list is a tree."""
    if not paths:
        raise ValueError("a static tree needs at least one node below its root")
    seen: set[RankPath] = {()}
    for path in paths:
        for needed in _needs(path):
            if needed not in seen:
                raise ValueError(f"static tree: node {[*path]} needs {[*needed]} before it")
        if path in seen or path[-1] < 0:
            raise ValueError(f"static tree: node {[*path]} is {'there twice' if path in seen else 'no path of ranks'}")
        seen.add(path)


def _needs(path: RankPath) -> Iterator[RankPath]:
    """The parent, and the next better sibling."""
    yield path[:-1]
    if path and path[-1] > 0:
        yield (*path[:-1], path[-1] - 1)


@functools.lru_cache(maxsize=1024)
def _cut(tree: StaticTree, budget: int, depth: int) -> StaticTree:
    return StaticTree(tuple(path for path in tree.paths if len(path) <= depth)[:budget], tree.device)


TOKEN_RECYCLING_80 = StaticTree.parse(
    "root:8 | 0:8 1:4 2:3 3:2 4:1 5:1 6:1 7:1"
    " | 00:8 01:3 02:2 03:1 04:1 05:1 06:1 07:1 10:2 11:1 20:1 30:1 40:1 50:1"
    " | 000:5 001:2 002:1 003:1 004:1 010:1 020:1 100:1 200:1 300:1"
    " | 0000:3 0001:1 0002:1 0010:1 0100:1 1000:1 | 00000:2 00010:1"
)
"""Of Token Recycling (arXiv 2408.08696): 80 nodes on 6 levels."""

EAGLE_25 = StaticTree.parse("root:4 | 0:3 1:2 2:2 3:1 | 00:3 01:2 02:2 10:1 | 000:3 | 0000:2")
"""Of EAGLE-1 (arXiv 2401.15077): 25 nodes on 5 levels."""

MEDUSA_63 = StaticTree.parse(
    "root:10 | 0:10 1:7 2:3 3:2 4:1 5:1 6:1 7:1 8:1 9:1 | 00:10 01:3 02:2 03:1 04:1 05:1 06:1 07:1 10:2 20:1 | 000:2"
)
"""Of Medusa (arXiv 2401.10774) with four heads on Vicuna-7B: 63 nodes on 4 levels."""

NAMED = {"eagle25": EAGLE_25, "medusa63": MEDUSA_63, "recycling80": TOKEN_RECYCLING_80}
"""Published trees by name: any head can fill them, without being fitted to it."""
