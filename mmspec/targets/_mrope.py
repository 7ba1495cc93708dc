"""Targets with M-RoPE: three position axes, on which an image is shorter than its tokens are many.

Text has equal positions on all axes and goes on behind the largest before it, so generated tokens stand at their cache
slot plus a delta that belongs to the row. Positions are worked out per prompt by the model's own `get_rope_index`; the
delta that the model keeps as an attribute belongs to whoever ran last and is never read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmspec.targets._processor import ComposedProcessor
from mmspec.targets.base import HFTarget
from mmspec.types import Prompt


class MRopeTarget(HFTarget):
    """A vision transformer of patches with a merger, dynamic resolution, and [3, B, M] position ids."""

    @classmethod
    def load_processor(cls, path: str) -> Any:
        return ComposedProcessor.from_pretrained(path)

    def image_features(self, pixels: Mapping[str, Tensor]) -> Tensor:
        return torch.cat(list(self._look(pixels).pooler_output))

    def prompt_positions(self, prompt: Prompt) -> tuple[Tensor, int]:
        grid = prompt.pixels.get("image_grid_thw")
        if grid is None:
            positions, delta = super().prompt_positions(prompt)
            return self.position_ids(positions), delta
        positions, deltas = self.model.model.get_rope_index(
            prompt.input_ids.unsqueeze(0), mm_token_type_ids=prompt.visual.long().unsqueeze(0), image_grid_thw=grid
        )
        return positions.to(self.device), int(deltas)

    def position_ids(self, positions: Tensor) -> Tensor:
        return positions.expand(3, -1, -1)

    def limit_pixels(self, least: int, most: int) -> None:
        self.processor.image_processor.size = {"shortest_edge": least, "longest_edge": most}

    def _look(self, pixels: Mapping[str, Tensor]) -> Any:
        """The vision tower's output; features per image, those of merged patches."""
        return self.model.model.get_image_features(
            pixel_values=pixels["pixel_values"].to(self.device, self.dtype),
            image_grid_thw=pixels["image_grid_thw"].to(self.device),
        )
