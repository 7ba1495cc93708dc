"""Suffix automata of token streams: one that grows with its text, and one that is read from a file.

A state stands for the strings of a text that end at the same places; they are suffixes of one another. Reading a token
in the state of a string leads to the state of the string with that token. A state's `link` leads to its longest suffix
that ends at more places (Blumer et al. 1985, "The smallest automaton recognizing the subwords of a text").
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from heapq import heappop, heappush, nlargest
from itertools import chain
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mmspec.files import replacing
from mmspec.types import InputError

FORMAT = "mmspec suffix automaton 1"
ARRAYS = ("offsets", "tokens", "targets", "link", "length", "counts")
NESTED = 64
"""States that are told of a new latest place at most. Only in a loop are there more, where older places do as well."""


class Automaton:
    """All strings of a growing text, in amortised constant time a token; no string crosses a `cut`.

    Attributes:
        next: {token: state} of each state; state 0 is the empty string.
        link: of each state, -1 of state 0.
        length: of each state's longest string.
        end: index of a token that each state's strings end at, the first one or the one last told to `renew`.
        last: state of the whole text since the latest cut.
    """

    def __init__(self) -> None:
        self.next: list[dict[int, int]] = [{}]
        self.link, self.length, self.end, self.last = [-1], [0], [-1], 0

    def cut(self) -> None:
        """What comes next is not a continuation of what was before."""
        self.last = 0

    def append(self, token: int, index: int) -> int:
        """Take in the token at an index of the text.

        Returns:
            The state of the longest suffix of the text that had occurred before, that token included: its `length` is
            that of the match, its `end` is still an earlier one.
        """
        transitions, link, length = self.next, self.link, self.length
        state, new = self.last, -1
        if token not in transitions[state]:
            new = self._add({}, -1, length[state] + 1, index)
            while state >= 0 and token not in transitions[state]:
                transitions[state][token] = new
                state = link[state]
        if state < 0:
            seen = 0
        else:
            seen = transitions[state][token]
            if length[seen] > length[state] + 1:
                seen = self._split(state, seen, token)
        if new >= 0:
            link[new] = seen
        # Otherwise all of the text since the cut occurred before, and it has its state already.
        self.last = new if new >= 0 else seen
        return seen

    def renew(self, state: int, index: int) -> None:
        """The strings of a state, and with them its suffixes, have their latest end at `index`."""
        end, link = self.end, self.link
        for _ in range(NESTED):
            if state <= 0:
                break
            end[state] = index
            state = link[state]

    def _add(self, transitions: dict[int, int], link: int, length: int, end: int) -> int:
        self.next.append(transitions)
        self.link.append(link)
        self.length.append(length)
        self.end.append(end)
        return len(self.link) - 1

    def _split(self, state: int, whole: int, token: int) -> int:
        """Gives the shorter strings of `whole` a state of their own: they end where the longer ones do not.

        Copied transitions are never removed, and there are at most three a token in all, so this is amortised too.
        """
        part = self._add(self.next[whole].copy(), self.link[whole], self.length[state] + 1, self.end[whole])
        self.link[whole] = part
        while state >= 0 and self.next[state].get(token) == whole:
            self.next[state][token] = part
            state = self.link[state]
        return part


class StaticAutomaton:
    """The automaton of a corpus, in memory-mapped arrays: no part of it is read before a walk comes by.

    Args:
        arrays: as `freeze` makes them.
    """

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        # Plain integers out of a buffer: an element of an array would be an object of numpy's, at three times the cost.
        self.offsets, self.tokens, self.targets, self.link, self.length, self.counts = (
            arrays[name].data for name in ARRAYS
        )

    @classmethod
    def load(cls, path: Path | str, vocabulary: str, target: str) -> StaticAutomaton:
        """Maps a file of `save`.

        Args:
            path: the file.
            vocabulary: fingerprint of the tokens that it is to be walked with.
            target: whose they are, for the message.

        Raises:
            InputError: there is no such file, it is none of `save`, or it holds tokens of another vocabulary.
        """
        remedy = "build one with scripts/build_sam.py"
        if not Path(path).is_file():
            raise InputError(f"static automaton {path} does not exist; {remedy}")
        try:
            # By torch, whose tensors keep the mapping; numpy's are copies.
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT:
                    raise InputError(f"{path} is no static automaton of this version; {remedy}")
                arrays = {name: file.get_tensor(name).numpy() for name in ARRAYS}
        except (SafetensorError, OSError) as error:
            raise InputError(f"static automaton {path} cannot be read: {error}; {remedy}") from error
        if about["vocabulary"] != vocabulary:
            raise InputError(
                f"static automaton {path} was built for the vocabulary {about['vocabulary']} of {about['target']}, but "
                f"{target} has {vocabulary}; build one with scripts/build_sam.py --target {target}"
            )
        return cls(arrays)

    def step(self, state: int, matched: int, token: int) -> tuple[int, int]:
        """The longest suffix of a text that the corpus holds, one token on.

        Args:
            state, matched: of the text so far, its state and length; 0 and 0 at its beginning.
            token: what comes next.
        """
        while True:
            edge, behind = self._edge(state, token)
            if edge < behind and self.tokens[edge] == token:
                return self.targets[edge], matched + 1
            if state == 0:
                return 0, 0
            state = self.link[state]
            matched = self.length[state]

    def expand(self, state: int, depth: int, budget: int, width: int) -> tuple[list[int], list[int]]:
        """The likeliest continuations of a state's strings as a tree, best first by how often they occur in the corpus.

        Args:
            state: of the text up to the root.
            depth, budget: limits of levels and nodes behind the root.
            width: limit of nodes on a level.

        Returns:
            Tokens, and the tree index of each one's parent (0 is the root).
        """
        tokens: list[int] = []
        parents: list[int] = []
        room = [width] * (depth + 1)
        # Occurrences in the corpus, those of the root's context being common to all; ties go to who was found first.
        heap: list[tuple[int, int, int, int, int]] = []
        found = level = parent = 0
        while len(tokens) < budget:
            if level < depth:
                for edge in self._likeliest(state, width):
                    found += 1
                    heappush(heap, (-self.counts[self.targets[edge]], found, edge, parent, level + 1))
            while heap and not room[heap[0][4]]:
                heappop(heap)
            if not heap:
                break
            _, _, edge, above, level = heappop(heap)
            room[level] -= 1
            tokens.append(self.tokens[edge])
            parents.append(above)
            state, parent = self.targets[edge], len(tokens)
        return tokens, parents

    def _edge(self, state: int, token: int) -> tuple[int, int]:
        """Where a state's transition by a token is or would be, and where its transitions end."""
        behind = self.offsets[state + 1]
        return bisect_left(self.tokens, token, self.offsets[state], behind), behind

    def _likeliest(self, state: int, width: int) -> Sequence[int]:
        """The transitions of a state that occur most often."""
        edges = range(self.offsets[state], self.offsets[state + 1])
        if len(edges) <= width:
            return edges
        return nlargest(width, edges, key=lambda edge: self.counts[self.targets[edge]])


def freeze(automaton: Automaton, ends: Sequence[int]) -> dict[str, np.ndarray]:
    """The arrays of a static automaton of S states and E transitions.

    Args:
        automaton: of the corpus, with a cut between documents.
        ends: `automaton.last` after each token.

    Returns:
        offsets [S + 1] int64, tokens and targets [E] int32: transitions of state s at offsets[s]..offsets[s + 1], by
        token; link, length, counts [S] int32: `counts` of the places that a state's strings end at.
    """
    sizes = np.fromiter(map(len, automaton.next), np.int64, len(automaton.next))
    offsets = np.concatenate([[0], sizes.cumsum()])
    tokens = np.fromiter(chain.from_iterable(automaton.next), np.int32, offsets[-1])
    targets = np.fromiter(chain.from_iterable(d.values() for d in automaton.next), np.int32, offsets[-1])
    order = np.lexsort((tokens, np.repeat(np.arange(len(sizes)), sizes)))
    length = np.array(automaton.length, np.int32)
    counts = np.bincount(ends, minlength=len(sizes)).tolist()
    # A string ends wherever one that it is a suffix of does; longer ones first, so that theirs are complete.
    for state in np.argsort(-length, kind="stable")[:-1].tolist():
        counts[automaton.link[state]] += counts[state]
    return {
        "offsets": offsets,
        "tokens": tokens[order],
        "targets": targets[order],
        "link": np.array(automaton.link, np.int32),
        "length": length,
        "counts": np.array(counts, np.int32),
    }


def save(path: Path, arrays: dict[str, np.ndarray], **about: str) -> None:
    """Writes one safetensors file, under another name until it is complete.

    Args:
        path: where to.
        arrays: of `freeze`.
        about: `vocabulary`, `target` and anything else worth knowing of the corpus.
    """
    with replacing(path) as scratch:
        save_file(arrays, scratch, {"format": FORMAT, **about})
