"""SAM decoding: draft what followed the longest recent context that occurred before (Hu et al. 2024, arXiv 2411.10666).

A suffix automaton of the row's own prompt and answer knows that context after each token, without a limit of its length
and in constant time; one that was built over a corpus (scripts/build_sam.py) is walked beside it, and drafts a tree
where it knows clearly more. Image placeholders are never matched and never drafted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmspec.drafters._automaton import Automaton, StaticAutomaton
from mmspec.drafters._host import NOTHING, Draft, HostDrafter, Stream
from mmspec.types import Target

PREFER = ("first", "recent")


@dataclass(frozen=True)
class Config:
    """Settings.

    Args:
        n_predicts: tokens of a round, the target's own included: at most `n_predicts - 1` are drafted.
        alpha: drafted tokens for each token of the match.
        min_match: shorter matches are not drafted from.
        prefer: "first" or "recent", which earlier occurrence to copy from.
        static: file of a static automaton, or "" for none.
        k: nodes on a level of a draft from the static automaton.
        static_bias: tokens by which a match in the static automaton must be longer than one in the text.
    """

    n_predicts: int = 40
    alpha: float = 4.0
    min_match: int = 1
    prefer: str = "first"
    static: str = ""
    k: int = 8
    static_bias: int = 5

    @property
    def depth(self) -> int:
        """Levels to ask for."""
        return self.n_predicts - 1

    @property
    def budget(self) -> int:
        """Nodes to ask for."""
        return self.n_predicts - 1

    def __post_init__(self) -> None:
        for name, least in (("n_predicts", 2), ("min_match", 1), ("k", 1), ("static_bias", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"sam: {name} must be at least {least}, got {getattr(self, name)}")
        if not self.alpha > 0:
            raise ValueError(f"sam: alpha must be above 0, got {self.alpha}")
        if self.prefer not in PREFER:
            raise ValueError(f"sam: prefer must be one of {', '.join(PREFER)}, got {self.prefer!r}")


class SuffixStream(Stream):
    """One row: its tokens, their automaton, and its place in the static automaton.

    The match is found by the very search that inserts the newest token, so it is always that of an earlier occurrence.

    Attributes:
        matched: length of the longest suffix that occurred before.
        start: index of the token that followed it there.
        state, known: of the longest suffix that the corpus holds, its state and length.
    """

    def __init__(self, config: Config, static: StaticAutomaton | None = None) -> None:
        self.config, self.static, self.automaton = config, static, Automaton()
        self.tokens: list[int] = []
        self.matched = self.start = self.state = self.known = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens; negative ones stand for what can be neither matched nor drafted."""
        automaton, static, recent = self.automaton, self.static, self.config.prefer == "recent"
        for token in tokens:
            index = len(self.tokens)
            self.tokens.append(token)
            if token < 0:
                automaton.cut()
                self.matched = self.state = self.known = 0
                continue
            seen = automaton.append(token, index)
            self.matched, self.start = automaton.length[seen], automaton.end[seen] + 1
            if recent:
                automaton.renew(seen, index)
            if static:
                self.state, self.known = static.step(self.state, self.known, token)

    def match(self) -> int:
        """Tokens of context that speak for the draft: of the text, or of the corpus less its bias."""
        return max(self.matched, self.known - self.config.static_bias)

    def draft(self, depth: int, budget: int) -> Draft:
        """A chain copied from the text, or a tree from the corpus where it knows more of the context."""
        config = self.config
        match = self.match()
        if match < config.min_match:
            return NOTHING
        if self.static and match > self.matched:
            return self.static.expand(self.state, min(depth, config.depth), min(budget, config.budget), config.k)
        length = min(depth, budget, config.depth, int(config.alpha * self.matched))
        copied = self.tokens[self.start : self.start + length]
        if copied and min(copied) < 0:
            del copied[next(i for i, token in enumerate(copied) if token < 0) :]
        else:
            # In a loop the text ends before the copy does: it goes on with what it has copied.
            period = len(copied)
            copied += [copied[i % period] for i in range(length - period)]
        return copied, list(range(len(copied)))


class SamDrafter(HostDrafter):
    """Chains from the request's own text, trees from a corpus.

    Args:
        config: see `Config`; its file is not opened here but by `make`.
        static: the automaton of a corpus, shared by all rows.
    """

    def __init__(self, config: Config | None = None, static: StaticAutomaton | None = None) -> None:
        self.config = config or Config()
        super().__init__(lambda: SuffixStream(self.config, static))


def make(config: Config, target: Target) -> SamDrafter:
    """The method's drafter for a target.

    Raises:
        InputError: the static automaton cannot be read, or was built for another vocabulary.
    """
    static = StaticAutomaton.load(config.static, target.vocabulary, target.name) if config.static else None
    return SamDrafter(config, static)
