"""LLaVA-NeXT (LLaVA-1.6): LLaVA over an overview and several tiles of each image, unpadded; 1-D positions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmspec.targets.base import HFTarget


class Target(HFTarget):
    """`LlavaNextForConditionalGeneration`, unmodified."""

    def image_features(self, pixels: Mapping[str, Tensor]) -> Tensor:
        """Per image: the overview's features, then the tiles' row by row, each row closed by a newline feature."""
        config = self.model.config
        out = self.model.model.get_image_features(
            pixel_values=pixels["pixel_values"].to(self.device, self.dtype),
            image_sizes=pixels["image_sizes"],
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        )
        return torch.cat(list(out.pooler_output))
