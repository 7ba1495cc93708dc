"""The engine of a machine without DeepSpeed: one process, plain torch, the same step.

Invariant: of what `Fit` asks of DeepSpeed's engine this one does the same arithmetic: gradients added up over
micro-batches, clipped by their global norm, AdamW on fp32 weights, of which bf16 training works on rounded copies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmspec.recipe import DeepSpeedNode
from mmspec.types import InputError
from train.engine import adamw

try:
    import deepspeed
except ModuleNotFoundError:
    deepspeed = None

INSTALLED = deepspeed is not None
"""Whether DeepSpeed trains."""


def check_plain(node: DeepSpeedNode, processes: int) -> None:
    """Whether a run can do without DeepSpeed. ZeRO stages are no hindrance: one process shares with nobody.

    Raises:
        InputError: it asks for more than one process and its device hold.
    """
    wants = {
        f"{processes} processes": processes > 1,
        f"deepspeed.config={node.config}": node.config is not None,
        "deepspeed.offload_optimizer=true": node.offload_optimizer,
        "deepspeed.offload_param=true": node.offload_param,
    }
    if wanted := next((name for name, asked in wants.items() if asked), None):
        raise InputError(f"{wanted} needs DeepSpeed, which is not installed; pip install deepspeed, or do without")


class Masters:
    """AdamW over fp32 copies of weights that are kept in bf16; named as DeepSpeed's optimizer of that kind.

    Args:
        optimizer: over the copies.
        low: the weights, in the same order.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, low: list[nn.Parameter]) -> None:
        self.optimizer = optimizer
        self.fp16_groups = [low]
        self.fp32_groups = [[p for group in optimizer.param_groups for p in group["params"]]]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups


class PlainEngine:
    """What `Fit` uses of an engine, for one process.

    Args:
        module: what is trained, on its device; of bf16 it is made.
        node: of the recipe; only `bf16` counts.
        optim: of the recipe.
    """

    def __init__(self, module: nn.Module, node: DeepSpeedNode, optim: Any) -> None:
        check_plain(node, 1)
        self.module, self._optim = module, optim
        low = [p for p in module.parameters() if p.requires_grad]
        masters = nn.Module()
        if node.bf16:
            masters.copies = nn.ParameterList([nn.Parameter(p.detach().float().clone()) for p in low])
            module.bfloat16()
        self.basic_optimizer = adamw(masters if node.bf16 else module, optim, on_cpu=False)
        self.optimizer: Any = Masters(self.basic_optimizer, low) if node.bf16 else self.basic_optimizer
        self._low = low
        self._stepped = [p for group in self.basic_optimizer.param_groups for p in group["params"]]
        self._micro, self._norm = 0, 0.0

    def __call__(self, **batch: Any) -> Any:
        return self.module(**batch)

    def train(self) -> None:
        self.module.train()

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        """Adds gradients up; `scale_wrt_gas` is False here: `Fit` divides by what it counts itself."""
        assert not scale_wrt_gas
        loss.backward()
        if self._low[0] is self._stepped[0]:
            return
        for low, master in zip(self._low, self._stepped):  # sums of many gradients would lose their last bits in bf16
            if low.grad is not None:
                more = low.grad.float()
                master.grad = more if master.grad is None else master.grad.add_(more)
                low.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """The end of a micro-batch; with the last one the weights move."""
        self._micro += 1
        if self._micro % self._optim.accumulate:
            return
        clip = self._optim.clip
        norm = nn.utils.clip_grad_norm_(self._stepped, clip if clip > 0 else float("inf"))
        self._norm = float(norm)
        self.basic_optimizer.step()
        self.basic_optimizer.zero_grad(set_to_none=True)
        for low, master in zip(self._low, self._stepped):
            if low is not master:
                low.copy_(master)

    def was_step_applied(self) -> bool:
        return True

    def get_global_grad_norm(self) -> float:
        return self._norm

    def zero_optimization_stage(self) -> int:
        return 0
