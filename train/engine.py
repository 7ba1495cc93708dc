"""From a recipe's settings to the engine's: its JSON configuration, the optimizer and the learning rate of a step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmspec.recipe import DeepSpeedNode, Optim
from mmspec.types import InputError

OWNED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
OWNED_OBJECTS = ("optimizer", "scheduler")
BUCKET = 500_000_000
"""Elements of the engine's gradient bucket, unless less is enough."""


def learning_rate(step: int, steps: int, optim: Optim) -> float:
    """The rate of a step counted from 0: linear warm-up, then the schedule down to 0 at the end."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    if optim.schedule == "constant":
        return optim.lr
    done = (step - optim.warmup) / max(steps - optim.warmup, 1)
    return optim.lr * (1 - done if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def engine_settings(node: DeepSpeedNode, optim: Optim, world_size: int, n_trained: int) -> dict[str, Any]:
    """The engine's JSON configuration: the recipe's values over those of `deepspeed.config`.

    Args:
        node, optim: of the recipe.
        world_size: processes.
        n_trained: parameters that are trained.

    Raises:
        InputError: the file sets what the recipe owns.
    """
    settings: dict[str, Any] = {}
    if node.config is not None:
        settings = _read_settings(node.config)
    for name in ("zero_optimization", "bf16"):
        if not isinstance(settings.get(name, {}), dict):
            raise InputError(f"deepspeed.config={node.config}: {name} must be a JSON object")
    zero: dict[str, Any] = {"stage": node.zero_stage, **settings.pop("zero_optimization", {})}
    if int(zero["stage"]) != node.zero_stage:
        raise InputError(
            f"deepspeed.config={node.config} says ZeRO stage {zero['stage']}, deepspeed.zero_stage={node.zero_stage}"
        )
    # A GPU reserves the gradient bucket whole; the engine's own 5e8 elements are more than most heads have.
    zero.setdefault("reduce_bucket_size", min(BUCKET, max(n_trained, 1)))
    if not isinstance(zero["reduce_bucket_size"], int | float):
        raise InputError(f"deepspeed.config={node.config}: reduce_bucket_size must be a number of elements")
    for name, wanted in (("offload_optimizer", node.offload_optimizer), ("offload_param", node.offload_param)):
        there = zero.get(name) or {}
        place = there.get("device", "cpu") if there else "none"
        if place not in ("cpu", "none"):
            raise InputError(
                f"deepspeed.config={node.config} offloads to {place!r}; resumable state is read from 'cpu' alone"
            )
        if there and (place == "cpu") != wanted:
            raise InputError(
                f"deepspeed.config={node.config} sets {name}.device={place!r}; say so with deepspeed.{name}="
                f"{str(place == 'cpu').lower()}"
            )
        if wanted:
            zero[name] = {**there, "device": "cpu"}
    if "fp16" in settings:
        # Its loss scale skips steps by design, and is state that nobody saves.
        raise InputError(f"deepspeed.config={node.config} sets 'fp16'; use deepspeed.bf16=true")
    return {
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        **settings,
        "train_micro_batch_size_per_gpu": optim.micro_batch,
        "gradient_accumulation_steps": optim.accumulate,
        "train_batch_size": optim.micro_batch * optim.accumulate * world_size,
        "gradient_clipping": optim.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Its own CPU optimizer is compiled at first use; PyTorch's fused AdamW does the same without a compiler.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {**settings.get("bf16", {}), "enabled": node.bf16},
    }


def _read_settings(path: str) -> dict[str, Any]:
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"deepspeed.config={path} is no JSON: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise InputError(f"deepspeed.config={path} must be a JSON object")
    for key in (*OWNED, *OWNED_OBJECTS):
        if key in settings:
            raise InputError(
                f"deepspeed.config={path} sets {key!r}, which the recipe's optim node says; remove it there"
            )
    return settings


def adamw(module: nn.Module, optim: Optim, on_cpu: bool) -> torch.optim.Optimizer:
    """AdamW over a module's trained parameters.

    Args:
        on_cpu: the engine keeps its state on the host.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    # Fused: the one that is quick on a CPU, where offloaded state is.
    how = {"fused": True} if on_cpu else {}
    return torch.optim.AdamW(parameters, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, **how)
