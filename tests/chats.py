"""Targets that read text as public ones do: their kinds of tokenizer and structure of template; and a conversation.

The tokenizers are small, made from a list of words by code alone, and know any text by its bytes. Tokens may hold white
space before a word, several line breaks or several spaces, so answers can begin and end inside of one.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import mmspec.assets
from mmspec.targets import load_target
from mmspec.targets._load import family_of
from mmspec.targets.base import HFTarget
from tests import families

EMBEDDED = "tiny_llava"
NAMES = (EMBEDDED, *families.FAMILIES)
KNOWN = (
    "USER ASSISTANT system user assistant You are a helpful INST A red kite flies over the sea What is in picture And "
    "colour of Blue deep blue with white foam Compare it please same Are you sure Yes"
)
WORDS = KNOWN.split()

# LLaVA-1.5's: images before text, `generation` tags, a space behind every message and no stop token anywhere.
LLAVA_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ c['text'] + ' ' }}{% endgeneration %}"
    "{% else %}{{ c['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# LLaVA-NeXT's over Mistral: no generation prompt, and an end of sequence behind every answer, which is trimmed.
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'][0]['text'] + ' ' }}"
    "{% elif m['role'] == 'user' %}[INST] {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ c['text'] | trim }}{% endif %}{% endfor %} [/INST]"
    "{% else %} {% for c in m['content'] %}{{ c['text'] | trim }}{% endfor %}{{ eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {"llava": LLAVA_TEMPLATE, "llava_next": MISTRAL_TEMPLATE}
"""Of the other families those of `tests.families` are the public ones' already."""


@functools.cache
def build(name: str) -> HFTarget:
    """A target of a family to encode with (its weights are for another vocabulary), or the embedded one."""
    if name == EMBEDDED:
        return load_target(str(Path(mmspec.assets.__file__).parent / EMBEDDED), "float32")
    plain = families.build(name)
    model, processor = copy.deepcopy(plain.model), copy.deepcopy(plain.processor)
    tokenizer = byte_pairs() if name in families.MROPE else sentence_pieces()
    processor.tokenizer = tokenizer
    processor.chat_template = TEMPLATES.get(name, processor.chat_template)
    placeholder = processor.image_token
    model.config.image_token_id = tokenizer.convert_tokens_to_ids(placeholder)
    if name not in families.MROPE:
        processor.image_token_id = model.config.image_token_id
    stops = ["<|im_end|>", "<|endoftext|>"] if name in families.MROPE else ["</s>"]
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(stops)
    return family_of(name)(model, processor, f"public-{name}")


def sentence_pieces() -> PreTrainedTokenizerFast:
    """As Llama's: a space belongs to the word behind it, one is put before every stretch of text, <s> in front."""
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    first = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    vocabulary, merges = _merged(first, [*(f"▁{word}" for word in WORDS), *WORDS, "▁▁"])
    raw = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    raw.add_special_tokens(special)
    begin = [("<s>", raw.token_to_id("<s>"))]
    raw.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", begin)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"}, padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip


def byte_pairs() -> PreTrainedTokenizerFast:
    """As Qwen2's: bytes as letters, words with the space before them, line breaks together, nothing before the text."""
    words = [*(f"Ġ{word}" for word in WORDS), *WORDS, "ĠĠ", "ĊĊ", ".Ċ"]
    raw = Tokenizer(models.BPE(*_merged([*families.SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())], words)))
    raw.normalizer = normalizers.NFC()
    pieces = Regex(r"\s*[\r\n]+| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left",
        extra_special_tokens=[s for s in families.SPECIAL if s not in ("<|im_end|>", "<|endoftext|>")],
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _merged(first: list[str], words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges: every word grows letter by letter."""
    merges: dict[tuple[str, str], str] = {}
    for word in words:
        for end in range(1, len(word)):
            merges.setdefault((word[:end], word[end]), word[: end + 1])
    tokens = dict.fromkeys([*first, *merges.values()])
    return {token: number for number, token in enumerate(tokens)}, list(merges)


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def said(role: str, *parts: str) -> dict[str, Any]:
    """A message; an empty part is an image."""
    return {"role": role, "content": [text(part) if part else {"type": "image"} for part in parts]}


def conversation() -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """4 turns, 2 images, the second in the third turn; answers that equal another one or the question before them."""
    messages = [
        said("user", "", "What is in the picture?"),
        said("assistant", "A red kite flies over the sea."),
        said("user", "And the colour of the sea?"),
        said("assistant", "Blue.\n\nA deep  blue — with white foam 🌊"),
        said("user", "Compare it with", "", "please."),
        said("assistant", "A red kite flies over the sea."),
        said("user", "Are you sure?"),
        said("assistant", "Are you sure?"),
    ]
    return messages, [families.image(1, (40, 18)), families.image(2, (17, 33))]
