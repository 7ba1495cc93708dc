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
        share: copy from the answers of earlier requests too, where the own text has no n-gram as long. Then how much is
            drafted depends on which requests came before; the text does not.
        max_shared: tokens of earlier answers to keep, at least the latest half of them; a million take half a gigabyte.
    """

    max_ngram: int = 3
    min_ngram: int = 1
    num_pred: int = 10
    prefer: str = "recent"
    share: bool = False
    max_shared: int = 200_000

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
        for name in ("num_pred", "max_shared"):
            if getattr(self, name) < 1:
                raise ValueError(f"pld: {name} must be at least 1, got {getattr(self, name)}")
        if self.prefer not in PREFER:
            raise ValueError(f"pld: prefer must be one of {', '.join(PREFER)}, got {self.prefer!r}")


@dataclass
class NGramIndex(Stream):
    """Where each n-gram of a growing stream was followed by something.

    `after[gram]` is the index of the token behind the first or the latest occurrence of the gram that has one.
    """

    config: Config
    shared: Answers | None = None
    n_prompt: int = 0
    stream: list[int] = field(default_factory=list)
    after: dict[tuple[int, ...], int] = field(default_factory=dict)

    def begin(self, prompt: Sequence[int]) -> None:
        """Append the prompt."""
        self.extend(prompt)
        self.n_prompt = len(self.stream)

    def close(self) -> None:
        """Leave the answer to later requests."""
        if self.shared is not None:
            self.shared.add(self.stream[self.n_prompt :])

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
        n, source, start = self._find()
        return n if n and source[start] >= 0 else 0

    def draft(self, depth: int, budget: int) -> Draft:
        """What followed the longest known context; nothing without a match."""
        n, source, start = self._find()
        if not n:
            return NOTHING
        copied = source[start : start + min(depth, budget, self.config.num_pred)]
        copied = list(copied[: next((i for i, token in enumerate(copied) if token < 0), len(copied))])
        return copied, list(range(len(copied)))

    def _find(self) -> tuple[int, Sequence[int], int]:
        """Length of the longest known n-gram at the end of the stream, the text that has it, and the index of what
        followed it there; (0, .., 0) without one."""
        for n in range(min(self.config.max_ngram, len(self.stream)), self.config.min_ngram - 1, -1):
            gram = tuple(self.stream[-n:])
            for index in (self, *(self.shared.kept if self.shared else ())):
                if (start := index.after.get(gram)) is not None:
                    return n, index.stream, start
        return 0, (), 0


class Answers:
    """Answers of requests that have ended, with gaps between them: the latest ones, and at most as many before them.

    Args:
        config: see `Config`.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.kept = [NGramIndex(config)]
        """The newest first; none is ever searched for what to forget."""

    def add(self, answer: Sequence[int]) -> None:
        if len(self.kept[0].stream) >= self.config.max_shared / 2:
            self.kept = [NGramIndex(self.config), self.kept[0]]
        self.kept[0].extend([*answer, -1])


class PromptLookupDrafter(HostDrafter):
    """Chains copied from the request's own text.

    Args:
        config: see `Config`.
    """

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config()
        self.shared = Answers(self.config) if self.config.share else None
        super().__init__(lambda: NGramIndex(self.config, self.shared))


def make(config: Config, target: Target) -> PromptLookupDrafter:
    """The method's drafter for a target."""
    return PromptLookupDrafter(config)
