"""`--dry-run`: what a recipe will need, worked out from shapes alone.

Invariant: no weights are read, nothing is downloaded and nothing is written; modules are built on the meta device.
Estimates say what they count; they leave out fragmentation and the libraries' own memory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmspec import assets, checkpoint
from mmspec.recipe import Recipe
from mmspec.types import InputError, TargetShape

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
GIB = 2**30
ASSUMED_TOKENS = 1024
"""Sequence length the estimate assumes where the recipe sets no data.max_length."""


@dataclass(frozen=True)
class TargetFacts:
    """What is known of a target without its weights.

    Args:
        shape: of its text model.
        n_parameters: of text model, vision tower and projector, to within a percent.
        origin: where that was read.
    """

    shape: TargetShape
    n_parameters: int
    origin: str


def target_facts(name: str) -> TargetFacts:
    """Looks a target up: its own config.json where there is one, else the table of public shapes.

    Raises:
        InputError: neither knows it.
    """
    folder = Path(assets.resolve(name))
    if (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text, vision = config.get("text_config", config), config.get("vision_config", {})
        tied, origin = bool(config.get("tie_word_embeddings", False)), str(folder / "config.json")
    else:
        known: dict[str, Any] = json.loads((Path(assets.__file__).parent / "shapes.json").read_text(encoding="utf-8"))
        if not isinstance(known.get(name), dict):
            names = ", ".join(key for key, value in known.items() if isinstance(value, dict))
            raise InputError(
                f"target.name={name}: no such folder, and no shape is known for it; known: tiny_llava, {names}"
            )
        text, vision = known[name]["text"], known[name]["vision"]
        tied, origin = bool(known[name].get("tie_word_embeddings", False)), "mmspec/assets/shapes.json"
    shape = _shape(text, origin)
    return TargetFacts(shape, _text_parameters(shape, tied) + _vision_parameters(vision, shape.hidden_size), origin)


def report(recipe: Recipe, world_size: int) -> str:
    """The resolved recipe with parameter counts, memory per process and disk, as text."""
    facts = target_facts(recipe.target.name)
    config = recipe.head.config.resolve(facts.shape)
    with torch.device("meta"):
        head = checkpoint.build_head(recipe.head.kind, config, recipe.loss)
        n_head = sum(p.numel() for p in head.parameters())
        n_controller = 0
        if recipe.policy.kind == "learned":
            controller = checkpoint.build_controller(recipe.policy.controller.resolve(facts.shape))
            n_controller = sum(p.numel() for p in controller.parameters())
    batch = world_size * recipe.optim.micro_batch * recipe.optim.accumulate
    lines = [
        _yaml(recipe),
        f"processes            {world_size}   (global batch {batch} = {world_size} x micro_batch "
        f"{recipe.optim.micro_batch} x accumulate {recipe.optim.accumulate})",
        f"target               {recipe.target.name}: {_count(facts.n_parameters)} parameters, frozen ({facts.origin})",
        f"head                 {recipe.head.kind}: {_count(n_head)} parameters, trained ({n_head:,})",
        f"controller           {_count(n_controller)} parameters ({n_controller:,})",
        "memory per process   (estimate)",
        *(f"  {what:<19}{_size(size)}" for what, size in memory(recipe, facts, n_head, world_size)),
        "disk                 (estimate)",
        *(f"  {what:<19}{_size(size)}" for what, size in disk(recipe, facts.shape, n_head, n_controller)),
        *(f"data                 {source.path}{_presence(source.path)}" for source in recipe.data.sources),
    ]
    return "\n".join(lines)


def memory(recipe: Recipe, facts: TargetFacts, n_head: int, world_size: int) -> list[tuple[str, int]]:
    """(what, bytes) per process; ZeRO divides optimizer state (1), gradients (2) and weights (3) by the processes."""
    stage, engine = recipe.deepspeed.zero_stage, recipe.deepspeed
    half = 2 if engine.bf16 else 4
    weights = n_head * half // (world_size if stage >= 3 else 1)
    gradients = n_head * half // (world_size if stage >= 2 else 1)
    # AdamW's two moments, and with bf16 an fp32 master copy.
    states = n_head * (12 if engine.bf16 else 8) // (world_size if stage >= 1 else 1)
    shape, tokens = facts.shape, recipe.data.max_length or ASSUMED_TOKENS
    sequences = recipe.optim.micro_batch
    width = BYTES[recipe.target.dtype]
    target_pass = sequences * tokens * (6 * shape.hidden_size + 2 * shape.intermediate_size) * width
    logits = 3 * min(recipe.loss.chunk, sequences * tokens) * shape.vocab_size * 4
    block = sequences * tokens * (16 * shape.hidden_size + 4 * shape.intermediate_size) * half * recipe.loss.steps
    rows = [
        ("target", facts.n_parameters * width),
        ("head weights", 0 if engine.offload_param else weights),
        ("gradients", gradients),
        ("optimizer state", 0 if engine.offload_optimizer else states),
        (f"activations {tokens} tok", target_pass + block + logits),
    ]
    host = (weights if engine.offload_param else 0) + (states if engine.offload_optimizer else 0)
    return [*rows, ("total", sum(size for _, size in rows)), *([("offloaded to host", host)] if host else [])]


def disk(recipe: Recipe, shape: TargetShape, n_head: int, n_controller: int) -> list[tuple[str, int]]:
    """(what, bytes) of the run folder."""
    half = 2 if recipe.deepspeed.bf16 else 4
    rows = [("head + controller", n_head * half + n_controller * 4), ("resumable state", n_head * (half + 12))]
    if recipe.policy.kind == "learned":
        # A round emits about three tokens; per round mainly one state of the target is stored.
        rounds = recipe.policy.rollouts * recipe.data.max_new_tokens // 3
        rows.append(("rollout", rounds * shape.hidden_size * BYTES[recipe.target.dtype]))
    return [*rows, ("total", sum(size for _, size in rows))]


def _shape(text: dict[str, Any], origin: str) -> TargetShape:
    try:
        heads, hidden = int(text["num_attention_heads"]), int(text["hidden_size"])
        rope = text.get("rope_parameters") or {}
        return TargetShape(
            hidden_size=hidden,
            intermediate_size=int(text["intermediate_size"]),
            n_layers=int(text["num_hidden_layers"]),
            n_heads=heads,
            n_kv_heads=int(text.get("num_key_value_heads") or heads),
            head_dim=int(text.get("head_dim") or hidden // heads),
            vocab_size=int(text["vocab_size"]),
            rms_eps=float(text.get("rms_norm_eps", 1e-6)),
            rope_theta=float(text.get("rope_theta") or rope.get("rope_theta", 10000.0)),
        )
    except KeyError as error:
        raise InputError(
            f"{origin} does not say {error.args[0]!r} of the text model; give a complete config.json"
        ) from error


def _text_parameters(shape: TargetShape, tied: bool) -> int:
    attention = shape.hidden_size * shape.head_dim * 2 * (shape.n_heads + shape.n_kv_heads)
    layer = attention + 3 * shape.hidden_size * shape.intermediate_size + 2 * shape.hidden_size
    return shape.n_layers * layer + (1 if tied else 2) * shape.vocab_size * shape.hidden_size + shape.hidden_size


def _vision_parameters(vision: dict[str, Any], text_width: int) -> int:
    """Tower with projector or patch mergers; good to a few percent of themselves, which is little of the whole."""
    width = int(vision.get("embed_dim") or vision.get("hidden_size") or 0)
    if not width:
        return 0
    layers = int(vision.get("num_hidden_layers") or vision.get("depth") or 0)
    inner = int(vision.get("intermediate_size") or width * vision.get("mlp_ratio", 4))
    patch, frames = int(vision.get("patch_size", 14)), int(vision.get("temporal_patch_size", 1))
    positions = (int(vision.get("image_size", 0)) // max(patch, 1)) ** 2
    # Towers with windowed attention have gated MLPs.
    matrices = 3 if "window_size" in vision else 2
    tower = layers * (4 * width * width + matrices * width * inner + 9 * width + inner)
    projector = (width + text_width) * text_width
    if merge := int(vision.get("spatial_merge_size", 0)):
        merged = width * merge**2
        projector = merged * (merged + text_width) * (1 + len(vision.get("deepstack_visual_indexes", ())))
    return tower + (positions + 3 * frames * patch**2) * width + projector


def _yaml(recipe: Recipe) -> str:
    import yaml

    return yaml.safe_dump(recipe.as_dict(), sort_keys=False)


def _presence(path: str) -> str:
    return "" if path.startswith("synth:") or Path(path).exists() else "   (not here yet)"


def _count(n: int) -> str:
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= limit:
            return f"{n / limit:.2f} {unit}"
    return str(n)


def _size(n: int) -> str:
    return f"{n / GIB:8.2f} GiB" if n >= GIB // 10 else f"{n / 2**20:8.1f} MiB"
