"""What drafters without weights share: one stream of tokens a row on the host, drafts packed into trees.

A drafter of this kind is its `Stream`; batches, image placeholders and uploads are dealt with here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

    def open(self, max_batch: int, max_tokens: int) -> None:
        self.rows = [None] * max_batch

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
        for stream, tokens in zip(self.rows, round.tokens):
            if stream and tokens:
                stream.extend(tokens)

    def matches(self) -> list[int]:
        """`Stream.match` of every row, 0 where there is no request."""
        return [stream.match() if stream else 0 for stream in self.rows]

    def propose(self, roots: Tensor, plan: Plan) -> Tree:
        drafts = [s.draft(plan.depth, n) if s and n else NOTHING for s, n in zip(self.rows, plan.budget)]
        return pack(roots, drafts)


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
