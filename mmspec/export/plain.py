"""The layouts computed from their files alone: plain fp32 sums, one attention, no code of the heads or of the writer.

What it reads of a folder is what an engine reads: names, layer ids, maps of the vocabulary and rotary settings are
taken from there, by the engines' rules, so a wrong one of them gives other logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmspec.safety import check_file, read_settings


@dataclass(frozen=True)
class Sample:
    """Made-up states and tokens: a prefix of T pairs and S tokens drafted behind it; N = T + S.

    Args:
        hidden: {index: [N, D]}, the target's hidden_states; its last one, past the final norm, is under -1.
        ids: [N] int64, the token of each pair: the one behind its state.
        embeds: [N, D], their embeddings, for layouts that keep none.
        axes: [3, N] int64, positions; three equal rows where the head counts tokens.
        n_steps: S.
    """

    hidden: Mapping[int, Tensor]
    ids: Tensor
    embeds: Tensor
    axes: Tensor
    n_steps: int


@dataclass(frozen=True)
class Folder:
    """What is in an exported folder: settings, and tensors in fp32 where they are weights."""

    settings: dict[str, Any]
    tensors: dict[str, Tensor]


def read(place: Path) -> Folder:
    """Reads an exported folder.

    Raises:
        InputError: files that are missing, damaged or refused by `mmspec.safety`.
    """
    tensors = load_file(str(check_file(place / "model.safetensors")))
    floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    return Folder(read_settings(place / "config.json"), floats)


def layer_ids(settings: Mapping[str, Any], n_layers: int) -> list[int]:
    """Indices into hidden_states that an engine hands out, in its order: that of the layers."""
    if "transformer_layer_config" in settings:  # vLLM: what enters layer id
        return sorted(settings["eagle_aux_hidden_state_layer_ids"])
    said = settings["eagle_config"].get("eagle_aux_hidden_state_layer_ids")  # SGLang: what enters layer id + 1
    return [2, n_layers // 2, n_layers - 3] if said is None else sorted(layer + 1 for layer in said)


def eagle3_logits(folder: Folder, sample: Sample, n_layers: int) -> Tensor:
    """Logits [N, V] over the target's vocabulary, -inf where the head has no token: of the T pairs, then of S drafts
    behind the last, each of which reads the state before it.

    Args:
        folder: of the sglang or the speculators layout.
        n_layers: of the target.
    """
    w, settings = folder.tensors, folder.settings
    block = settings.get("transformer_layer_config", settings)
    prefix = "layers.0." if "transformer_layer_config" in settings else "midlayer."
    eps, n = block["rms_norm_eps"], len(sample.ids) - sample.n_steps
    rope = {**block, **(block.get("rope_scaling") or {}), **(block.get("rope_parameters") or {})}
    aux = torch.cat([sample.hidden[i] for i in layer_ids(settings, n_layers)], -1)
    states = aux[:n] @ w["fc.weight"].T
    embeds = w["embed_tokens.weight"][sample.ids] if "embed_tokens.weight" in w else sample.embeds
    keys = values = torch.zeros(0, block["num_key_value_heads"], block["head_dim"])
    logits = []
    for at in [slice(0, n), *(slice(n - 1 + s, n + s) for s in range(1, sample.n_steps + 1))]:
        e = _norm(embeds[at], w[f"{prefix}input_layernorm.weight"], eps)
        s = _norm(states, w[f"{prefix}hidden_norm.weight"], eps)
        residual = s if settings.get("norm_before_residual") else states
        x = torch.cat([e, s], -1)
        q, k, v = (
            (x @ w[f"{prefix}self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, block["head_dim"])) for name in "qkv"
        )
        places = sample.axes[:, :n] if not len(keys) else sample.axes[:, n - 1 : n] + len(keys) - n + 1
        q, k = _turned(q, places, rope), _turned(k, places, rope)
        keys, values = torch.cat([keys, k]), torch.cat([values, v])
        x = residual + _attended(q, keys, values).flatten(1) @ w[f"{prefix}self_attn.o_proj.weight"].T
        y = _norm(x, w[f"{prefix}post_attention_layernorm.weight"], eps)
        gate, up = (y @ w[f"{prefix}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        states = x + (gate * gate.sigmoid() * up) @ w[f"{prefix}mlp.down_proj.weight"].T
        logits.append(_norm(states, w["norm.weight"], eps) @ w["lm_head.weight"].T)
        states = states[-1:]
    return _spread(torch.cat(logits), w, block["vocab_size"])


def medusa_logits(folder: Folder, sample: Sample) -> Tensor:
    """Logits [K, N, V] of each head, over the target's vocabulary."""
    w, settings = folder.tensors, folder.settings
    logits = []
    for head in range(settings["num_heads"]):
        x = sample.hidden[-1]
        for block in range(settings["num_hidden_layers"]):
            name = f"blocks.{head}.layers.{block}"
            inner = x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
            x = x + inner * inner.sigmoid()
        logits.append(x @ w[f"lm_heads.{0 if settings.get('original_lm_head') else head}.weight"].T)
    return torch.stack(logits)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _turned(x: Tensor, places: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """x [T, H, Dh] rotated by its positions [3, T]; halves are pairs, sections of the pairs go by axes."""
    half = x.shape[-1] // 2
    frequency = rope["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
    sizes = rope.get("mrope_section") or [half, 0, 0]
    axis = torch.cat([torch.full((size,), i) for i, size in enumerate(sizes)])
    angle = (places.double()[axis].T * frequency).unsqueeze(1)
    cos, sin, low, high = angle.cos().float(), angle.sin().float(), x[..., :half], x[..., half:]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def _attended(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """[T, H, Dh] of the newest T of L places, each of which sees what is not behind it."""
    groups, T, L = q.shape[1] // keys.shape[1], len(q), len(keys)
    k, v = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    scores = torch.einsum("thd,lhd->htl", q, k) * q.shape[-1] ** -0.5
    behind = torch.arange(L) > torch.arange(L - T, L).unsqueeze(1)
    return torch.einsum("htl,lhd->thd", scores.masked_fill(behind, -torch.inf).softmax(-1), v)


def _spread(logits: Tensor, w: Mapping[str, Tensor], vocab_size: int) -> Tensor:
    """Over the target's vocabulary, by `d2t`; what `t2d` does not name is left out, should the two differ."""
    if "d2t" not in w:
        return logits
    whole = torch.full((len(logits), vocab_size), -torch.inf)
    whole[:, torch.arange(logits.shape[1]) + w["d2t"]] = logits
    return whole.masked_fill(~w["t2d"], -torch.inf)
