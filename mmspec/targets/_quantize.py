"""Quantised targets: the matrices of the text layers in 8 or 4 bits, by libraries that transformers loads through.

Invariant: only weights are quantised, so a token's logits depend on its own past and not on what else is in the pass;
a tree is then verified with the logits that plain decoding has. Ends (embedding, unembedding, norm) and vision tower
stay as they are.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, TorchAoConfig

from mmspec.types import InputError

LIBRARIES = {"8bit": "torchao", "4bit": "bitsandbytes"}
"""The library of each kind. LLM.int8() of bitsandbytes is no choice for 8 bits: which columns it takes for outliers
depends on all rows of a pass."""


def quantization(kind: str, config: Any, dtype: torch.dtype) -> Any:
    """What `from_pretrained` takes as `quantization_config`.

    Args:
        kind: `8bit` (integers, a scale per output) or `4bit` (NF4, a scale per 64 weights).
        config: of the model.
        dtype: what is computed in.

    Raises:
        InputError: unknown kind, a target that is quantised already, or a library that is not installed.
    """
    if kind not in LIBRARIES:
        raise InputError(f"quantize='{kind}' is not one of none, {', '.join(LIBRARIES)}")
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"quantize={kind}: this target's weights are quantised already; use none")
    library = LIBRARIES[kind]
    if importlib.util.find_spec(library) is None:
        raise InputError(f"quantize={kind} needs {library}: pip install {library} (none works without it)")
    kept = _kept_whole(config)
    if kind == "8bit":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=kept
    )


def _kept_whole(config: Any) -> list[str]:
    """Names of the modules beside the text model, and of the unembedding."""
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)
    beside = [f"model.{name}" for name, _ in model.model.named_children() if name != "language_model"]
    return [*beside, "lm_head"]
