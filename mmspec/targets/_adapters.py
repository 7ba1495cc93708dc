"""What transformers sees of us: an attention function registered by name, and a cache layer over ragged buffers.

The attention leaves grouped heads uncopied and can measure how much a query looks at the image without eager attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from mmspec.cache import RaggedKV

ATTENTION = "mmspec"
RECORDER, SEGMENTS = "mmspec_recorder", "mmspec_segments"
"""What an attention module may carry during a pass: who measures it, and where the conversations of its rows stand."""
_MASS_CHUNK = 128


class MassRecorder:
    """Collects visual attention mass during a teacher pass: per wanted layer, [B, T] fp32, the mean over heads."""

    def __init__(self, layers: Sequence[int], visual: Tensor) -> None:
        self.visual = visual
        self.mass: dict[int, Tensor] = dict.fromkeys(layers, visual.new_zeros(visual.shape, dtype=torch.float32))

    def record(self, layer: int, q: Tensor, k: Tensor, scaling: float, mask: Tensor | None) -> None:
        """Softmax row by row in chunks, so that no [H, T, T] tensor exists. q [B,Hq,T,Dh], k [B,Hkv,T,Dh]; causal."""
        if layer not in self.mass:
            return
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1) if q.shape[1] != k.shape[1] else k
        T, columns = q.shape[2], torch.arange(k.shape[2], device=q.device)
        parts = []
        for start in range(0, T, _MASS_CHUNK):
            rows = torch.arange(start, min(start + _MASS_CHUNK, T), device=q.device)
            scores = (q[:, :, rows] @ k.transpose(-1, -2)).float() * scaling
            weights = scores.masked_fill(columns > rows[:, None], float("-inf")).softmax(-1)
            parts.append((weights.mean(1) * self.visual.unsqueeze(1)).sum(-1))
        self.mass[layer] = torch.cat(parts, 1)


class NodeMass:
    """Collects visual attention mass of one layer during a pass over a cache: of each tree node, or of a prompt's end.

    Args:
        visual: [B, S] bool, the cache's slots that hold image positions.

    Attributes:
        mass: [B, N] fp32, the mean over heads; after a prefill [1, 1].
    """

    def __init__(self, visual: Tensor) -> None:
        self.visual = visual
        self.mass: Tensor | None = None

    def record(self, layer: int, q: Tensor, k: Tensor, scaling: float, mask: Tensor | None) -> None:
        """q [B, Hq, N, Dh], k [B, Hkv, S, Dh], mask [B, 1, N, S] additive; without one the last query sees all."""
        if mask is None:
            q = q[:, :, -1:]
        B, Hq, N, _ = q.shape
        scores = (q.reshape(B, k.shape[1], -1, q.shape[-1]) @ k.transpose(-1, -2)).view(B, Hq, N, -1).float() * scaling
        weights = (scores if mask is None else scores + mask).softmax(-1).mean(1)
        self.mass = (weights * self.visual[:, None, : k.shape[2]]).sum(-1)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature on torch's sdpa; without a mask it is causal from an empty cache, within each
    conversation where several share a row."""
    recorder: MassRecorder | NodeMass | None = module.__dict__.get(RECORDER)
    if recorder is not None:
        recorder.record(int(module.layer_idx), query, key, scaling or query.shape[-1] ** -0.5, attention_mask)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=attention_mask,
            is_causal=attention_mask is None and q.shape[2] > 1,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )

    segments: Sequence[tuple[int, slice]] | None = module.__dict__.get(SEGMENTS)
    if segments is None:
        return attend(query, key, value).transpose(1, 2), None
    out = torch.zeros_like(query)
    for row, at in segments:
        q, k, v = (x[row : row + 1, :, at] for x in (query, key, value))
        out[row : row + 1, :, at] = attend(q, k, v)
    return out.transpose(1, 2), None


def _no_mask(*_: Any, **__: Any) -> None:
    """Without an explicit 4-D mask the attention above is causal by itself."""
    return None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)


class RaggedLayer(CacheLayerMixin):
    """One layer of `RaggedKV` behind the interface that transformers expects of a cache layer."""

    is_sliding = False

    def __init__(self, kv: RaggedKV, layer: int) -> None:
        super().__init__()
        self.kv, self.layer, self.is_initialized = kv, layer, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the buffers exist."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.kv.write(self.layer, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.kv.offset + query_length, 0

    def get_seq_length(self) -> int:
        return self.kv.offset

    def get_max_length(self) -> int:
        return self.kv.capacity
