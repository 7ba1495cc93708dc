"""What a rank keeps of the trained weights: stretches of fp32 masters with both AdamW moments, at any ZeRO stage.

Invariant: a share is named by its parameter and by where it begins in the flattened parameter, never by a rank or a
flat buffer of the engine. So what one set of ranks wrote is what any other set reads, and a copy is exact.

DeepSpeed's own `safe_get_full_*` give the same numbers at ZeRO 1 to 3, but none at stage 0, where `safe_set_full_*` do
nothing without saying so; at 1 and 2 their sum over ranks turns -0 into 0, and no state can be set before the first
step; and they put every parameter together on every rank and know nothing of AdamW's step count. Here the engine's fp32
buffers are used in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from train.plain import INSTALLED, Masters, deepspeed
from train.world import World

if INSTALLED:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
else:
    BF16_Optimizer = FP16_UnfusedOptimizer = DeepSpeedZeroOptimizer_Stage3 = DeepSpeedZeroOptimizer = ()

MOMENTS = ("exp_avg", "exp_avg_sq")
Fill = Callable[[str, str, int, Tensor], None]
"""(kind, name, start, destination [n]): copies what was saved of `name` from `start` on."""


@dataclass(frozen=True)
class Share:
    """A stretch of a parameter that this rank updates.

    Args:
        name: of the parameter in the head.
        start: where it begins in the flattened parameter.
        tensors: {"weight", "exp_avg", "exp_avg_sq"}: [n] fp32, the engine's own memory.
        count: AdamW's step count, the engine's own scalar.
        written: the part of it that this rank saves: where ranks keep the same, each saves some of it.
    """

    name: str
    start: int
    tensors: dict[str, Tensor]
    count: Tensor
    written: slice


def shares(engine: Any, world: World) -> list[Share]:
    """This rank's shares of the head's trained parameters, for an engine that has made no step yet.

    Optimizer state is made where it is not there, as the first step would make it.
    """
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        # The engine of bf16 at stage 0 has made a step without gradients: AdamW counts it, and the weights decayed.
        for low, master in _pairs(engine.optimizer):
            master.data.copy_(low.data)
            engine.basic_optimizer.state[master]["step"].zero_()
    found: list[Share] = []
    for name, parameter in trained(engine):
        place = _place(engine.optimizer, parameter, world)
        if place is None:
            continue
        owner, flat, offset, start, n = place
        state = _state(engine.basic_optimizer, owner)
        kept = {"weight": flat, **{key: state[key].view(-1) for key in MOMENTS}}
        tensors = {key: tensor.narrow(0, offset, n) for key, tensor in kept.items()}
        whole = n == full_shape(parameter).numel() and engine.zero_optimization_stage() == 0
        written = slice(n * world.rank // world.size, n * (world.rank + 1) // world.size) if whole else slice(0, n)
        found.append(Share(name, start, tensors, state["step"], written))
    return found


def trained(engine: Any) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that are trained, in one order on all ranks."""
    return [(name, p) for name, p in engine.module.head.named_parameters() if p.requires_grad]


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter, whatever the engine leaves of it here."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def fixed(engine: Any, world: World) -> Iterator[tuple[str, int, Tensor]]:
    """Name, start and flat tensor of what is not trained, buffers included: of each the part that this rank saves."""
    head = engine.module.head
    for name, tensor in _untrained(head):
        if isinstance(tensor, nn.Parameter) and engine.zero_optimization_stage() == 3:
            part: Tensor = tensor.ds_tensor.detach().view(-1)  # type: ignore[attr-defined]
            start = len(part) * world.rank
            n = min(len(part), full_shape(tensor).numel() - start)
            if n > 0:
                yield name, start, part[:n]
        elif world.first:
            yield name, 0, tensor.detach().reshape(-1)


def take(engine: Any, world: World, held: list[Share], count: int, fill: Fill) -> None:
    """Puts what was saved into weights, optimizer state and buffers. Every rank must call.

    Args:
        held: this rank's shares.
        count: optimizer steps done.
        fill: finds what was saved.
    """
    for share in held:
        for kind, tensor in share.tensors.items():
            fill(kind, share.name, share.start, tensor)
        share.count.fill_(count)
    for name, tensor in _untrained(engine.module.head):
        _fill_whole(engine, world, "fixed", name, tensor, fill)
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for name, parameter in trained(engine):
            _fill_whole(engine, world, "weight", name, parameter, fill)
    elif isinstance(optimizer, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
        optimizer.update_lp_params()
    elif isinstance(optimizer, (FP16_UnfusedOptimizer, Masters)):
        for low, master in _pairs(optimizer):
            low.data.copy_(master.data)


def _fill_whole(engine: Any, world: World, kind: str, name: str, tensor: Tensor, fill: Fill) -> None:
    """A whole tensor, as the forward pass sees it: under ZeRO-3 rank 0 reads it and the engine shares it out."""
    sharded = isinstance(tensor, nn.Parameter) and engine.zero_optimization_stage() == 3
    if not sharded:
        _copy_in(tensor, lambda flat: fill(kind, name, 0, flat))
        return
    with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
        if world.first:
            _copy_in(tensor, lambda flat: fill(kind, name, 0, flat))


def _copy_in(tensor: Tensor, fill: Callable[[Tensor], None]) -> None:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    fill(flat)
    tensor.data.copy_(flat.view(tensor.shape))


def _untrained(head: nn.Module) -> list[tuple[str, Tensor]]:
    """Frozen parameters and persistent buffers, in one order on all ranks."""
    moving = {name for name, p in head.named_parameters() if p.requires_grad}
    return [(name, t) for name, t in head.state_dict(keep_vars=True).items() if name not in moving]


def _place(optimizer: Any, parameter: nn.Parameter, world: World) -> tuple[Tensor, Tensor, int, int, int] | None:
    """Where this rank keeps its share of a parameter, or None where it has none.

    Returns:
        The tensor that the optimizer steps, the same flattened, and in that the offset; where the share starts in the
        parameter, and its length.
    """
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        owner, start = optimizer.fp32_partitioned_groups_flat[group], size * world.rank
        n = min(size, full_shape(parameter).numel() - start)  # the last ones are filled up
        return (owner, owner.data, offset, start, n) if n > 0 else None
    if isinstance(optimizer, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
        link: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if link is None:
            return None
        owner = optimizer.optimizer.param_groups[link.param_group_index]["params"][0]
        there, here = link.hp_fragment_address, link.lp_fragment_address
        return owner, owner.data, there.start, here.start, there.numel
    if isinstance(optimizer, (FP16_UnfusedOptimizer, Masters)):
        owner = next(master for low, master in _pairs(optimizer) if low is parameter)
        return owner, owner.data.view(-1), 0, 0, owner.numel()
    return parameter, parameter.data.view(-1), 0, 0, parameter.numel()


def _pairs(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights in low precision and their fp32 masters, of an engine that shards nothing."""
    for low, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups):
        yield from zip(low, masters)


def _state(optimizer: torch.optim.Optimizer, owner: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a tensor, as its first step would make it."""
    state = optimizer.state[owner]
    if not state:
        fused = bool(optimizer.defaults["fused"])
        state["step"] = torch.zeros((), dtype=torch.float32, device=owner.device if fused else "cpu")
        state |= {key: torch.zeros_like(owner.data, memory_format=torch.preserve_format) for key in MOMENTS}
    held: dict[str, Tensor] = state
    return held
