"""From messages and images to the tokens that a target reads, and back: its processor and chat template, no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoProcessor

from mmspec.records import count_images
from mmspec.targets._marks import locate, mark
from mmspec.types import InputError, Prompt


class Prompting:
    """The part of a target that needs no weights."""

    processor: Any
    name: str
    image_token_id: int
    stop_ids: frozenset[int]

    # ---- what a family overrides ----

    @classmethod
    def load_processor(cls, path: str) -> Any:
        """The processor of a folder or Hub id: tokenizer, image processor and chat template behind one call."""
        return AutoProcessor.from_pretrained(path, trust_remote_code=False)

    def limit_pixels(self, least: int, most: int) -> None:
        """Bounds what images are scaled to, in pixels.

        Raises:
            ValueError: the family's images have a size of their own.
        """
        raise ValueError(f"{self.name} scales every image to one size; leave its pixels as they are")

    # ---- prompts ----

    def encode(self, messages: Sequence[Mapping[str, Any]], images: Sequence[Any]) -> Prompt:
        """Render the chat template with the generation prompt, expand image placeholders.

        Args:
            messages: Hugging Face chat messages, content as a list of {type: image} and {type: text, text}.
            images: PIL images in order of their placeholders; those beyond, as of later turns, are left out.

        Raises:
            ValueError: the template leaves an image out, or refuses the conversation.
            InputError: too few images, or content of another kind.
        """
        text = self._render(messages, True)
        self._check_shown(text, messages)
        return self._encode(text, images)

    def encode_dialogue(self, messages: Sequence[Mapping[str, Any]], images: Sequence[Any]) -> tuple[Prompt, Tensor]:
        """A finished conversation and, per token, the number of the reply it belongs to.

        Replies are marked from the first token that the target would write to the stop token; see `_marks.py`.
        The processor, which is where images cost, runs once. Nothing is padded, whatever the tokenizer's side for that.

        Returns:
            Prompt of length L, and [L] int64: 0 outside replies, else 1-based.

        Raises:
            ValueError: a reply cannot be located exactly, or the template leaves an image out.
        """
        text, replies = locate(messages, self._render, self._stops(), self.name)
        self._check_shown(text, messages)
        prompt = self._encode(text, images)
        ids, numbers = mark(text, replies, self._tokenize, self.name)
        # Expanding an image repeats its placeholder: all other tokens are the same ones in the same order.
        others = ids != self.image_token_id
        if not torch.equal(ids[others], prompt.input_ids[~prompt.visual]):
            raise ValueError(f"the processor of {self.name} changes other tokens than those of images")
        answer = torch.zeros(len(prompt), dtype=torch.long)
        answer[~prompt.visual] = numbers[others]
        return prompt, answer

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.processor.tokenizer.decode(tokens, skip_special_tokens=True))

    def _render(self, messages: Sequence[Mapping[str, Any]], generate: bool) -> str:
        for message in messages:
            parts = [] if isinstance(message["content"], str) else message["content"]
            for kind in {part["type"] for part in parts} - {"image", "text"}:
                raise InputError(
                    f"a message with '{kind}' content cannot be encoded; targets take images and text only"
                )
        try:
            text = self.processor.apply_chat_template(list(messages), add_generation_prompt=generate, tokenize=False)
        except TemplateError as error:
            raise ValueError(f"the chat template of {self.name} refuses the conversation: {error}") from error
        return str(text)

    def _check_shown(self, text: str, messages: Sequence[Mapping[str, Any]]) -> None:
        wanted, shown = count_images(messages), text.count(self.processor.image_token)
        if wanted != shown:
            raise ValueError(f"the chat template of {self.name} shows {shown} images of a conversation with {wanted}")

    def _stops(self) -> list[str]:
        """The stop tokens as text, the tokenizer's end of sequence first."""
        tokens = self.processor.tokenizer
        ids = sorted(self.stop_ids, key=lambda token: (token != tokens.eos_token_id, token))
        return [token for token in tokens.convert_ids_to_tokens(ids) if token]

    def _tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text with its placeholders as they are, and each one's characters where the tokenizer knows them."""
        tokens = self.processor.tokenizer
        out = tokens(text, add_special_tokens=not self._begun(text), return_offsets_mapping=tokens.is_fast)
        return out["input_ids"], out.get("offset_mapping", [])

    def _begun(self, text: str) -> bool:
        """Whether the template has already written the token that begins a sequence."""
        begin = self.processor.tokenizer.bos_token
        return bool(begin) and text.startswith(begin)

    def _encode(self, text: str, images: Sequence[Any]) -> Prompt:
        n_images = text.count(self.processor.image_token)
        if n_images > len(images):
            raise InputError(f"the prompt has {n_images} image placeholders but {len(images)} images came with it")
        out = self.processor(
            text=[text],
            images=list(images[:n_images]) or None,
            return_tensors="pt",
            add_special_tokens=not self._begun(text),
        )
        ids = out["input_ids"][0]
        pixels = {k: v for k, v in out.items() if k in ("pixel_values", "image_sizes", "image_grid_thw")}
        return Prompt(ids, ids == self.image_token_id, pixels)
