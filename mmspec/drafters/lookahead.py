"""Trie lookahead: draft a tree of all that followed the newest tokens before, the most frequent first.

Runs of up to `branch_length + 1` tokens are counted in tries, one for each first token: those of the prompt apart from
those of the answer, so that what a request brought along ends with it, and answers may be shared between requests. A
run is counted as soon as its last token is known. Images are gaps: no run spans one.

Source: Lookahead (Ant Group, arXiv 2312.12728). Deviations: runs are counted at once instead of when `branch_length`
tokens have gathered behind their start; nodes come best first instead of depth first, so that the first nodes of a tree
are the best smaller tree (to a verifier their order means nothing).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

from mmspec.drafters._host import NOTHING, Draft, HostDrafter, Stream
from mmspec.types import Target


@dataclass(frozen=True)
class Config:
    """Settings.

    Args:
        decoding_length: nodes to draft.
        branch_length: levels to draft, and tokens that are counted behind each position.
        max_query: tokens of context to look up; fewer, down to one, while what is found could not fill a branch.
        output_weight: how much a count in answers weighs beside one in the prompt, which weighs 1 - output_weight.
        share: answers are counted over all requests of a drafter. What is drafted then depends on the order of
            requests (their tokens do not).
        max_nodes: of the runs that begin with one token. Beyond that their counts are halved, and those of 1 dropped.
        max_output_nodes: the same bound for shared counts between two requests.
    """

    decoding_length: int = 16
    branch_length: int = 12
    max_query: int = 2
    output_weight: float = 1e-4
    share: bool = False
    max_nodes: int = 65536
    max_output_nodes: int = 512

    @property
    def depth(self) -> int:
        """Levels to ask for."""
        return self.branch_length

    @property
    def budget(self) -> int:
        """Nodes to ask for."""
        return self.decoding_length

    def __post_init__(self) -> None:
        for name in ("decoding_length", "branch_length", "max_query", "max_nodes", "max_output_nodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"lookahead: {name} must be at least 1, got {getattr(self, name)}")
        if self.max_query > self.branch_length + 1:
            raise ValueError(
                f"lookahead: max_query {self.max_query} is longer than the runs that are counted, "
                f"branch_length + 1 = {self.branch_length + 1}"
            )
        if not 0 <= self.output_weight <= 1:
            raise ValueError(f"lookahead: output_weight must be in 0..1, got {self.output_weight}")


class Node(dict[int, "Node"]):
    """How often a run of tokens occurred, and by token the runs that are one longer."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count: float = 0


NOWHERE = Node()
"""Stands for runs that never occurred."""

Runs = deque[tuple[int, Node]]
"""The runs that end at the newest token of a text and can still grow, longest first, each with its first token."""


@dataclass
class Trie:
    """How often each run of tokens occurred; never more often than its own beginning.

    Args:
        max_nodes: see `Config`.
    """

    max_nodes: int
    roots: dict[int, Node] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    """Nodes below each root."""

    def add(self, runs: Runs, token: int) -> None:
        """Count the runs that end in the next token of a text, and leave in `runs` those that can still grow.

        A negative token is a gap: runs end before it and start behind it.
        """
        if token < 0:
            runs.clear()
            return
        for i, (first, run) in enumerate(runs):
            longer = run.get(token)
            if longer is None:
                longer = run[token] = Node()
                self.sizes[first] += 1
                if self.sizes[first] > self.max_nodes:
                    self.prune(first)
            longer.count += 1
            runs[i] = first, longer
        root = self.roots.get(token)
        if root is None:
            root = self.roots[token] = Node()
            self.sizes[token] = 0
        root.count += 1
        runs.append((token, root))

    def find(self, run: Sequence[int]) -> Node:
        """The node of a run."""
        node = self.roots.get(run[0], NOWHERE)
        for token in run[1:]:
            node = node.get(token, NOWHERE)
        return node

    def prune(self, first: int) -> None:
        """Halve the counts of all runs that begin with a token, and forget those that were counted once."""
        self.sizes[first] = _halve(self.roots[first])


def _halve(node: Node) -> int:
    """Halve a node's count and prune what is below it; returns the nodes left there."""
    node.count /= 2
    for token in [token for token, longer in node.items() if longer.count <= 1]:
        del node[token]
    return len(node) + sum(map(_halve, node.values()))


class CountedStream(Stream):
    """One row's text.

    Args:
        config: see `Config`.
        answers: where to count this row's answer; None counts it for this row alone.
    """

    def __init__(self, config: Config, answers: Trie | None = None) -> None:
        self.config = config
        self.prompt = Trie(config.max_nodes)
        self.answers = answers or Trie(config.max_nodes)
        self.runs: Runs = deque(maxlen=config.branch_length)
        self.newest: deque[int] = deque(maxlen=config.max_query)

    def begin(self, prompt: Sequence[int]) -> None:
        """Count the prompt's tokens."""
        for token in prompt:
            self.prompt.add(self.runs, token)
        self.runs.clear()
        self.newest.extend(prompt)

    def extend(self, tokens: Sequence[int]) -> None:
        """Count tokens of the answer."""
        for token in tokens:
            self.answers.add(self.runs, token)
        self.newest.extend(tokens)

    def draft(self, depth: int, budget: int) -> Draft:
        """What followed the newest tokens before; fewer of them are looked up while it could not fill a branch."""
        depth, budget = min(depth, self.config.branch_length), min(budget, self.config.decoding_length)
        context, draft = list(self.newest), NOTHING
        for start in range(len(context)):
            query = context[start:]
            draft = self._heaviest(self.prompt.find(query), self.answers.find(query), depth, budget)
            if len(draft[0]) >= min(depth, budget):
                break
        return draft

    def close(self) -> None:
        """Bound what a shared trie keeps. The counts of the prompt end with the stream."""
        for first, size in self.answers.sizes.items():
            if size > self.config.max_output_nodes:
                self.answers.prune(first)

    def _heaviest(self, prompt: Node, answers: Node, depth: int, budget: int) -> Draft:
        """The `budget` heaviest nodes on `depth` levels below a run's nodes in both tries.

        No node weighs more than its parent, so taking the heaviest in sight over and over finds them. Among equals the
        one that came into sight first is taken, but a child that weighs as much as its parent takes its parent's turn:
        what was followed by one thing alone is drafted to the end before another branch is begun.
        """
        tokens: list[int] = []
        parents: list[int] = []
        in_sight: list[tuple[float, int, int, int, int, Node, Node]] = []
        turns, weight, turn, level = count(), 0.0, -1, 0
        while True:
            if level < depth:
                for w, token, a, b in self._followers(prompt, answers):
                    entry = (-w, turn if w == weight else next(turns), len(tokens), token, level + 1, a, b)
                    heappush(in_sight, entry)
            if not in_sight or len(tokens) == budget:
                return tokens, parents
            negative, turn, parent, token, level, prompt, answers = heappop(in_sight)
            weight = -negative
            tokens.append(token)
            parents.append(parent)

    def _followers(self, prompt: Node, answers: Node) -> Iterator[tuple[float, int, Node, Node]]:
        """Weight, token, and the nodes in both tries, of each token that followed a run."""
        light = self.config.output_weight
        for token, node in prompt.items():
            other = answers.get(token, NOWHERE)
            yield (1 - light) * node.count + light * other.count, token, node, other
        for token, node in answers.items():
            if token not in prompt:
                yield light * node.count, token, NOWHERE, node


class LookaheadDrafter(HostDrafter):
    """Trees of what followed before.

    Args:
        config: see `Config`.
    """

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config()
        self.shared = Trie(self.config.max_nodes) if self.config.share else None
        super().__init__(lambda: CountedStream(self.config, self.shared))


def make(config: Config, target: Target) -> LookaheadDrafter:
    """The method's drafter for a target."""
    return LookaheadDrafter(config)
