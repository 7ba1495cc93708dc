"""Target families: one file each, named after the `model_type` of its Hugging Face config."""

from __future__ import annotations

from mmspec.targets.base import HFTarget, load_target

__all__ = ["HFTarget", "load_target"]
