"""Loading a target by name: its family follows from `model_type`, its processor from the family."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.utils import logging as hf_logging

from mmspec.assets import resolve
from mmspec.targets._facts import fingerprint, text_shape, vocabulary_of
from mmspec.targets._quantize import quantization
from mmspec.types import InputError, TargetShape

if TYPE_CHECKING:
    from mmspec.targets.base import HFTarget


def load_target(
    name: str,
    dtype: str = "float32",
    device: str = "cpu",
    quantize: str = "none",
    place: Callable[[Any], None] | None = None,
) -> HFTarget:
    """Load a target by name.

    Args:
        name: `tiny_llava` (embedded), a folder, or a Hub id.
        dtype: float32, float64, bfloat16 or float16.
        device: torch device.
        quantize: none, 8bit or 4bit: of the text layers' matrices. Another target then, to which losslessness refers.
        place: brings a model that was loaded into host memory to where it shall be; default: all of it to `device`.

    Raises:
        InputError: unknown dtype, unsupported family, files that cannot be found, or a quantisation that is not to be
            had.
    """
    # Brings torch's compiler: seconds that `--help` and a wrong word do not have to wait for.
    from mmspec.targets._adapters import ATTENTION

    kinds = {"float32", "float64", "bfloat16", "float16"}
    if dtype not in kinds:
        raise InputError(f"dtype '{dtype}' is not one of {', '.join(sorted(kinds))}")
    path = resolve(name)
    with _loading(name):
        config = _config(path)
        family = family_of(config.model_type)
        options: dict[str, Any] = {}
        if quantize != "none":
            # Quantised weights are made where they stay: not every library moves them.
            options = {
                "quantization_config": quantization(quantize, config, getattr(torch, dtype)),
                "device_map": {"": device},
            }
        model: Any = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            attn_implementation={"text_config": ATTENTION, "vision_config": "sdpa"},
            trust_remote_code=False,
            **options,
        )
        processor = family.load_processor(path)
    if place is not None:
        place(model)
    elif not options:
        model.to(device)
    return family(model, processor, name)


@dataclass(frozen=True)
class Vocabulary:
    """What tokenizing for a target takes, without its weights.

    Args:
        tokenizer: of the target.
        image_token_id: the placeholder.
        fingerprint: the target's `vocabulary`.
    """

    tokenizer: Any
    image_token_id: int
    fingerprint: str


@dataclass(frozen=True)
class Description:
    """What a target's own config.json says of it, without its weights.

    Args:
        name: as it was asked for.
        family: its `model_type`.
        architectures: names of the classes that load it.
        shape: of its text model.
        max_positions: tokens that the text model was made for.
        mrope: whether its rotary positions have three axes.
    """

    name: str
    family: str
    architectures: tuple[str, ...]
    shape: TargetShape
    max_positions: int
    mrope: bool


def describe_target(name: str) -> Description:
    """Read the config of a target.

    Args:
        name: as for `load_target`.

    Raises:
        InputError: unsupported family, or files that cannot be found.
    """
    with _loading(name):
        config = _config(resolve(name))
    family_of(config.model_type)
    text = config.get_text_config()
    return Description(
        name,
        config.model_type,
        tuple(config.architectures or ()),
        text_shape(text),
        int(text.max_position_embeddings),
        "mrope_section" in (getattr(text, "rope_parameters", None) or {}),
    )


def load_vocabulary(name: str) -> Vocabulary:
    """Load the tokenizer of a target.

    Args:
        name: as for `load_target`.

    Raises:
        InputError: unsupported family, or files that cannot be found.
    """
    path = resolve(name)
    with _loading(name):
        config = _config(path)
        tokenizer = family_of(config.model_type).load_processor(path).tokenizer
    return Vocabulary(tokenizer, int(config.image_token_id), fingerprint(vocabulary_of(tokenizer)))


def _config(path: str) -> Any:
    """The config of a folder or Hub id; never by code that came with it, and nobody is asked whether to run that."""
    return AutoConfig.from_pretrained(path, trust_remote_code=False)


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """Says in one line what of a target cannot be found or is unknown to transformers, and nothing else."""
    try:
        with _quiet():
            yield
    except InputError:
        raise
    except (OSError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"target '{name}' cannot be loaded: {first} (give a folder, a Hub id, or tiny_llava)"
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No loading bars and no hints about optional packages: they would stand between the user and our own lines."""
    before = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)
        if bars:
            hf_logging.enable_progress_bar()


def family_of(model_type: str) -> type[HFTarget]:
    """The class in `mmspec/targets/<model_type>.py`."""
    here = Path(__file__).parent
    known = sorted(p.stem for p in here.glob("[a-z]*.py") if p.stem != "base")
    if model_type not in known:
        raise InputError(f"target family '{model_type}' is not supported; known: {', '.join(known)}")
    family: type[HFTarget] = importlib.import_module(f"mmspec.targets.{model_type}").Target
    return family
