"""Linear layers of a target on a CPU, multiplied in the order of weights that oneDNN reads.

torch's fp32 product of a few rows with a matrix goes through MKL, which repacks the matrix in every call, and pays for
that with every node of a tree. oneDNN takes weights that were packed once: a pass over 8 or 16 nodes then costs little
more than one over a single token, and a prompt half. That is so with AVX-512; with AVX2 a call of oneDNN costs more
than the repacking of matrices of any size but the largest, and layers stay plain.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

MOST = 1 << 30
"""Bytes of weights that are packed at most: they are held twice then, and who decodes larger models on a CPU in fp32
has no memory for that."""


class PackedLinear(nn.Linear):
    """A frozen linear layer that has its weight a second time, packed when it is first decoded with, or has changed.

    With gradients, outside of `torch.inference_mode`, in a dtype it is moved to later, and where its weight was made in
    inference mode, so that changes of it go unnoticed, it is the plain layer.
    """

    packed: Tensor | None = None
    packed_of: tuple[int, int] = (-1, -1)
    """Which weight that is: address and version, which every change in place raises."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        fit = weight.dtype == torch.float32 and x.device.type == "cpu" and not weight.is_inference()
        if not fit or not torch.is_inference_mode_enabled():
            return super().forward(x)
        if self.packed_of != (of := (weight.data_ptr(), weight._version)):
            self.packed, self.packed_of = torch.ops.mkldnn._reorder_linear_weight(weight.detach()), of
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return out

    def __getstate__(self) -> dict[str, Any]:
        """A copy packs anew."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("packed")}


def pays() -> bool:
    """Whether this machine multiplies faster by packed weights: told by its instructions, not timed, so that all runs
    on it round alike."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.cpu.get_cpu_capability() == "AVX512"


def pack(layers: nn.Module) -> None:
    """Make the plain linear layers among some modules packed ones, in place; their weights stay where they are.

    Nothing happens for other dtypes than fp32, off the CPU, for more than `MOST` bytes, in a torch without oneDNN, or
    on a machine where it does not pay (`pays`).
    """
    plain = [m for m in layers.modules() if type(m) is nn.Linear]
    fit = all(m.weight.dtype == torch.float32 and m.weight.device.type == "cpu" for m in plain)
    if not fit or sum(m.weight.nbytes for m in plain) > MOST or not pays():
        return
    for linear in plain:
        linear.__class__ = PackedLinear
