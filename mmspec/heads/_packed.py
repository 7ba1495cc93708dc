"""Which work of a training step is needed, and the attention of the simulated draft steps over just that.

In a one-layer head the past enters through keys and values alone, and a simulated step sees of the other steps only
what stands at its own index. So everything but step 0's keys and values is computed at draft positions alone: those
from which a draft lies within one reply. They come in runs, one a reply; prompts, padding and what follows the last
reply of a conversation cost nothing, and several conversations may share a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmspec.types import Features

CHUNK = 256
"""Queries whose scores exist at a time where there is no fused kernel."""


@dataclass(frozen=True)
class Run:
    """The draft positions of one reply, consecutive; places count the packed tokens.

    Args:
        start: place of its conversation's first token.
        first: place of the first draft position.
        length: how many there are.
    """

    start: int
    first: int
    length: int


@dataclass(frozen=True)
class Packed:
    """The tokens of a batch that training looks at, one conversation behind the other.

    Args:
        tokens: [N] int64, where each stands in the batch, row after row: those that a draft position sees.
        positions: [N] int64, in its conversation.
        drafts: [M] int64, places of the draft positions, run after run.
        left: [M] int64, simulated steps whose predictions are still of the same reply.
        runs: one a reply, in order.
    """

    tokens: Tensor
    positions: Tensor
    drafts: Tensor
    left: Tensor
    runs: tuple[Run, ...]

    @property
    def starts(self) -> tuple[int, ...]:
        """Place of each conversation's first token."""
        return tuple(sorted({run.start for run in self.runs}))

    def only(self, kept: Tensor) -> Packed:
        """The same conversations without some of their tokens.

        Args:
            kept: [N] bool on the host, True at every draft position.

        Raises:
            ValueError: a draft position would be lost.
        """
        before = torch.cat([torch.zeros(1, dtype=torch.long), kept.cumsum(0)])
        place = before.tolist()
        if any(place[run.first + run.length] - place[run.first] < run.length for run in self.runs):
            raise ValueError("a reply holds image positions: drafts that begin there cannot be left out of training")
        runs = tuple(Run(place[run.start], place[run.first], run.length) for run in self.runs)
        chosen = kept.nonzero().squeeze(1).to(self.tokens.device)
        drafts = before.to(self.tokens.device)[self.drafts]
        return Packed(self.tokens[chosen], self.positions[chosen], drafts, self.left, runs)


def pack(features: Features) -> Packed:
    """Finds the replies of a batch.

    The shift contract: from position t the first draft predicts token t + 2, having read token t + 1; both, and all
    drafted ones between, belong to the same reply. So t runs from the last prompt token of the turn on.
    """
    segment = features.valid.long() if features.segment is None else features.segment
    rows = torch.arange(len(segment), device=segment.device).unsqueeze(1).expand_as(segment)
    marks = torch.stack([rows, segment, features.answer]).flatten(1).cpu()
    spans, counts = marks.unique_consecutive(dim=1, return_counts=True)
    runs: list[Run] = []
    tokens, positions = [torch.zeros(0, dtype=torch.long)], [torch.zeros(0, dtype=torch.long)]
    n_tokens, at, begin, packed, whose = 0, 0, 0, 0, None
    for (row, part, reply), n in zip(spans.T.tolist(), counts.tolist()):
        if (row, part) != whose:
            whose, begin, packed = (row, part), at, 0
        first = max(at - 1, begin) - begin
        length = at + n - 2 - begin - first
        if part and reply and length > 0:
            more = torch.arange(packed, first + length)
            tokens.append(begin + more)
            positions.append(more)
            start, packed, n_tokens = n_tokens - packed, first + length, n_tokens + len(more)
            runs.append(Run(start, start + first, length))
        at += n
    device, none = features.answer.device, torch.zeros(0, dtype=torch.long)
    drafts = [none, *(torch.arange(run.first, run.first + run.length) for run in runs)]
    left = [none, *(torch.arange(run.length, 0, -1) for run in runs)]
    found = [torch.cat(parts).to(device) for parts in (tokens, positions, drafts, left)]
    return Packed(found[0], found[1], found[2], found[3], tuple(runs))


class UnrolledAttention:
    """Training-time test: attention of the simulated draft steps (EAGLE-3, arXiv 2503.01840). Call it once a step.

    The draft position t at step s sees the true prefix (step-0 keys at places <= t of its conversation) and, of each
    simulated step 1..s, the key at its own index alone: just what drafting from the prefix t would see.

    No scores are kept: of a step autograd remembers queries, output and log-sum-exp (`_Unrolled`).

    Args:
        keys, values: [1, Hkv, N, Dh] of step 0, rotated.
        runs: see Packed.
    """

    def __init__(self, keys: Tensor, values: Tensor, runs: Sequence[Run]) -> None:
        self.keys, self.values, self.runs = keys, values, runs
        self.own: list[Tensor] = []

    def __call__(self, q: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        """[1, Hq, M, Dh] -> the same; at step 0 the queries come alone."""
        if k is not None and v is not None:
            self.own += [k, v]
        out: Tensor = _Unrolled.apply(self.runs, q, self.keys, self.values, *self.own)
        return out


class _Unrolled(torch.autograd.Function):
    """Softmax over a prefix and a few keys of a query's own, its parts joined by their log-sum-exps.

    With output and log-sum-exp of the whole softmax at hand, the gradient of each part is that of plain attention:
    its weights are exp(score - lse), and what they share, <gradient, output>, is known. So parts need no memory.
    """

    @staticmethod
    def forward(ctx: Any, runs: Sequence[Run], q: Tensor, keys: Tensor, values: Tensor, *own: Tensor) -> Tensor:
        out, attend = torch.empty_like(q), _kernels(q)[0]
        lse = q.new_empty(q.shape[:-1], dtype=_wide(q))
        for at, causal, seen in _parts(runs):
            part = attend(q[:, :, at], _spread(keys[:, :, seen], q), _spread(values[:, :, seen], q), causal)
            if not causal:  # the run itself came first
                part = _joined((out[:, :, at], lse[:, :, at]), part)
            out[:, :, at], lse[:, :, at] = part
        if own:
            scores = [_dot(q, _spread(k, q)) * q.shape[-1] ** -0.5 for k in own[::2]]
            total = torch.stack([lse, *scores]).logsumexp(0)
            out *= (lse - total).exp_().unsqueeze(-1)
            for score, v in zip(scores, own[1::2]):
                out += (score - total).exp_().unsqueeze(-1) * _spread(v, q)
            lse = total
        ctx.save_for_backward(q, keys, values, out, lse, *own)
        ctx.runs = runs
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        q, keys, values, out, lse, *own = ctx.saved_tensors
        grad, scale, retrace = upstream[0], q.shape[-1] ** -0.5, _kernels(q)[1]
        dq, dkeys, dvalues = torch.zeros_like(q), torch.zeros_like(keys), torch.zeros_like(values)
        for at, causal, seen in _parts(ctx.runs):
            k, v = _spread(keys[:, :, seen], q), _spread(values[:, :, seen], q)
            dq_part, dk, dv = retrace(grad[:, :, at], q[:, :, at], k, v, out[:, :, at], lse[:, :, at], causal)
            dq[:, :, at] += dq_part
            dkeys[:, :, seen] += _gathered(dk, keys)
            dvalues[:, :, seen] += _gathered(dv, values)
        shared, downs = _dot(grad, out), []
        for k, v in zip(own[::2], own[1::2]):
            k_all = _spread(k, q)
            weight = (_dot(q, k_all) * scale - lse).exp_()
            slope = (weight * (_dot(grad, _spread(v, q)) - shared) * scale).unsqueeze(-1)
            dq += slope * k_all
            downs.append(_gathered(slope * q, k).to(k.dtype))
            downs.append(_gathered(weight.unsqueeze(-1) * grad, v).to(v.dtype))
        return None, dq, dkeys, dvalues, *downs


def _parts(runs: Sequence[Run]) -> list[tuple[slice, bool, slice]]:
    """Of each run: which queries, whether causally, and places of the keys; the run itself, then all before it."""
    parts, at = [], 0
    for run in runs:
        queries = slice(at, at + run.length)
        parts.append((queries, True, slice(run.first, run.first + run.length)))
        if run.first > run.start:
            parts.append((queries, False, slice(run.start, run.first)))
        at += run.length
    return parts


def _joined(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from that over each: outputs and log-sum-exps."""
    total = torch.logaddexp(a[1], b[1])
    return a[0] * (a[1] - total).exp().unsqueeze(-1) + b[0] * (b[1] - total).exp().unsqueeze(-1), total


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of scores: fp32 at least."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, dtype=_wide(a))


def _spread(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values of grouped heads, one for each query head."""
    groups = q.shape[1] // x.shape[1]
    return x.repeat_interleave(groups, 1) if groups > 1 else x


def _gathered(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from that of `_spread(x)`."""
    return gradient if gradient.shape[1] == x.shape[1] else gradient.unflatten(1, (x.shape[1], -1)).sum(2)


# ---- plain attention with its log-sum-exp ----

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _kernels(q: Tensor) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., tuple[Tensor, Tensor, Tensor]]]:
    return (fused, fused_backward) if q.device.type == "cpu" else (chunked, chunked_backward)


def fused(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Output [B, H, M, Dh] and log-sum-exp [B, H, M], by the kernel behind torch's sdpa on a CPU."""
    out, lse = _fused(q, k, v, 0.0, causal)
    return out, lse


def fused_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v; `out` and `lse` may be those of a softmax over more keys."""
    dq, dk, dv = _fused_backward(grad, q, k, v, out, lse, 0.0, causal)
    return dq, dk, dv


def chunked(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """`fused` in plain operations, on any device."""
    outs, lses = [], []
    for at, scores in _scores(q, k, causal):
        lses.append(scores.logsumexp(-1))
        outs.append((scores - lses[-1].unsqueeze(-1)).exp().to(v.dtype) @ v[:, :, : at.stop if causal else None])
    return torch.cat(outs, 2), torch.cat(lses, 2)


def chunked_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`fused_backward` in plain operations."""
    dq, dk, dv, shared = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v), _dot(grad, out)
    for at, scores in _scores(q, k, causal):
        seen = slice(at.stop if causal else None)
        weights = (scores - lse[:, :, at].unsqueeze(-1)).exp()
        dv[:, :, seen] += weights.to(v.dtype).transpose(-1, -2) @ grad[:, :, at]
        slopes = (grad[:, :, at] @ v[:, :, seen].transpose(-1, -2)).to(weights.dtype) - shared[:, :, at].unsqueeze(-1)
        slopes = (slopes * weights * q.shape[-1] ** -0.5).to(q.dtype)
        dq[:, :, at] = slopes @ k[:, :, seen]
        dk[:, :, seen] += slopes.transpose(-1, -2) @ q[:, :, at]
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor, causal: bool) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of queries and their scores; a causal chunk's reach to its own end."""
    M = q.shape[2]
    for start in range(0, M, CHUNK):
        at = slice(start, min(start + CHUNK, M))
        seen = k[:, :, : at.stop] if causal else k
        scores = (q[:, :, at] @ seen.transpose(-1, -2)).to(_wide(q)) * q.shape[-1] ** -0.5
        if causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(start + 1)
            scores = scores.masked_fill(hidden, float("-inf"))
        yield at, scores
