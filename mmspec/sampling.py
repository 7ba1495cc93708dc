"""Choosing tokens: greedy, and sampling with noise that is keyed by (seed, request, position).

Keyed noise makes sampled text a function of the request alone: not of the batch it was decoded in, nor of the drafter,
the policy, or the shape of the tree. Argmax of `log p + Gumbel noise` is an exact sample of p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as int64: the Weyl increment of splitmix64
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finalizer (Steele et al. 2014): a bijection of int64 that decorrelates neighbours."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def gumbel_noise(seed: int, keys: Tensor, positions: Tensor, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """Standard Gumbel noise as a pure function of (seed, key, position, token).

    Args:
        keys: [B] int64, one a request.
        positions: [B, N] int64, index of the token to be chosen in its sequence.
        vocab_size: V.
        dtype: float32 or float64 of the result; the uniforms have 53 bits in either case.

    Returns:
        [B, N, V].
    """
    stream = _mix(_mix(keys + seed * _GOLDEN % 2**62).unsqueeze(1) ^ (positions * _GOLDEN))
    tokens = torch.arange(vocab_size, device=keys.device) * _GOLDEN
    bits = _shift(_mix(stream.unsqueeze(-1) + tokens), 11)
    uniform = (bits.to(torch.float64) + 0.5) * 2.0**-53
    return (-(-uniform.log()).log()).to(dtype)


@dataclass(frozen=True)
class GreedySampler:
    """Argmax of the logits; the lowest index wins a tie."""

    def scores(self, logits: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
        return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


@dataclass(frozen=True)
class KeyedSampler:
    """Temperature, top-k and top-p sampling with keyed Gumbel noise.

    Args:
        temperature: above 0.
        top_k: keep this many best tokens; 0 keeps all.
        top_p: keep the smallest set of best tokens with at least this probability; 1.0 keeps all.
        seed: with the request's key and the position it fixes the noise.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be above 0, got {self.temperature}; use GreedySampler for 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or positive, got {self.top_k}")

    def scores(self, logits: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
        """Perturbed log-probabilities [B, N, V]; tokens outside top-k or top-p are -inf."""
        work = logits if logits.dtype == torch.float64 else logits.float()
        work = work / self.temperature
        if self.top_k and self.top_k < work.shape[-1]:
            floor = work.topk(self.top_k, dim=-1).values[..., -1:]
            work = work.masked_fill(work < floor, -math.inf)
        if self.top_p < 1:
            ranked, order = work.sort(dim=-1, descending=True, stable=True)
            mass = ranked.softmax(-1).cumsum(-1)
            # A token stays when the mass before it is below top_p: the best one always does.
            beyond = (mass - ranked.softmax(-1)) >= self.top_p
            work = work.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -math.inf)
        return work + gumbel_noise(self.seed, keys, positions, work.shape[-1], work.dtype)


def make_sampler(temperature: float, top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> GreedySampler | KeyedSampler:
    """Greedy at temperature 0, else keyed sampling."""
    return GreedySampler() if temperature == 0 else KeyedSampler(temperature, top_k, top_p, seed)
