"""The one decoder block of all draft heads.

The attention is passed in as a function of (queries, keys, values): training hands in the unrolled form, drafting the
one that reads a KV cache. Everything else is the same code, so that training and drafting cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmspec.types import InputError

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q [B, Hq, M, Dh], k, v [B, Hkv, M, Dh]) -> [B, Hq, M, Dh]; where k and v go is the function's business."""


class RotaryTable:
    """Cosines and sines by position, computed once and extended on demand; not part of any checkpoint.

    Args:
        dim: head dimension (even).
        theta: base of the frequencies.
    """

    def __init__(self, dim: int, theta: float) -> None:
        self.dim, self.theta = dim, theta
        self._cos = self._sin = self._axis = torch.empty(0)

    def at(self, positions: Tensor, bound: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rotation of each position.

        Args:
            positions: [B, M] int64, all below `bound`.
            bound: known on the host, so that no sync is needed to size the table.

        Returns:
            cos, sin, each [B, 1, M, dim].
        """
        self._extend(bound, positions.device, dtype)
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)

    def along(self, axes: Tensor, bound: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rotation by positions on three axes, each of which turns a section of the frequencies (`sections`).

        Where a token's three positions are equal it is that of `at`.

        Args:
            axes: [3, M] int64 (time, height, width), all from 0 and below `bound`.

        Returns:
            cos, sin, each [1, 1, M, dim].
        """
        self._extend(bound, axes.device, dtype)
        rows, columns = axes[self._axis].T, torch.arange(self.dim, device=axes.device)
        return self._cos[rows, columns][None, None], self._sin[rows, columns][None, None]

    def span(self, start: int, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Rotation of the positions start..start+n-1 of all rows: views of the table, [1, 1, n, dim]."""
        self._extend(start + n, like.device, like.dtype)
        return self._cos[None, None, start : start + n], self._sin[None, None, start : start + n]

    def _extend(self, bound: int, device: torch.device, dtype: torch.dtype) -> None:
        if self._cos.shape[0] >= bound and self._cos.dtype == dtype and self._cos.device == device:
            return
        size = 1 << max(bound - 1, 255).bit_length()
        # fp64 angles: at position 4,000 an fp32 product is off by more than bf16 can show, and it costs nothing.
        frequency = self.theta ** (-torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim)
        angles = torch.outer(torch.arange(size, dtype=torch.float64), frequency)
        angles = torch.cat([angles, angles], -1)
        self._cos, self._sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
        parts = torch.repeat_interleave(torch.arange(3), torch.tensor(sections(self.dim)))
        self._axis = parts.repeat(2).to(device)  # of each column, for `along`


def sections(dim: int) -> tuple[int, int, int]:
    """Frequencies of a head dimension that belong to time, height and width: a quarter and three eighths each.

    Source: M-RoPE of Qwen2-VL (arXiv 2409.12191), whose 64 frequencies are split into 16, 24 and 24.
    """
    pairs = dim // 2
    side = 3 * pairs // 8
    return pairs - 2 * side, side, side


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary positions (half-split layout) to x [B, H, M, Dh]."""
    cos, sin = rope
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], -1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Scaled dot-product attention with grouped heads left uncopied; mask is additive, [B, 1, M, L]."""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis of x [..., D], statistics in fp32 at least; weight [D], or [..., D]."""
    if x.dtype not in (torch.float32, torch.float64):
        return rms_norm(x.float(), weight.float(), eps).to(x.dtype)
    if weight.ndim == 1:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x, weight.shape[-1:], None, eps) * weight


class RMSNorm(nn.Module):
    """Root-mean-square norm, statistics in fp32 at least."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.fused: Tensor | None = None

    def fuse(self) -> None:
        """See `DecoderBlock.fuse`."""
        if _plain(self.gate_proj, self.up_proj):
            self.fused = joined([self.gate_proj, self.up_proj])

    def forward(self, x: Tensor) -> Tensor:
        if self.fused is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = F.linear(x, self.fused).chunk(2, -1)
        return cast(Tensor, self.down_proj(F.silu(gate) * up))


def _plain(*layers: nn.Module) -> bool:
    """Whether a layer is its weight and nothing else: what an adapter adds is not in the weight."""
    return all(isinstance(layer, nn.Linear) for layer in layers)


def joined(layers: Sequence[nn.Linear]) -> Tensor:
    """One matrix of several layers' weights, of which they become views."""
    joined = torch.cat([layer.weight.data for layer in layers])
    for layer, part in zip(layers, joined.split([layer.out_features for layer in layers])):
        layer.weight.data = part
    return joined


_READS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
"""Layers of a decoder layer that read its whole input."""


class DecoderBlock(nn.Module):
    """Llama-style block: attention with residual, RMSNorm, SwiGLU with residual.

    Args:
        width: D, output width; the input's too, or half of it when it is paired.
        n_heads, n_kv_heads, head_dim: attention shape.
        inner: MLP width.
        eps: of the norms.
        input_norm: RMSNorm before attention. EAGLE's block has none: its input is a fresh projection.
        paired: the input is [embedding; state], 2D wide. Attention reads both, each behind a norm of its own; the
            state alone is the residual stream.

    Source: EAGLE (arXiv 2401.15077), draft decoder layer; paired: EAGLE-3 (arXiv 2503.01840).
    """

    def __init__(
        self,
        width: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        inner: int,
        eps: float,
        input_norm: bool,
        paired: bool = False,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.input_layernorm = RMSNorm(width, eps) if input_norm else nn.Identity()
        self.hidden_norm = RMSNorm(width, eps) if paired else None
        read = 2 * width if paired else width
        self.q_proj = nn.Linear(read, n_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(read, n_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(read, n_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(n_heads * head_dim, width, bias=False)
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.mlp = SwiGLU(width, inner)
        self.heads = [n_heads, n_kv_heads, n_kv_heads]
        self.sizes = [n * head_dim for n in self.heads]
        self.fused: Tensor | None = None
        self.norms: Tensor | None = None
        self.recompute = False
        """Whether what is behind attention, the wide part, is computed again in the backward pass instead of kept."""

    def fuse(self) -> None:
        """For drafting: queries, keys and values by one product, gate and up by another, both norms of a pair at once.
        Matrices are not copied twice; call it when they are where they stay, and not on a block that will be trained.
        Adapted layers stay single."""
        if _plain(self.q_proj, self.k_proj, self.v_proj):
            self.fused = joined([self.q_proj, self.k_proj, self.v_proj])
        if isinstance(self.input_layernorm, RMSNorm) and self.hidden_norm is not None:
            self.norms = torch.stack([self.input_layernorm.weight.data, self.hidden_norm.weight.data])
        self.mlp.fuse()

    @torch.no_grad()
    def start_from(self, layer: Mapping[str, Tensor]) -> None:
        """Become a copy of a target's decoder layer.

        A paired block gets the layer's queries, keys and values in the half that reads the state, and zeros in the
        other: it begins as that layer over its states, blind to the embeddings.

        Args:
            layer: weights by the names of transformers' Llama layers (`self_attn.q_proj.weight`, ..).

        Raises:
            InputError: a weight has no counterpart here, has another shape, or is missing.
        """
        mine = {name.removesuffix(".weight"): weight for name, weight in self.named_parameters()}
        places = {f"self_attn.{name}": name for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        places |= {f"mlp.{name}": f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
        places |= {"post_attention_layernorm": "post_attention_layernorm"}
        places["input_layernorm"] = "hidden_norm" if self.hidden_norm is not None else "input_layernorm"
        found = {name.removesuffix(".weight"): weight for name, weight in layer.items()}
        for name in sorted(set(found) | set(places)):
            if name not in places or places[name] not in mine:
                raise InputError(f"the layer has {name}, for which the head's block has no place")
            if name not in found:
                raise InputError(f"the layer has no {name}, which the head's block needs")
            weight = mine[places[name]]
            half = weight[:, weight.shape[1] // 2 :] if self.hidden_norm is not None and name in _READS else weight
            if found[name].shape != half.shape:
                raise InputError(
                    f"the layer's {name} has shape {tuple(found[name].shape)}, the head's block asks for "
                    f"{tuple(half.shape)}"
                )
            weight.zero_()
            half.copy_(found[name])

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What attention reads of x, and the residual stream [B, M, D]."""
        if self.hidden_norm is None:
            return self.input_layernorm(x), x
        embeds, states = x.chunk(2, -1)
        if self.norms is not None:
            return rms_norm(x.unflatten(-1, (2, -1)), self.norms, self.hidden_norm.eps).flatten(-2), states
        return torch.cat([self.input_layernorm(embeds), self.hidden_norm(states)], -1), states

    def keys_values(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What later tokens need of x: in a one-layer head the past enters through these alone.

        Args:
            x: [B, M, D], or [B, M, 2D] when paired.
            rope: cos, sin of x's positions.

        Returns:
            keys (rotated) and values, each [B, Hkv, M, Dh].
        """
        read, _ = self._read(x)
        if self.fused is None:
            k, v = self.k_proj(read), self.v_proj(read)
        else:
            k, v = F.linear(read, self.fused[self.sizes[0] :]).split(self.sizes[1:], -1)
        return rotate(self._heads(k), rope), self._heads(v)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What comes before attention: residual stream [B, M, D], rotated queries and keys, and values."""
        read, residual = self._read(x)
        if self.fused is None:
            q, k, v = self.q_proj(read), self.k_proj(read), self.v_proj(read)
            return residual, rotate(self._heads(q), rope), rotate(self._heads(k), rope), self._heads(v)
        heads = self._heads(F.linear(read, self.fused))
        n_values = self.heads[-1]
        q, k = rotate(heads[:, :-n_values], rope).split(self.heads[:-1], 1)
        return residual, q, k, heads[:, -n_values:]

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        """[B, M, D] (paired: 2D) -> [B, M, D]; `attention` gets rotated queries and keys."""
        residual, q, k, v = self.project(x, rope)
        return self.finish(residual, attention(q, k, v))

    def reread(self, x: Tensor, rope: tuple[Tensor, Tensor], attention: Callable[[Tensor], Tensor]) -> Tensor:
        """The same for x whose keys and values are known already; `attention` gets rotated queries alone."""
        read, residual = self._read(x)
        return self.finish(residual, attention(rotate(self._heads(self.q_proj(read)), rope)))

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """What comes behind attention: residual [B, M, D] and attended [B, H, M, Dh] -> [B, M, D]."""
        x = residual + self.o_proj(attended.transpose(1, 2).flatten(2))
        if self.recompute and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(self._feed, x, use_reentrant=False))
        return self._feed(x)

    def _feed(self, x: Tensor) -> Tensor:
        return cast(Tensor, x + self.mlp(self.post_attention_layernorm(x)))
