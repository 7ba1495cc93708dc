"""Lossless speculative decoding for vision-language models: targets, draft heads, policies and the one decode loop."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmspec.api import Answer as Answer
    from mmspec.api import Speculator as Speculator
    from mmspec.api import generate as generate

__all__ = ["Answer", "Speculator", "generate"]


def __getattr__(name: str) -> Any:
    """The three names above, imported when first asked for: a training script should not load what it does not use."""
    if name in __all__:
        from mmspec import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
