"""Prompt lookup: draft what followed the last time the newest tokens occurred (Saxena 2023, "prompt lookup decoding").

The n-grams of each row are kept in a dictionary on the host, so a token costs the same whether 100 or 100,000 came
before it. Image placeholders are never matched and never drafted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mmspec.drafters._host import NOTHING, Draft, HostDrafter, Stream
from mmspec.types import Target

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

    @property
    def depth(self) -> int:
        """Levels to ask for."""
        return self.num_pred

    @property
    def budget(self) -> int:
        """Nodes to ask for."""
        return self.num_pred

    def __post_init__(self) -> None:
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise ValueError(f"pld needs 1 <= min_ngram <= max_ngram, got {self.min_ngram} and {self.max_ngram}")
        if self.num_pred < 1:
            raise ValueError(f"pld: num_pred must be at least 1, got {self.num_pred}")
        if self.prefer not in PREFER:
            raise ValueError(f"pld: prefer must be one of {', '.join(PREFER)}, got {self.prefer!r}")


@dataclass
class NGramIndex(Stream):
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

    def match(self) -> int:
        """Length of the longest known n-gram that the stream ends with; 0 when nothing can be copied from behind it."""
        n, start = self._find()
        return n if n and self.stream[start] >= 0 else 0

    def draft(self, depth: int, budget: int) -> Draft:
        """What followed the longest known context; nothing without a match."""
        n, start = self._find()
        if not n:
            return NOTHING
        copied = self.stream[start : start + min(depth, budget, self.config.num_pred)]
        copied = copied[: next((i for i, token in enumerate(copied) if token < 0), len(copied))]
        return copied, list(range(len(copied)))

    def _find(self) -> tuple[int, int]:
        """Length of the longest known n-gram at the end of the stream, and the index of what followed it; or (0, 0)."""
        for n in range(min(self.config.max_ngram, len(self.stream)), self.config.min_ngram - 1, -1):
            start = self.after.get(tuple(self.stream[-n:]))
            if start is not None:
                return n, start
        return 0, 0


class PromptLookupDrafter(HostDrafter):
    """Chains copied from the request's own text.

    Args:
        config: see `Config`.
    """

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config()
        super().__init__(lambda: NGramIndex(self.config))


def make(config: Config, target: Target) -> PromptLookupDrafter:
    """The method's drafter for a target."""
    return PromptLookupDrafter(config)
