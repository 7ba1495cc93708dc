"""Low-rank adapters on a draft head: peft's layers while it trains, plain weights when it is saved.

Invariant: a head with adapters lives in the training engine alone. Whoever measures, decodes or reads a run folder gets
a plain head, whose weights are the base's plus the scaled products.

Source: LoRA (arXiv 2106.09685), by the peft library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from mmspec.checkpoint import discreet, write_json, write_tensors
from mmspec.heads._unembedding import Unembedding
from mmspec.recipe import HeadNode, Lora
from mmspec.types import InputError

T = TypeVar("T")
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""The names peft gives them: `peft.PeftModel.from_pretrained(head, <run folder>)` reads them back."""
BLOCK = "block."


class LoraUnembedding(LoraLinear):
    """An adapter on a layer whose weight itself is asked for: it is used as if it were merged."""

    def forward(self, x: Tensor, use: Callable[[Tensor, Tensor], T] = F.linear) -> T:  # type: ignore[assignment]
        name = self.active_adapters[0]
        down, up = self.lora_A[name], self.lora_B[name]
        # The product by calls of the layers, which is when ZeRO-3 has their weights.
        eye = torch.eye(self.in_features, dtype=down.weight.dtype, device=x.device)
        change = up(self.lora_dropout[name](down(eye))).T * self.scaling[name]
        return self.base_layer(x, lambda x, weight: use(x, weight + change))


def adapted_layers(head: nn.Module, node: HeadNode) -> dict[str, nn.Linear]:
    """The linear layers that get an adapter, by name.

    With `head.init_layer` only those of the block: there is nothing in the others yet to adapt.

    Raises:
        InputError: `head.lora.modules` names a layer that the head has not.
    """
    linear = {name: module for name, module in head.named_modules() if isinstance(module, nn.Linear)}
    known = {name.rpartition(".")[2] for name in linear}
    for wanted in node.lora.modules:
        if wanted not in known:
            raise InputError(
                f"head.lora.modules names {wanted!r}, which a {node.kind} head has not; it has: "
                f"{', '.join(sorted(known))}"
            )
    chosen = {name: module for name, module in linear.items() if name.rpartition(".")[2] in node.lora.modules}
    if node.init_layer is None:
        return chosen
    return {name: module for name, module in chosen.items() if name.startswith(BLOCK)}


def adapt(head: nn.Module, node: HeadNode) -> None:
    """Puts adapters on a head, whose products are 0 at first, and freezes what they stand for.

    What is trained then are the adapters; with `head.init_layer` also all that did not come from the target's layer,
    and the norms.

    Raises:
        InputError: see `adapted_layers`.
    """
    own = {name: parameter.dim() > 1 and name.startswith(BLOCK) for name, parameter in head.named_parameters()}
    fresh = [] if node.init_layer is None else [name for name, taken in own.items() if not taken]
    parameters = dict(head.named_parameters())
    inject_adapter_in_model(_config(node.lora, list(adapted_layers(head, node))), head)
    for name in fresh:
        parameters[name].requires_grad_(True)


def merged(state: Mapping[str, Tensor], plain: nn.Module, node: HeadNode) -> dict[str, Tensor]:
    """The weights of a plain head that computes what an adapted one does.

    Args:
        state: of the adapted head, complete.
        plain: a head without adapters and of the same shape; it is used up.

    Returns:
        A state dict of the plain head, in the dtypes of `state`; sums are formed in fp32 at least, and rounded once.
    """
    adapt(plain, node)
    dtype = torch.float32
    for tensor in state.values():
        dtype = torch.promote_types(dtype, tensor.dtype) if tensor.is_floating_point() else dtype
    plain.to(dtype).load_state_dict(state)
    for module in plain.modules():
        if isinstance(module, LoraLinear):
            module.merge(safe_merge=True)
    whole = {}
    for name, tensor in plain.state_dict().items():
        if ".lora_" not in name:
            whole[name.replace(".base_layer.", ".")] = tensor.to(state[name].dtype)
    return whole


def save_adapters(folder: Path, state: Mapping[str, Tensor], plain: nn.Module, node: HeadNode, target: str) -> None:
    """Writes the adapters alone, in peft's layout.

    Args:
        folder: the run folder.
        state, plain: see `merged`.
        target: fingerprint of the target they were trained for.
    """
    adapt(plain, node)
    layers: Any = plain
    config = layers.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = discreet(str(node.init_from)), True
    found = get_peft_model_state_dict(plain, state_dict=dict(state), save_embedding_layers=False)
    tensors = {f"base_model.model.{name}": tensor for name, tensor in found.items()}
    write_tensors(folder / ADAPTER_WEIGHTS, tensors, {"format": "pt", "target": target, "head": node.kind})
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    write_json(folder / ADAPTER_CONFIG, values)


def _config(lora: Lora, layers: list[str]) -> LoraConfig:
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=layers,
    )
    config._register_custom_module({Unembedding: LoraUnembedding})
    return config
