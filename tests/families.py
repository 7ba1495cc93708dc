"""Tiny random targets of every family: real transformers classes and image processors, no download.

Vision towers see images of a few patches, texts are words `w0`, `w1`, ... and the families' own special tokens.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
)

from mmspec.targets._adapters import ATTENTION
from mmspec.targets._load import family_of
from mmspec.targets._processor import ComposedProcessor
from mmspec.targets.base import HFTarget
from mmspec.tree import root_only
from mmspec.types import Prompt, Request
from tests import tiny

MROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FAMILIES = ("llava", "llava_next", *MROPE)
SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "one_kv_head": {"n_kv_heads": 1},
    "tied": {"tie": True},
    "wide_heads": {"head_dim": 12, "n_kv_heads": 4},
}
CASES = [(f, s) for f in FAMILIES for s in SHAPES if s != "wide_heads" or f not in ("qwen2_vl", "qwen2_5_vl")]
"""Every family in every shape; those two derive the head width from the hidden size and nothing else."""

QUICK = {
    ("llava", "one_kv_head"),
    ("llava_next", "tied"),
    ("qwen2_vl", "one_kv_head"),
    ("qwen2_5_vl", "tied"),
    ("qwen3_vl", "wide_heads"),
}
"""Every family and every shape at least once, where all of them would take too long."""

LAYOUTS = {
    "none": ("text",),
    "first": ("image", "text"),
    "last": ("text", "image"),
    "two": ("image", "text", "image", "text"),
    "adjacent": ("text", "image", "image"),
}
SIZES = ((16, 16), (40, 18), (17, 33), (24, 24), (12, 45))
"""Widths and heights that give different grids and tile numbers."""

VOCAB = 96
SPECIAL = tuple(
    f"<|{name}|>"
    for name in ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
)
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' and SYSTEM %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def build(
    family: str,
    n_kv_heads: int = 2,
    tie: bool = False,
    head_dim: int = 8,
    seed: int = 2,
    dtype: str = "float64",
    device: str = "cpu",
    n_layers: int = 3,
) -> HFTarget:
    """A random target: hidden 32, 4 heads, a vision tower of 2 layers.

    Weights are scaled up so that the argmax depends on the context; a fresh transformer repeats one token.
    """
    if device != "cpu":
        here = build(family, n_kv_heads, tie, head_dim, seed, dtype, n_layers=n_layers)
        return type(here)(copy.deepcopy(here.model).to(device), here.processor, here.name)
    if family == "llava":
        return tiny.llava(n_kv_heads, tie, head_dim, dtype, seed, n_layers)
    torch.manual_seed(seed)
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": n_kv_heads,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tie,
    }
    if family == "llava_next":
        config, processor = _llava_next(text | {"head_dim": head_dim}, tie)
    else:
        config, processor = _qwen(family, text, tie, head_dim)
    attention = {"text_config": ATTENTION, "vision_config": "sdpa"}
    model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    tokens = processor.tokenizer
    stops = ["</s>"] if family == "llava_next" else ["<|im_end|>", "<|endoftext|>"]
    model.generation_config.eos_token_id = tokens.convert_tokens_to_ids(stops)
    model.generation_config.pad_token_id = tokens.pad_token_id
    return family_of(family)(model, processor, f"random-{family}")


def _llava_next(text: dict[str, Any], tie: bool) -> tuple[PreTrainedConfig, LlavaNextProcessor]:
    """Tiles of 16 pixels, 4 features each."""
    grids = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=grids
        ),
        tokenizer=tiny.processor().tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tiny.TEMPLATE,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = LlavaNextConfig(
        text_config=LlamaConfig(**text | {"vocab_size": tiny.VOCAB}),
        vision_config=vision,
        image_token_index=2,
        image_grid_pinpoints=grids,
        tie_word_embeddings=tie,
    )
    return config, processor


def _qwen(family: str, text: dict[str, Any], tie: bool, head_dim: int) -> tuple[PreTrainedConfig, ComposedProcessor]:
    """Patches of 4 pixels, four of them to a token; at most 9 tokens an image."""
    pairs = head_dim // 2
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [pairs - 2 * (pairs // 3), *[pairs // 3] * 2]}
    vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 4}
    if family == "qwen2_vl":
        kind, vision = Qwen2VLConfig, vision | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    elif family == "qwen2_5_vl":
        kind, vision = Qwen2_5_VLConfig, vision | {"window_size": 16, "fullatt_block_indexes": [1]}
    else:
        kind, vision = Qwen3VLConfig, vision | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
        rope |= {"mrope_interleaved": True}
        text = text | {"head_dim": head_dim}
    if family != "qwen2_vl":
        vision |= {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32}
    ids = {name: SPECIAL.index(f"<|{name}|>") for name in ("vision_start", "vision_end", "image_pad", "video_pad")}
    config = kind(
        text_config=text | {"rope_parameters": rope, "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 0},
        vision_config=vision,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=tie,
    )
    images = Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 576})
    template = QWEN_TEMPLATE.replace("SYSTEM", "false" if family == "qwen3_vl" else "true")
    return config, ComposedProcessor(qwen_tokenizer(), images, template)


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    plain = ["\n", "system", "user", "assistant", "You", "are", "a", "helpful", "assistant.", "<unk>"]
    words = [*SPECIAL, *plain, *[f"w{i}" for i in range(VOCAB - len(SPECIAL) - len(plain))]]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    split = pre_tokenizers.Split
    raw.pre_tokenizer = pre_tokenizers.Sequence([split(" ", "removed"), split("\n", "isolated")])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[s for s in SPECIAL if s not in ("<|im_end|>", "<|endoftext|>")],
    )


def save(target: HFTarget, folder: Any) -> None:
    """The target as a folder in the Hub's layout."""
    target.model.save_pretrained(folder)
    if not isinstance(target.processor, ComposedProcessor):
        target.processor.save_pretrained(folder)
        return
    target.processor.tokenizer.save_pretrained(folder)
    target.processor.image_processor.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(target.processor.chat_template)


def image(seed: int, size: tuple[int, int]) -> Image.Image:
    width, height = size
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())


def question(seed: int, layout: str = "first", n_words: int = 5) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """A random user turn: `n_words` per text, images of sizes that follow from the seed."""
    rng = torch.Generator().manual_seed(seed)
    content: list[dict[str, Any]] = []
    images = []
    for kind in LAYOUTS[layout]:
        if kind == "image":
            images.append(image(seed + len(images), SIZES[(seed + 2 * len(images)) % len(SIZES)]))
            content.append({"type": "image"})
        else:
            words = torch.randint(0, 50, (n_words,), generator=rng).tolist()
            content.append({"type": "text", "text": " ".join(f"w{w}" for w in words)})
    return [{"role": "user", "content": content}], images


def prompt(target: HFTarget, seed: int, layout: str = "first", n_words: int = 5) -> Prompt:
    return target.encode(*question(seed, layout, n_words))


def requests(target: HFTarget, n: int, new: int) -> list[Request]:
    """Every layout in turn, ragged in words, images and tokens wanted."""
    layouts = list(LAYOUTS)
    prompts = [prompt(target, i, layouts[i % len(layouts)], 3 + i % 4) for i in range(n)]
    return [Request(f"r{i}", p, new - i % 4, key=17 * i) for i, p in enumerate(prompts)]


def dialogue(target: HFTarget, seed: int, layout: str) -> tuple[Prompt, torch.Tensor]:
    """A question with its answer and one more of each, as `encode_dialogue` gives it."""
    messages, images = question(seed, layout)
    reply = {"role": "assistant", "content": [{"type": "text", "text": f"w{seed % 40} w3 w7"}]}
    more = {"role": "user", "content": [{"type": "text", "text": " ".join(["w5"] * (seed % 4 + 1))}]}
    return target.encode_dialogue([*messages, reply, more, reply], images)


def twin(target: HFTarget, attention: str) -> Any:
    """A copy of the model on one of transformers' own attentions."""
    model = copy.deepcopy(target.model)
    model.set_attn_implementation(attention)
    return model


class Audited:
    """A target that audits its cache after every commit, against a fresh prefill of the same tokens.

    Attributes:
        n_audits: rows of commits that were looked at.
        worst: largest difference of logits one step later, over the largest logit.
    """

    def __init__(self, target: HFTarget) -> None:
        self.inner, self.n_audits, self.worst = target, 0, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def open(self, max_batch: int, max_tokens: int, mass_layer: int | None = None) -> Any:
        self.rows: list[Any] = [None] * max_batch
        return self.inner.open(max_batch, max_tokens, mass_layer)

    def prefill(self, state: Any, row: int, prompt: Prompt, taps: Any = ()) -> Any:
        self.rows[row] = (prompt, [])
        return self.inner.prefill(state, row, prompt, taps)

    def forward(self, state: Any, trees: Any, taps: Any = ()) -> Any:
        self.trees = trees
        return self.inner.forward(state, trees, taps)

    def keep(self, state: Any, accepted: Any, paths: Any) -> None:
        self.inner.keep(state, accepted, paths)
        step = self.inner.forward(state, root_only(accepted.next_tokens))
        for b, path in enumerate(paths):
            if not path:
                continue
            prompt, kept = self.rows[b]
            kept += self.trees.tokens[b, list(path)].tolist()
            assert state.lengths[b] == int(state.lengths_device[b]) == len(prompt) + len(kept)
            ids = torch.cat([prompt.input_ids, torch.tensor([*kept, int(accepted.next_tokens[b])])])
            visual = torch.nn.functional.pad(prompt.visual, (0, len(kept) + 1))
            fresh = self.inner.prefill(self.inner.open(1, len(ids)), 0, Prompt(ids, visual, prompt.pixels)).logits[0, 0]
            self.n_audits += 1
            self.worst = max(self.worst, float((step.logits[b, 0] - fresh).abs().max() / fresh.abs().max()))


def inputs(prompt: Prompt) -> dict[str, torch.Tensor]:
    """What the model's own `generate` and `forward` take of a prompt."""
    ids = prompt.input_ids.unsqueeze(0)
    pixels = {k: v.double() if v.is_floating_point() else v for k, v in prompt.pixels.items()}
    if "image_grid_thw" in pixels:
        pixels["mm_token_type_ids"] = prompt.visual.int().unsqueeze(0)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
