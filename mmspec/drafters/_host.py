"""What drafters without weights share: one stream of tokens a row on the host, drafts packed into trees.

A drafter of this kind is its `Stream`; batches, image placeholders and uploads are dealt with here.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mmspec.cache import upload
from mmspec.tree import chain, from_parents, root_only
from mmspec.types import Forward, Plan, Request, Round, Tree

Draft = tuple[list[int], list[int]]
"""Tokens behind the root, and the tree index of each one's parent (0 is the root), parents before children."""

NOTHING: Draft = ([], [])


class Stream:
    """What one row has seen: its prompt and answer. Negative tokens stand for images: never matched, never drafted."""

    def begin(self, prompt: Sequence[int]) -> None:
        """Take in the prompt, before anything else; the answer's first token follows by `extend`."""
        self.extend(prompt)

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in decided tokens; the last of them is the root of the next draft."""
        raise NotImplementedError

    def draft(self, depth: int, budget: int) -> Draft:
        """At most `budget` nodes on at most `depth` levels behind the last token; siblings have distinct tokens."""
        raise NotImplementedError

    def match(self) -> int:
        """Length of the newest context that was found earlier: how far the next draft can be trusted. 0: not at all."""
        return 0

    def close(self) -> None:
        """The request has ended."""


class Trust:
    """How often copies went on being right, by the length of the match they came from: what a copy's nodes are worth.

    Counts fade, so that it follows the text; what was never tried has an even chance.
    """

    _MEMORY = 0.98
    _EDGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)

    def __init__(self) -> None:
        self.counts = [[1.0, 2.0] for _ in range(len(self._EDGES) + 1)]

    def _of(self, match: int) -> list[float]:
        return self.counts[bisect.bisect_right(self._EDGES, match)]

    def learn(self, match: int, offered: int, accepted: int) -> None:
        """Take in a chain of `offered` tokens of which the first `accepted` were right.

        One that was not worth offering is a step back to an even chance, so that it will be offered again.
        """
        entry = self._of(match)
        if not offered:
            entry[:] = [0.99 * entry[0] + 0.01, 0.99 * entry[1] + 0.02]
            return
        entry[0] = self._MEMORY * entry[0] + accepted
        entry[1] = self._MEMORY * entry[1] + min(accepted + 1, offered)

    def chance(self, match: int) -> float:
        """That a token is right once those before it are."""
        right, tried = self._of(match)
        return min(max(right / tried, 1e-3), 0.999)

    def score(self, match: int, depth: int) -> float:
        """Log-probability that the first `depth` tokens are right."""
        return depth * math.log(self.chance(match))

    def expected(self, match: int, length: int) -> float:
        """Tokens of a chain of `length` that will be right."""
        h = self.chance(match)
        return h * (1 - h**length) / (1 - h)


class HostDrafter:
    """Drafts from one stream a row; a row without a draft gets its root alone.

    Args:
        start: makes the stream of a new row.

    All of it runs in the loop's own thread: a step of a stream takes 20 to 60 us, and the handoff to a worker 40. The
    prompt of a new row, which takes milliseconds, is read before its root is asked for: a GPU's prefill runs meanwhile.
    """

    taps: tuple[int, ...] = ()

    def __init__(self, start: Callable[[], Stream]) -> None:
        self.start = start
        self.rows: list[Stream | None] = []
        self.trust = Trust()
        self.learns = False
        """Whether `trust` is kept although no plan asks for scores."""
        self.drafted: list[tuple[int, int]] = []
        """Of the round under way, per row: length of the match, and of the chain copied from it (0: none)."""

    def open(self, max_batch: int, max_tokens: int) -> None:
        self.rows = [None] * max_batch
        self.drafted = []

    def admit(self, row: int, request: Request, forward: Forward, root: Tensor) -> None:
        stream, prompt = self.start(), request.prompt
        # One placeholder stands for an image: the others would only fill the index.
        again = prompt.visual.clone()
        again[1:] &= prompt.visual[:-1]
        again[:1] = False
        stream.begin(prompt.input_ids.masked_fill(prompt.visual, -1)[~again].tolist())
        stream.extend([int(root)])
        self.rows[row] = stream

    def evict(self, row: int) -> None:
        stream, self.rows[row] = self.rows[row], None
        if stream:
            stream.close()

    def observe(self, round: Round) -> None:
        widest = round.trees.tokens.shape[1] - 1
        for (match, length), path in zip(self.drafted, round.paths):
            if path and length:
                self.trust.learn(match, min(length, widest), len(path) - 1)  # as much of it as was verified
        self.drafted = []
        for stream, tokens in zip(self.rows, round.tokens):
            if stream and tokens:
                stream.extend(tokens)

    def matches(self) -> list[int]:
        """`Stream.match` of every row, 0 where there is no request."""
        return [stream.match() if stream else 0 for stream in self.rows]

    def propose(self, roots: Tensor, plan: Plan) -> Tree:
        """Chains and trees as the streams draft them; with scores where the plan prunes and all are chains."""
        drafts = [s.draft(plan.depth, n) if s and n else NOTHING for s, n in zip(self.rows, plan.budget)]
        if plan.prune is None and not self.learns:
            return pack(roots, drafts)
        matches = self.matches()
        chains = [parents == list(range(len(parents))) for _, parents in drafts]
        self.drafted = [(m, len(d[0]) if c else 0) for m, d, c in zip(matches, drafts, chains)]
        trees = pack(roots, drafts)
        if plan.prune is None or not all(chains) or not trees.max_depth:
            return trees
        widest = trees.tokens.shape[1]
        lines = [[self.trust.score(m, k) if k <= n else float("-inf") for k in range(widest)] for m, n in self.drafted]
        return replace(trees, scores=upload(lines, roots.device))


def pack(roots: Tensor, drafts: Sequence[Draft]) -> Tree:
    """Trees of a batch from drafts on the host, with one upload.

    Args:
        roots: [B] int64.
        drafts: one for each row.
    """
    longest = max(len(tokens) for tokens, _ in drafts)
    if not longest:
        return root_only(roots)
    line = list(range(longest))
    if all(parents == line for _, parents in drafts):
        drafted = upload([tokens for tokens, _ in drafts], roots.device)
        return chain(torch.cat([roots.unsqueeze(1), drafted], 1))
    padded = [
        [row + [fill] * (longest - len(row)) for row, fill in zip(draft, (0, -1))]  # tokens, parents
        for draft in drafts
    ]
    packed = upload(padded, roots.device)
    tokens = torch.cat([roots.unsqueeze(1), packed[:, 0]], 1)
    parents = torch.cat([torch.full_like(roots, -1).unsqueeze(1), packed[:, 1]], 1)
    return from_parents(tokens, parents, max(_depth(parents) for _, parents in drafts))


def _depth(parents: Sequence[int]) -> int:
    """Levels of one draft."""
    depths = [0]
    for parent in parents:
        depths.append(depths[parent] + 1)
    return max(depths)
