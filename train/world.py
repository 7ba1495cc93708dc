"""The process group: who am I, whom do I work with, on which device.

Invariant: the same code runs in one process or many; with one process every collective is the identity.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mmspec.arguments import launched_as
from mmspec.types import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among its peers.

    Args:
        rank, size: position in and size of the group.
        device: where this rank computes.
        store: the group's key-value store; asking it needs no other rank to take part.
    """

    rank: int
    size: int
    device: torch.device
    store: Any

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    def sum(self, values: Sequence[float] | torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in float64 on the CPU; [n] in, [n] out. Every rank must call."""
        local = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
        if self.size == 1:
            return local
        tensor = local.to(self.device) if self.device.type == "cuda" else local.clone()
        dist.all_reduce(tensor)
        return tensor.cpu()

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of a tensor on this rank's device, in place. Every rank must call."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, value: int) -> int:
        """The maximum over ranks. Every rank must call."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor.item())

    def share(self, value: Any) -> Any:
        """Rank 0's object, on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's object, by rank, on every rank. Every rank must call."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def lead(self, work: Callable[[], T]) -> T:
        """Rank 0 does the work and every rank gets its result. Every rank must call.

        Raises:
            InputError: on every rank, what the work raised on rank 0.
        """
        result: tuple[Any, str | None] = (None, None)
        if self.first:
            try:
                result = (work(), None)
            except InputError as error:
                result = (None, str(error))
        value, fault = self.share(result)
        if fault is not None:
            raise InputError(fault)
        return value

    def barrier(self) -> None:
        """Waits for every rank."""
        self.largest(0)


def pick_device(wanted: str) -> torch.device:
    """`auto`: this rank's CUDA device where there is one, else the CPU."""
    local_rank = launched_as()[2]
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda", local_rank) if wanted == "cuda" else torch.device(wanted)


def join(device_name: str) -> World:
    """Joins the group that the launcher's variables describe, or makes one of a single process."""
    rank, size, _ = launched_as()
    device = pick_device(device_name)
    if "MASTER_ADDR" not in os.environ:
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=timedelta(minutes=5))))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(hours=2),
    )
    return World(rank, size, device, dist.PrefixStore("mmspec", store))


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
