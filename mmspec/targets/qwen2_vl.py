"""Qwen2-VL: a vision transformer of any resolution, M-RoPE."""

from __future__ import annotations

from mmspec.targets._mrope import MRopeTarget


class Target(MRopeTarget):
    """`Qwen2VLForConditionalGeneration`, unmodified."""
