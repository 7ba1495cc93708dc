"""Prompt lookup: draft what followed the last time the newest tokens occurred (Saxena 2023, "prompt lookup decoding").

The n-grams of each row are kept in a dictionary on the host, so a token costs the same whether 100 or 100,000 came
before it. Image placeholders are never matched and never drafted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmspec.tree import from_parents, root_only
from mmspec.types import Forward, Plan, Request, Round, Tree

PREFER = ("recent", "first")


@dataclass(frozen=True)
class Config:
    """Settings.

    Args:
        max_ngram, min_ngram: lengths of the context to look up, longest first.
        num_pred: tokens to draft.
        prefer: "recent" or "first", which earlier occurrence to copy from.
    """

    max_ngram: int = 3
    min_ngram: int = 1
    num_pred: int = 10
    prefer: str = "recent"

    def __post_init__(self) -> None:
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise ValueError(f"pld needs 1 <= min_ngram <= max_ngram, got {self.min_ngram} and {self.max_ngram}")
        if self.num_pred < 1:
            raise ValueError(f"pld: num_pred must be at least 1, got {self.num_pred}")
        if self.prefer not in PREFER:
            raise ValueError(f"pld: prefer must be one of {', '.join(PREFER)}, got {self.prefer!r}")


@dataclass
class NGramIndex:
    """Where each n-gram of a growing stream was followed by something.

    `after[gram]` is the index of the token behind the first or the latest occurrence of the gram that has one.
    """

    config: Config
    stream: list[int] = field(default_factory=list)
    after: dict[tuple[int, ...], int] = field(default_factory=dict)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens; negative ones stand for what can be neither matched nor drafted."""
        stream, recent = self.stream, self.config.prefer == "recent"
        for token in tokens:
            end = len(stream)
            for n in range(1, min(self.config.max_ngram, end) + 1):
                if stream[end - n] < 0:
                    break
                gram = tuple(stream[end - n : end])
                if n >= self.config.min_ngram and (recent or gram not in self.after):
                    self.after[gram] = end
            stream.append(token)

    def draft(self, length: int) -> list[int]:
        """At most `length` tokens that followed the longest known context; [] without a match."""
        stream = self.stream
        for n in range(min(self.config.max_ngram, len(stream)), self.config.min_ngram - 1, -1):
            start = self.after.get(tuple(stream[-n:]))
            if start is not None:
                copied = stream[start : start + length]
                return copied[: next((i for i, token in enumerate(copied) if token < 0), len(copied))]
        return []


class PromptLookupDrafter:
    """Chains copied from the request's own text; a row without a match gets its root alone.

    Args:
        config: see `Config`.
    """

    taps: tuple[int, ...] = ()

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config()

    def open(self, max_batch: int, max_tokens: int) -> None:
        self.rows: list[NGramIndex | None] = [None] * max_batch

    def admit(self, row: int, request: Request, forward: Forward, root: Tensor) -> None:
        prompt, index = request.prompt, NGramIndex(self.config)
        index.extend([*prompt.input_ids.masked_fill(prompt.visual, -1).tolist(), int(root)])
        self.rows[row] = index

    def evict(self, row: int) -> None:
        self.rows[row] = None

    def observe(self, round: Round) -> None:
        for index, tokens in zip(self.rows, round.tokens):
            if index:
                index.extend(tokens)

    def propose(self, roots: Tensor, plan: Plan) -> Tree:
        limit = min(plan.depth, self.config.num_pred)
        drafts = [i.draft(min(limit, n)) if i and n else [] for i, n in zip(self.rows, plan.budget)]
        longest = max(map(len, drafts))
        if not longest:
            return root_only(roots)
        # One upload: drafts, padded, and how many of them count.
        packed = torch.tensor([[len(d), *d, *[0] * (longest - len(d))] for d in drafts]).to(roots.device)
        tokens = torch.cat([roots.unsqueeze(1), packed[:, 1:]], 1)
        parents = torch.arange(-1, longest, device=roots.device).expand_as(tokens)
        parents = parents.masked_fill(parents >= packed[:, :1], -1)
        return from_parents(tokens, parents, longest)
