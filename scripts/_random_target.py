"""Targets of the public checkpoints' shapes with random weights, built where they run: no download, no file.

What a pass costs does not depend on what the weights are, but benchmarks compare texts, and the text of random weights
hangs on differences below a bf16 rounding. So the layers add next to nothing to a token's embedding, and a token's
unembedding is the embedding of the one before it in a ring of 16: the text goes round, however a pass is rounded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2VLImageProcessorPil,
)

from mmspec import assets
from mmspec.assets.tiny_files import CHAT_TEMPLATE
from mmspec.targets._adapters import ATTENTION
from mmspec.targets._load import family_of
from mmspec.targets._processor import ComposedProcessor
from mmspec.targets.base import HFTarget
from mmspec.types import InputError
from train.shapes import PICTURE

NAMES = {"llava-1.5-7b": "llava-hf/llava-1.5-7b-hf", "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct"}
"""What can be built, and where its shape is found in mmspec/assets/shapes.json."""
TINY_TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4}
TINY_TEXT |= {"num_key_value_heads": 2, "vocab_size": 1024}
RING = 16
QUIET = 0.002
"""Standard deviation of the layers' weights: what they add is small against an embedding."""


def random_target(name: str, dtype: str, device: str, tiny: bool = False, seed: int = 0) -> HFTarget:
    """A target of a public checkpoint's shape, with the embedded target's vocabulary and template.

    Args:
        name: of NAMES.
        dtype, device: of its weights.
        tiny: the same family, eight layers of 64.
        seed: of the weights.

    Raises:
        InputError: another name.
    """
    if name not in NAMES:
        raise InputError(f"--target {name} is not one of {', '.join(NAMES)}")
    table = json.loads((Path(assets.__file__).parent / "shapes.json").read_text(encoding="utf-8"))
    shape = table[NAMES[name]]
    tokenizer = AutoTokenizer.from_pretrained(assets.TINY_LLAVA)
    make = _llava if name.startswith("llava") else _qwen
    config, processor = make(shape, tokenizer, tiny)
    torch.manual_seed(seed)
    attention = {"text_config": ATTENTION, "vision_config": "sdpa"}
    with torch.device(device):
        model: Any = AutoModelForImageTextToText.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=attention
        )
    _set_text(model)
    ids = {"eos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config.update(**ids, do_sample=False)
    return family_of(config.model_type)(model, processor, f"random {name}{' (tiny)' if tiny else ''}")


@torch.no_grad()
def _set_text(model: Any) -> None:
    """Makes the text what the top of this file says."""
    embedding, unembedding = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    embedding.normal_()
    places = torch.arange(len(embedding), device=embedding.device)
    following = places // RING * RING + (places + 1) % RING
    unembedding[following.clamp_max(len(embedding) - 1)] = embedding


def ring(token: int, n: int) -> list[int]:
    """The n tokens behind a token, as such a target writes them."""
    return [token // RING * RING + (token + i) % RING for i in range(1, n + 1)]


def shared_twin(model: Any, attention: str) -> Any:
    """The same model on another attention, over the same weights in the same memory."""
    with torch.device("meta"):
        twin = type(model)._from_config(model.config, dtype=model.dtype, attn_implementation=attention)
    twin.load_state_dict(model.state_dict(), assign=True)
    for mine, its in zip(model.modules(), twin.modules(), strict=True):
        its._buffers.update(mine._buffers)
    twin.generation_config = model.generation_config
    return twin.eval().requires_grad_(False)


def weight_bytes(target: HFTarget) -> int:
    """Bytes of the weights that a decoding pass reads: the decoder layers, the last norm and the unembedding."""
    tensors: list[Tensor] = [*target.text_model.layers.parameters(), *target.text_model.norm.parameters()]
    return sum(t.numel() * t.element_size() for t in [*tensors, target.lm_head.weight])


def picture(image: Image.Image) -> Image.Image:
    """A picture of the size that the planner assumes, for targets whose tokens follow from it."""
    return image.resize(PICTURE)


def _text(shape: dict[str, Any], tiny: bool) -> dict[str, Any]:
    text = {key: value for key, value in shape["text"].items() if key != "mrope_section"}
    return text | {"initializer_range": QUIET, "eos_token_id": 2, "bos_token_id": 1} | (TINY_TEXT if tiny else {})


def _llava(shape: dict[str, Any], tokenizer: Any, tiny: bool) -> tuple[Any, Any]:
    vision = dict(shape["vision"])
    if tiny:
        vision |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        vision |= {"image_size": 56}
    side = {"height": vision["image_size"], "width": vision["image_size"]}
    images = CLIPImageProcessorPil(size=side, crop_size=side, do_convert_rgb=True)
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=vision["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    config = LlavaConfig(
        text_config=LlamaConfig(**_text(shape, tiny)),
        vision_config=CLIPVisionConfig(**vision),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=shape["vision_feature_layer"],
        tie_word_embeddings=False,
    )
    return config, processor


def _qwen(shape: dict[str, Any], tokenizer: Any, tiny: bool) -> tuple[Any, Any]:
    text, vision = _text(shape, tiny), dict(shape["vision"])
    section = shape["text"]["mrope_section"]
    if tiny:
        vision |= {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "fullatt_block_indexes": [1]}
        vision |= {"out_hidden_size": text["hidden_size"]}
        section = [2, 3, 3]
    theta = text.pop("rope_theta")
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": theta, "mrope_section": section}
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=image,
        video_token_id=text["vocab_size"] - 1,
        vision_start_token_id=text["vocab_size"] - 2,
        vision_end_token_id=text["vocab_size"] - 3,
        tie_word_embeddings=False,
    )
    limits = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112} if tiny else {}
    images = Qwen2VLImageProcessorPil(**({"size": limits} if tiny else {}))
    return config, ComposedProcessor(tokenizer, images, CHAT_TEMPLATE)
