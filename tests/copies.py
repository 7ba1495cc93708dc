"""Copies of public targets that a CPU trains on: their classes, attention, positions and vision towers, small.

What is kept of a shape in `mmspec/assets/shapes.json`: the class, the width of an attention head, how many query heads
share a key head, the rotary base and its M-RoPE sections, tied embeddings, norms; the tower's patches, merging, windows
and deepstack levels; tokenizers of the families' kinds and the structure of their templates (`tests.chats`). What is
made small: layers, the width of everything else, vocabulary and pictures.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
)

import mmspec.assets
from mmspec.targets._load import family_of
from mmspec.targets._processor import ComposedProcessor
from mmspec.targets.base import HFTarget
from tests import chats, families

SHAPES: dict[str, Any] = json.loads((Path(mmspec.assets.__file__).parent / "shapes.json").read_text(encoding="utf-8"))
NARROW = 64
"""Hidden width where the width of a head does not follow from it."""
PATCHES = 4
"""Of a side of a LLaVA picture, which has 24 in the public ones."""


def family(name: str) -> str:
    """The `model_type` of a public target."""
    marks = {"llava-1.5": "llava", "llava-v1.6": "llava_next", "Qwen2.5-VL": "qwen2_5_vl", "Qwen3-VL": "qwen3_vl"}
    return next(kind for mark, kind in marks.items() if mark in name)


def save(name: str, folder: Path, n_layers: int = 2) -> Path:
    """A copy with random weights as a folder in the Hub's layout.

    Args:
        name: Hub id in shapes.json.
        folder: does not exist.
        n_layers: of the text model.
    """
    families.save(build(name, n_layers), folder)
    return folder


@functools.cache
def build(name: str, n_layers: int = 2) -> HFTarget:
    """See `save`; fp32. Weights are scaled up so that the argmax depends on the context."""
    kind = family(name)
    torch.manual_seed(3)
    tokenizer = chats.byte_pairs() if kind in families.MROPE else chats.sentence_pieces()
    config, processor = (_qwen if kind in families.MROPE else _llava)(kind, SHAPES[name], n_layers, tokenizer)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    gain = 8.0 * (32 / config.text_config.hidden_size) ** 0.5
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(gain)
    stops = ["<|im_end|>", "<|endoftext|>"] if kind in families.MROPE else ["</s>"]
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(stops)
    # Answers that stop at once, or are special tokens and halves of characters, teach nothing.
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    mute = [token for token, text in enumerate(texts) if not text.strip() or not text.isascii()]
    with torch.no_grad():
        model.get_output_embeddings().weight[[*mute, *tokenizer.all_special_ids]] *= 0.01
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return family_of(kind)(model, processor, f"copy-of-{name}")


def _text(shape: dict[str, Any], n_layers: int, vocabulary: int, follows: bool) -> dict[str, Any]:
    """The text model's settings; `follows`: its hidden width is that of all its heads, as the class has it."""
    text, tie = shape["text"], shape.get("tie_word_embeddings", False)
    group = text["num_attention_heads"] // text["num_key_value_heads"]
    width = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    n_kv = 1 if follows else 2
    sized = {} if follows else {"head_dim": width}
    return sized | {
        "hidden_size": group * n_kv * width if follows else NARROW,
        "intermediate_size": 96,
        "num_hidden_layers": n_layers,
        "num_attention_heads": group * n_kv,
        "num_key_value_heads": n_kv,
        "vocab_size": vocabulary,
        "max_position_embeddings": text.get("max_position_embeddings", 4096),
        "rms_norm_eps": text["rms_norm_eps"],
        "tie_word_embeddings": tie,
    }


def _llava(kind: str, shape: dict[str, Any], n_layers: int, tokenizer: PreTrainedTokenizerFast) -> tuple[Any, Any]:
    patch = shape["vision"]["patch_size"]
    side, public = PATCHES * patch, shape["vision"]["image_size"]
    rope = {"rope_type": "default", "rope_theta": shape["text"]["rope_theta"]}
    text = LlamaConfig(**_text(shape, n_layers, len(tokenizer), follows=False), rope_parameters=rope)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=side,
        patch_size=patch,
    )
    common: dict[str, Any] = {
        "text_config": text,
        "vision_config": vision,
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "vision_feature_layer": shape.get("vision_feature_layer", -2),
        "tie_word_embeddings": shape.get("tie_word_embeddings", False),
    }
    sized: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    told: dict[str, Any] = {
        "tokenizer": tokenizer,
        "patch_size": patch,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": chats.LLAVA_TEMPLATE,
    }
    if kind == "llava":
        return LlavaConfig(**common), LlavaProcessor(image_processor=CLIPImageProcessor(**sized), **told)
    grids = [[side * edge // public for edge in grid] for grid in shape["image_grid_pinpoints"]]
    images = LlavaNextImageProcessorPil(**sized, image_grid_pinpoints=grids)
    return LlavaNextConfig(**common, image_grid_pinpoints=grids), LlavaNextProcessor(image_processor=images, **told)


def _qwen(kind: str, shape: dict[str, Any], n_layers: int, tokenizer: PreTrainedTokenizerFast) -> tuple[Any, Any]:
    text, vision = shape["text"], shape["vision"]
    rope: dict[str, Any] = {"rope_type": "default"}
    rope |= {key: text[key] for key in ("rope_theta", "mrope_section", "mrope_interleaved") if key in text}
    made = _text(shape, n_layers, len(tokenizer), follows=kind == "qwen2_5_vl")
    tower: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    tower |= {"patch_size": vision["patch_size"], "spatial_merge_size": vision["spatial_merge_size"]}
    tower |= {"out_hidden_size": made["hidden_size"]}
    if kind == "qwen2_5_vl":
        # One layer of windows and one that sees all, as the public towers take turns.
        tower |= {"depth": 2, "window_size": vision["window_size"], "fullatt_block_indexes": [1]}
    else:
        levels = len(vision["deepstack_visual_indexes"])
        tower |= {"depth": levels, "deepstack_visual_indexes": list(range(levels)), "num_position_embeddings": 64}
    ids = {key: tokenizer.convert_tokens_to_ids(f"<|{key}|>") for key in ("image_pad", "video_pad")}
    marks = {key: tokenizer.convert_tokens_to_ids(f"<|{key}|>") for key in ("vision_start", "vision_end")}
    config = (Qwen2_5_VLConfig if kind == "qwen2_5_vl" else Qwen3VLConfig)(
        text_config=made | {"rope_parameters": rope},
        vision_config=tower,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=marks["vision_start"],
        vision_end_token_id=marks["vision_end"],
        tie_word_embeddings=shape["tie_word_embeddings"],
    )
    cell = vision["patch_size"] * vision["spatial_merge_size"]
    images = Qwen2VLImageProcessorPil(
        patch_size=vision["patch_size"],
        merge_size=vision["spatial_merge_size"],
        size={"shortest_edge": 4 * cell**2, "longest_edge": 18 * cell**2},
    )
    template = families.QWEN_TEMPLATE.replace("SYSTEM", "false" if kind == "qwen3_vl" else "true")
    return config, ComposedProcessor(tokenizer, images, template)


# ---- data ----


def picture(seed: int) -> Image.Image:
    """Wide, square or high: several tiles, or more cells than a window has."""
    return families.image(seed, ((180, 90), (96, 96), (64, 150))[seed % 3])


def words(seed: int, n: int) -> str:
    return " ".join(chats.WORDS[(7 * seed + 3 * i) % len(chats.WORDS)] for i in range(n))


def save_data(folder: Path, n: int = 6) -> Path:
    """LLaVA JSON of `n` short conversations, every other one with a picture."""
    (folder / "images").mkdir(parents=True)
    records: list[dict[str, Any]] = []
    for number in range(n):
        shown = number % 2 == 0
        turns = [
            {"from": "human", "value": "<image>\n" * shown + words(number, 4 + number % 3)},
            {"from": "gpt", "value": words(number + 5, 6)},
        ]
        records.append({"id": f"r{number}", "conversations": turns})
        if shown:
            picture(number).save(folder / "images" / f"{number}.png")
            records[-1]["image"] = f"{number}.png"
    path = folder / "data.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path
