"""Tensors and settings of each layout, from a head's own.

Invariant: every tensor of the head has one place in the file or one reason to be left out; nothing is guessed, and what
is left over is an error. Layouts as in `mmspec/convert.py`, which reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmspec.checkpoint import Checkpoint
from mmspec.export.engines import ENGINES, default_taps
from mmspec.nn import sections
from mmspec.targets import Description
from mmspec.types import InputError, Target

SPECULATORS = "0.9.0"
"""Version of the package whose format is written."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEEDFORWARD = ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "hidden_norm", "post_attention_layernorm")


@dataclass(frozen=True)
class Layout:
    """What is written.

    Args:
        tensors: of model.safetensors.
        config: config.json.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """What a layout is made of.

    Args:
        made: the run.
        state: the head's weights, which `take` removes one by one.
        target: what its config.json says.
        loaded: the target itself; only where `needs_target`.
        verifier: the name by which an engine shall find the target.
        dtype: of the weights in the file.
    """

    made: Checkpoint
    state: dict[str, Tensor]
    target: Description
    loaded: Target | None
    verifier: str
    dtype: torch.dtype

    def take(self, name: str) -> Tensor:
        return self.state.pop(name).to(self.dtype)


def needs_target(format: str, config: Any) -> bool:
    """Whether the layout keeps weights of the target: its embeddings, or the unembedding that Medusa heads share."""
    return format == "speculators" or (format == "vllm-medusa" and not config.own_head)


def layout(format: str, source: Source) -> Layout:
    """A head in an engine's layout.

    Args:
        format: a key of ENGINES that was checked for this head.

    Raises:
        InputError: the head has a tensor for which the layout has no place; its placeholder is not the target's.
    """
    made = LAYOUTS[format](source)
    if left := sorted(source.state):
        raise InputError(f"{source.made.folder}: --format {format} has no place for the head's {left[0]}")
    return made


def _embeddings(target: Target) -> Tensor:
    rows = torch.arange(target.shape.vocab_size, device=target.device)
    return torch.cat([target.embed(part).cpu() for part in rows.split(4096)])


def _unembedding(target: Target) -> Tensor:
    """[V, D]: a target hands out no weights, but its unembedding of unit vectors is their transpose, exactly."""
    width = target.shape.hidden_size
    units = torch.eye(width, dtype=target.dtype, device=target.device)
    return torch.cat([target.unembed(part).cpu() for part in units.split(256)]).T.contiguous()


def _eagle3(source: Source, prefix: str) -> dict[str, Tensor]:
    config = source.made.config
    # Engines hand states out in the order of layers, whatever the order of the ids.
    order = sorted(range(len(config.taps)), key=lambda i: config.taps[i])
    parts = source.take("fc.weight").chunk(len(order), 1)
    tensors = {"fc.weight": torch.cat([parts[i] for i in order], 1)}
    tensors |= {f"{name}.weight": source.take(f"{name}.weight") for name in ("norm", "lm_head")}
    for names, theirs, ours in ((ATTENTION, "self_attn.", ""), (FEEDFORWARD, "mlp.", "mlp."), (NORMS, "", "")):
        tensors |= {f"{prefix}{theirs}{n}.weight": source.take(f"block.{ours}{n}.weight") for n in names}
    if "draft_ids" in source.state:
        ids = source.state.pop("draft_ids").long()
        tensors["d2t"] = ids - torch.arange(len(ids))
        tensors["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill(0, ids, True)
    _placeholder(source)
    return tensors


def _placeholder(source: Source) -> None:
    """Leaves out what a head with `image_input: aux` keeps of the target: an engine has it in its embeddings."""
    kept, target = source.state.pop("placeholder", None), source.loaded
    if kept is None or target is None:
        return
    own = target.embed(torch.tensor([target.image_token_id], device=target.device))[0].cpu()
    if float((own.double() - kept.double()).norm()) > 0.02 * float(own.double().norm()):
        raise InputError(f"{source.made.folder}: its placeholder is not {target.name}'s; give its own --target")


def _rope(config: Any) -> dict[str, Any]:
    """`mrope_section` turns positions on three axes on, in both engines."""
    return {"rope_type": "default", "mrope_section": list(sections(config.head_dim))} if config.rope == "mrope" else {}


def _block(source: Source) -> dict[str, Any]:
    """Settings that both EAGLE-3 layouts have, by the names of transformers' Llama."""
    config = source.made.config
    return {
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "rms_norm_eps": config.rms_eps,
        "max_position_embeddings": source.target.max_positions,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": False,
        "torch_dtype": str(source.dtype).removeprefix("torch."),
    }


def _layer_ids(source: Source, format: str) -> list[int]:
    return sorted(tap - ENGINES[format].layer_offset for tap in source.made.config.taps)


def _sglang(source: Source) -> Layout:
    config = source.made.config
    eagle: dict[str, Any] = {"use_aux_hidden_state": True}
    # Unsaid where they are what every reader takes by default: the engines count explicit ones differently.
    if tuple(sorted(config.taps)) != default_taps(source.target.shape.n_layers):
        eagle["eagle_aux_hidden_state_layer_ids"] = _layer_ids(source, "sglang")
    settings = {"architectures": ["LlamaForCausalLMEagle3"], **_block(source), "rope_theta": config.rope_theta}
    settings |= {"rope_scaling": _rope(config)} if _rope(config) else {}
    settings |= {"draft_vocab_size": config.draft_vocab_size, "eagle_config": eagle}
    return Layout(_eagle3(source, "midlayer."), settings)


def _speculators(source: Source) -> Layout:
    config = source.made.config
    assert source.loaded is not None
    tensors = _eagle3(source, "layers.0.")
    tensors["embed_tokens.weight"] = _embeddings(source.loaded).to(source.dtype)
    rope = {"rope_type": "default", "rope_theta": config.rope_theta, **_rope(config)}
    layer = {**_block(source), "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    method = {
        "proposal_type": "greedy",
        "speculative_tokens": source.made.tree.depth,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    settings = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS,
        "draft_vocab_size": config.draft_vocab_size,
        # Of this layout vLLM takes the first one for true where it is not said.
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "target_hidden_size": config.hidden_size,
        "embed_requires_grad": False,
        "eagle_aux_hidden_state_layer_ids": _layer_ids(source, "speculators"),
        "transformer_layer_config": {**layer, "rope_parameters": rope},
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [method],
            "verifier": {"name_or_path": source.verifier, "architectures": list(source.target.architectures)},
        },
    }
    return Layout(tensors, settings)


def _medusa(source: Source) -> Layout:
    config, tensors = source.made.config, {}
    for head in range(config.n_ahead):
        for block in range(config.n_blocks):
            for part in ("weight", "bias"):
                tensors[f"blocks.{head}.layers.{block}.{part}"] = source.take(f"blocks.{head}.{block}.linear.{part}")
        if config.own_head:
            tensors[f"lm_heads.{head}.weight"] = source.take(f"lm_heads.{head}.weight")
    settings = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "num_heads": config.n_ahead,
        "num_hidden_layers": config.n_blocks,
        "medusa_fc_bias": True,
    }
    if not config.own_head:
        assert source.loaded is not None
        tensors["lm_heads.0.weight"] = _unembedding(source.loaded).to(source.dtype)
        settings["original_lm_head"] = True
    return Layout(tensors, settings)


LAYOUTS: Mapping[str, Callable[[Source], Layout]] = {
    "sglang": _sglang,
    "speculators": _speculators,
    "vllm-medusa": _medusa,
}
"""{format: what makes it}."""
