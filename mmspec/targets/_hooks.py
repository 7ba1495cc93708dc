"""What a text model is told besides its arguments during one pass, and what is read of it besides its outputs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mmspec.targets._adapters import RECORDER, NodeMass


@contextlib.contextmanager
def tap(text_model: Any, taps: Sequence[int], name: str) -> Iterator[dict[int, Tensor]]:
    """Outputs of the tapped layers during one pass: index k is what leaves the k-th layer (0: the embeddings)."""
    hidden: dict[int, Tensor] = {}
    handles = []
    for index in taps:

        def save(_: nn.Module, args: tuple[Any, ...], index: int = index) -> None:
            hidden[index] = args[0]

        handles.append(_layer_or_norm(text_model, index, name).register_forward_pre_hook(save))
    try:
        yield hidden
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def measure(text_model: Any, layer: int | None, visual: Tensor | None) -> Iterator[NodeMass | None]:
    """Visual attention of a layer's queries during one pass over a cache."""
    if layer is None or visual is None:
        yield None
        return
    attention, recorder = text_model.layers[layer].self_attn, NodeMass(visual)
    attention.__dict__[RECORDER] = recorder
    try:
        yield recorder
    finally:
        del attention.__dict__[RECORDER]


@contextlib.contextmanager
def note(text_model: Any, notes: Mapping[str, Any]) -> Iterator[None]:
    """What our attention is to know during one pass besides its arguments."""
    modules = [layer.self_attn for layer in text_model.layers]
    for module in modules:
        module.__dict__.update(notes)
    try:
        yield
    finally:
        for module, name in itertools.product(modules, notes):
            del module.__dict__[name]


def _layer_or_norm(text_model: Any, tap: int, name: str) -> nn.Module:
    """The module whose input is hidden_states[tap] before the final norm."""
    layers = text_model.layers
    if not 0 <= tap <= len(layers):
        raise ValueError(f"tap {tap} is outside 0..{len(layers)}, the hidden states of {name}")
    return text_model.norm if tap == len(layers) else layers[tap]
