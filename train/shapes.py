"""What is known of a target without its weights: from its own config.json, or from the table of public shapes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmspec import assets
from mmspec.types import InputError, TargetShape

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
PICTURE = (640, 480)
"""Pixels of the picture that is assumed for targets whose number of image tokens depends on it."""


@dataclass(frozen=True)
class TargetFacts:
    """A target's sizes.

    Args:
        shape: of its text model.
        n_parameters: of text model, vision tower and projector, to within a percent.
        n_layers_parameters: of the text model's decoder layers alone.
        n_vision_parameters: of vision tower and projector.
        visual_tokens: of one picture in the text model; of those targets that take any size, of one of PICTURE.
        patches: of one picture in the vision tower.
        context: tokens that the text model was made for, 0: not said.
        origin: where that was read.
    """

    shape: TargetShape
    n_parameters: int
    n_layers_parameters: int
    n_vision_parameters: int
    visual_tokens: int
    patches: int
    context: int
    origin: str

    def kv_bytes(self, width: int) -> int:
        """Bytes of keys and values of one token; `width`: bytes of an element."""
        return 2 * self.shape.n_layers * self.shape.n_kv_heads * self.shape.head_dim * width


def target_facts(name: str) -> TargetFacts:
    """Looks a target up: its own config.json where there is one, else the table of public shapes.

    Raises:
        InputError: neither knows it.
    """
    folder = Path(assets.resolve(name))
    if (folder / "config.json").is_file():
        origin = str(folder / "config.json")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = config.get("text_config", config)
        vision = config.get("vision_config", {})
    else:
        table: dict[str, Any] = json.loads((Path(assets.__file__).parent / "shapes.json").read_text(encoding="utf-8"))
        if not isinstance(table.get(name), dict):
            names = ", ".join(key for key, value in table.items() if isinstance(value, dict))
            raise InputError(
                f"target.name={name}: no such folder, and no shape is known for it; known: tiny_llava, {names}"
            )
        config, origin = table[name], "mmspec/assets/shapes.json"
        text, vision = config["text"], config["vision"]
    shape = _shape(text, origin)
    layers, n_vision = _layers_parameters(shape), _vision_parameters(vision, shape.hidden_size)
    ends = (1 if config.get("tie_word_embeddings", False) else 2) * shape.vocab_size * shape.hidden_size
    patches, visual = _image_tokens(config, vision)
    context = int(text.get("max_position_embeddings") or 0)
    n = layers + ends + shape.hidden_size + n_vision
    return TargetFacts(shape, n, layers, n_vision, visual, patches, context, origin)


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


def _layers_parameters(shape: TargetShape) -> int:
    attention = shape.hidden_size * shape.head_dim * 2 * (shape.n_heads + shape.n_kv_heads)
    layer = attention + 3 * shape.hidden_size * shape.intermediate_size + 2 * shape.hidden_size
    return shape.n_layers * layer


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


def _image_tokens(config: dict[str, Any], vision: dict[str, Any]) -> tuple[int, int]:
    """Patches of a picture in the tower, and its tokens in the text model."""
    patch = int(vision.get("patch_size", 14))
    if merge := int(vision.get("spatial_merge_size", 0)):
        cell = patch * merge
        cells = round(PICTURE[0] / cell) * round(PICTURE[1] / cell)
        return cells * merge**2, cells
    if not vision.get("image_size"):
        return 0, 0
    side = int(vision["image_size"]) // patch
    one, tiles = side**2, 1
    if pinpoints := config.get("image_grid_pinpoints"):
        # An overview, and at most as many tiles as the largest grid has; a newline token after each of their lines.
        tiles = 1 + max(
            (high // int(vision["image_size"])) * (wide // int(vision["image_size"])) for high, wide in pinpoints
        )
    return one * tiles, one * tiles + (2 * side if tiles > 1 else 0)
