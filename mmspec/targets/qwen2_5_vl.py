"""Qwen2.5-VL: a vision transformer of any resolution with windowed attention, M-RoPE."""

from __future__ import annotations

from mmspec.targets._mrope import MRopeTarget


class Target(MRopeTarget):
    """`Qwen2_5_VLForConditionalGeneration`, unmodified."""
