"""Qwen3-VL: interleaved M-RoPE; deepstack adds features of inner vision layers after the first text layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmspec.targets._mrope import MRopeTarget


class Target(MRopeTarget):
    """`Qwen3VLForConditionalGeneration`, unmodified."""

    def image_features(self, pixels: Mapping[str, Tensor]) -> Tensor:
        """[n_visual, (1 + K) * D]: the features for the embeddings, then those for the outputs of K text layers."""
        out = self._look(pixels)
        # Levels come per image, or all images in one tensor: versions of transformers differ.
        levels = [x if isinstance(x, Tensor) else torch.cat(x) for x in (out.pooler_output, *out.deepstack_features)]
        return torch.cat(levels, -1)

    def deep_inputs(self, visual: Tensor, features: Tensor) -> dict[str, Any]:
        return {
            "visual_pos_masks": visual,
            "deepstack_visual_embeds": features.split(self.shape.hidden_size, -1),
        }
