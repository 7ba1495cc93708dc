"""Target families: one file each, named after the `model_type` of its Hugging Face config."""

from __future__ import annotations

from mmspec.targets._load import Description, Vocabulary, describe_target, load_target, load_vocabulary

__all__ = ["Description", "Vocabulary", "describe_target", "load_target", "load_vocabulary"]
