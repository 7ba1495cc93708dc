"""LLaVA-1.5: CLIP features of one layer through a projector; 1-D positions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmspec.targets.base import HFTarget


class Target(HFTarget):
    """`LlavaForConditionalGeneration`, unmodified."""

    def image_features(self, pixels: Mapping[str, Tensor]) -> Tensor:
        config = self.model.config
        images = pixels["pixel_values"].to(self.device, self.dtype)
        out = self.model.model.get_image_features(
            pixel_values=images,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        )
        return torch.cat(list(out.pooler_output))
