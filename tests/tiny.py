"""Tiny random targets for contract tests: real transformers classes built from config, no download, fp64 by default."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mmspec import checkpoint
from mmspec.heads import eagle, viskip
from mmspec.targets._adapters import ATTENTION
from mmspec.targets.llava import Target
from mmspec.types import Prompt

VOCAB = 61
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% if m['role'] == 'assistant' %} </s>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def processor() -> LlavaProcessor:
    words = ["<pad>", "</s>", "<image>", "<unk>", "user", "assistant", *[f"w{i}" for i in range(VOCAB - 6)]]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", extra_special_tokens=["<image>"]
    )
    images = CLIPImageProcessor(size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


@functools.lru_cache(maxsize=8)
def llava(
    n_kv_heads: int = 2,
    tie: bool = False,
    head_dim: int = 8,
    dtype: str = "float64",
    seed: int = 0,
    n_layers: int = 3,
) -> Target:
    """A random LLaVA: 4 heads, 61 tokens, 4 image tokens.

    Its embeddings are scaled up so that the argmax depends on the context; a fresh transformer repeats one token.
    """
    torch.manual_seed(seed)
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=n_kv_heads,
        head_dim=head_dim,
        vocab_size=VOCAB,
        max_position_embeddings=256,
        tie_word_embeddings=tie,
        eos_token_id=1,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=2, tie_word_embeddings=tie)
    model = LlavaForConditionalGeneration._from_config(
        config, dtype=getattr(torch, dtype), attn_implementation={"text_config": ATTENTION, "vision_config": "sdpa"}
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    model.generation_config.eos_token_id = 1
    return Target(model, processor(), "random-llava")


def image(seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def prompt(target: Target, seed: int, n_words: int = 6, images: int = 1) -> Prompt:
    """A random user turn, images first."""
    rng = torch.Generator().manual_seed(seed)
    words = " ".join(f"w{int(i)}" for i in torch.randint(0, VOCAB - 6, (n_words,), generator=rng))
    content = [{"type": "image"}] * images + [{"type": "text", "text": words}]
    return target.encode([{"role": "user", "content": content}], [image(seed + i) for i in range(images)])


def run_folder(folder: Path, target: Target, tree: checkpoint.DraftTree) -> Path:
    """A checkpoint of an untrained head and controller for a target: lossless all the same."""
    torch.manual_seed(0)
    config = eagle.Config().resolve(target.shape)
    checkpoint.save_head(folder, eagle.Head(config).state_dict(), config, target)
    controller = viskip.Config(width=16, depth=tree.depth).resolve(target.shape)
    checkpoint.save_controller(folder, viskip.Head(controller).state_dict(), controller, target)
    checkpoint.save_tree(folder, tree)
    return folder
