"""Choosing tokens: greedy, and sampling with noise that is keyed by (seed, request, position).

Invariant: a node's scores depend on its own path (prompt, committed tokens, ancestors), its request and its position,
never on its neighbours in the tree or in the batch. Order of the steps: repetition penalty, no-repeat-ngram,
temperature, top-k, top-p, noise; transformers' `generate` has the same.

Keyed noise makes sampled text a function of the request alone: not of the batch it was decoded in, nor of the drafter,
the policy, or the shape of the tree. Argmax of `log p + Gumbel noise` is an exact sample of p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmspec.types import Paths

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as int64: the Weyl increment of splitmix64
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685

DRAFT_STREAM, ACCEPT_STREAM, BONUS_STREAM = 1, 2, 3
"""Streams of keyed noise beside the samplers' own, 0."""


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finalizer (Steele et al. 2014): a bijection of int64 that decorrelates neighbours."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def uniform_noise(seed: int, keys: Tensor, positions: Tensor, n: int, stream: int = 0) -> Tensor:
    """Uniform numbers in (0, 1) as a pure function of (stream, seed, key, position, index).

    Args:
        keys: [B] int64, one a request.
        positions: [B, N] int64, index of the token to be chosen in its sequence.
        n: numbers wanted for each.
        stream: numbers of different streams are independent: one for each use of chance.

    Returns:
        [B, N, n] float64, with 53 bits.
    """
    state = _mix(_mix(keys + seed * _GOLDEN % 2**62).unsqueeze(1) ^ (positions * _GOLDEN))
    if stream:
        state = _mix(state ^ (stream * _MIX_1 % 2**62))
    bits = _shift(_mix(state.unsqueeze(-1) + torch.arange(n, device=keys.device) * _GOLDEN), 11)
    return (bits.to(torch.float64) + 0.5) * 2.0**-53


def gumbel_noise(
    seed: int, keys: Tensor, positions: Tensor, vocab_size: int, dtype: torch.dtype, stream: int = 0
) -> Tensor:
    """Standard Gumbel noise [B, N, V] as a pure function of (stream, seed, key, position, token).

    Args:
        dtype: float32 or float64 of the result.
        seed, keys, positions, stream: see `uniform_noise`.
    """
    uniform = uniform_noise(seed, keys, positions, vocab_size, stream)
    return (-(-uniform.log()).log()).to(dtype)


@dataclass(frozen=True)
class Penalties:
    """Changes of the logits that depend on the path: every node of a tree is penalised for what precedes it alone.

    Args:
        repetition: above 0; logits of tokens that occur on the path are divided by it when positive and multiplied
            when negative. 1.0 is off.
        no_repeat_ngram: no n-gram of this length may occur twice on a path; 0 is off.

    The prompt counts, image placeholders included. Source: transformers' RepetitionPenaltyLogitsProcessor (Keskar et
    al. 2019, arXiv 1909.05858) and NoRepeatNGramLogitsProcessor.
    """

    repetition: float = 1.0
    no_repeat_ngram: int = 0

    def __post_init__(self) -> None:
        if not (self.repetition > 0 and math.isfinite(self.repetition)):
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition}; 1.0 is off")
        if self.no_repeat_ngram < 0:
            raise ValueError(f"no_repeat_ngram must be 0 (off) or positive, got {self.no_repeat_ngram}")

    def __bool__(self) -> bool:
        return self.repetition != 1 or self.no_repeat_ngram > 0

    def apply(self, logits: Tensor, paths: Paths | None) -> Tensor:
        """Penalised logits [B, N, V]; the same tensor when everything is off.

        Raises:
            ValueError: a penalty is on and there are no paths.
        """
        if not self:
            return logits
        if paths is None:
            raise ValueError("penalties need the paths of the nodes; keep a history for samplers with needs_history")
        visible, V = _visible(paths), logits.shape[-1]
        if self.repetition != 1:
            tokens = torch.cat([paths.history, paths.trees.tokens], 1)
            penalised = torch.where(logits < 0, logits * self.repetition, logits / self.repetition)
            logits = torch.where(_marked(tokens, visible, V), penalised, logits)
        if self.no_repeat_ngram:
            last, *before = _windows(paths, self.no_repeat_ngram)
            S = paths.history.shape[1]
            repeats = visible
            # A window repeats a node's path when what precedes its last token ends the path. `before[k]` lies k + 1
            # tokens before a window's end, and becomes k before the end of the path that awaits its next token.
            for earlier, later in zip(before, [last, *before]):
                repeats = repeats & (earlier.unsqueeze(1) == later[:, S:].unsqueeze(2))
            logits = logits.masked_fill(_marked(last, repeats, V), -math.inf)
        return logits


def _visible(paths: Paths) -> Tensor:
    """[B, N, S + N] bool: which tokens, of the history and of the tree, are on each node's path."""
    B, N = paths.trees.tokens.shape
    committed = torch.arange(paths.history.shape[1], device=paths.lengths.device) < paths.lengths.unsqueeze(1)
    return torch.cat([committed.unsqueeze(1).expand(B, N, -1), paths.trees.ancestors], 2)


def _windows(paths: Paths, n: int) -> list[Tensor]:
    """The n tokens up to each token of the history and of the tree, latest first: n tensors [B, S + N], -1 before the
    first token."""
    history, lengths, trees = paths.history, paths.lengths, paths.trees
    B, S = history.shape
    node = torch.arange(trees.tokens.shape[1], device=history.device).expand(B, -1)
    place = lengths.unsqueeze(1) + trees.depths
    windows = []
    for back in range(n):
        past = torch.nn.functional.pad(history, (back, 0), value=-1)[:, :S]
        in_tree = trees.tokens.gather(1, node.clamp_min(0))
        committed = (
            history.gather(1, place.clamp(0, max(S - 1, 0))).masked_fill(place < 0, -1) if S else in_tree * 0 - 1
        )
        windows.append(torch.cat([past, torch.where(node >= 0, in_tree, committed)], 1))
        node = torch.where(node >= 0, trees.parents.gather(1, node.clamp_min(0)), node)
        place = place - 1
    return windows


def _marked(tokens: Tensor, on: Tensor, vocab_size: int) -> Tensor:
    """[B, N, V] bool: the tokens [B, W] that are on [B, N, W]."""
    B, N, _ = on.shape
    # Whatever is off, and ids beyond the logits, go to a spare column.
    index = tokens.clamp_max(vocab_size).unsqueeze(1).masked_fill(~on, vocab_size)
    table = torch.zeros((B, N, vocab_size + 1), dtype=torch.bool, device=tokens.device)
    return table.scatter_(2, index, True)[..., :vocab_size]


_NO_PENALTIES = Penalties()


@dataclass(frozen=True)
class GreedySampler:
    """Argmax of the logits; the lowest index wins a tie."""

    penalties: Penalties = _NO_PENALTIES
    sampled = False

    @property
    def needs_history(self) -> bool:
        return bool(self.penalties)

    def scores(self, logits: Tensor, keys: Tensor, positions: Tensor, paths: Paths | None = None) -> Tensor:
        work = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
        return self.penalties.apply(work, paths)


@dataclass(frozen=True)
class KeyedSampler:
    """Temperature, top-k and top-p sampling with keyed Gumbel noise.

    Args:
        temperature: above 0.
        top_k: keep this many best tokens; 0 keeps all.
        top_p: keep the smallest set of best tokens with at least this probability; 1.0 keeps all.
        seed: with the request's key and the position it fixes the noise.
        penalties: of tokens and n-grams that occurred before.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    penalties: Penalties = _NO_PENALTIES
    sampled = True

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be above 0, got {self.temperature}; use GreedySampler for 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or positive, got {self.top_k}")

    @property
    def needs_history(self) -> bool:
        return bool(self.penalties)

    def weights(self, logits: Tensor, paths: Paths | None = None) -> Tensor:
        """What is sampled from: log-probabilities up to a constant, [B, N, V]; outside top-k or top-p they are -inf."""
        work = logits if logits.dtype == torch.float64 else logits.float()
        work = self.penalties.apply(work, paths) / self.temperature
        if self.top_k and self.top_k < work.shape[-1]:
            floor = work.topk(self.top_k, dim=-1).values[..., -1:]
            work = work.masked_fill(work < floor, -math.inf)
        if self.top_p < 1:
            ranked, order = work.sort(dim=-1, descending=True, stable=True)
            mass = ranked.softmax(-1).cumsum(-1)
            # A token stays when the mass before it is below top_p: the best one always does.
            beyond = (mass - ranked.softmax(-1)) >= self.top_p
            work = work.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -math.inf)
        return work

    def scores(self, logits: Tensor, keys: Tensor, positions: Tensor, paths: Paths | None = None) -> Tensor:
        """Perturbed log-probabilities [B, N, V]; tokens outside top-k or top-p are -inf."""
        work = self.weights(logits, paths)
        return work + gumbel_noise(self.seed, keys, positions, work.shape[-1], work.dtype)


def make_sampler(
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram: int = 0,
) -> GreedySampler | KeyedSampler:
    """Greedy at temperature 0, else keyed sampling."""
    penalties = Penalties(repetition_penalty, no_repeat_ngram)
    return GreedySampler(penalties) if temperature == 0 else KeyedSampler(temperature, top_k, top_p, seed, penalties)
