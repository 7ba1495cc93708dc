"""A processor composed of image processor, tokenizer and chat template, for families whose own needs torchvision.

Processors of families that also take video do not construct without torchvision, though images and text need nothing of
it. Where torchvision is installed, what this one returns equals what `AutoProcessor` returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoTokenizer

# Not from `transformers`: there the name needs torchvision in some versions, though its class does not.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.processing_utils import ProcessorMixin


class ComposedProcessor:
    """The part of a transformers processor that targets call, for images cut into patches of which squares are merged.

    Args:
        tokenizer: knows the placeholder as one token.
        image_processor: returns `image_grid_thw`, and has the `merge_size` that turns patches into tokens.
        chat_template: Jinja text; the tokenizer's own when None.
    """

    def __init__(self, tokenizer: Any, image_processor: Any, chat_template: str | None = None) -> None:
        self.tokenizer, self.image_processor, self.chat_template = tokenizer, image_processor, chat_template
        self.image_token: str = getattr(tokenizer, "image_token", None) or "<|image_pad|>"

    @classmethod
    def from_pretrained(cls, path: str) -> ComposedProcessor:
        """From a folder or Hub id; the processor's chat template wins over the tokenizer's, which may be text-only."""
        template = ProcessorMixin.get_processor_dict(path)[0].get("chat_template")
        if isinstance(template, Mapping):
            template = template.get("default")
        return cls(
            AutoTokenizer.from_pretrained(path, trust_remote_code=False),
            AutoImageProcessor.from_pretrained(path, trust_remote_code=False),
            template,
        )

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(list(messages), chat_template=self.chat_template, **options)

    def __call__(
        self, text: Sequence[str], images: Sequence[Any] | None = None, return_tensors: str = "pt", **options: Any
    ) -> dict[str, torch.Tensor]:
        """Tokens of one text, each placeholder repeated once per merged patch of its image, and the images' pixels."""
        start, *rest = text[0].split(self.image_token)
        pixels = dict(self.image_processor(images=list(images), return_tensors=return_tensors)) if images else {}
        counts = [int(grid.prod()) // self.image_processor.merge_size**2 for grid in pixels.get("image_grid_thw", ())]
        full = start + "".join(self.image_token * count + tail for count, tail in zip(counts, rest, strict=True))
        return {"input_ids": self.tokenizer([full], return_tensors=return_tensors, **options)["input_ids"], **pixels}
