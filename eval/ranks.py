"""Several processes that share the records of one evaluation (torchrun): who am I, and who has what.

Invariant: a conversation stays with one process, and what is decoded does not depend on how many there are. Processes
talk over gloo, a few words at the start and at the end; with one process nothing is set up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from mmspec.arguments import launched_as
from mmspec.records import Record
from mmspec.types import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among its peers.

    Args:
        rank, size: place in and size of the group.
        local: place among those of this machine.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that reports."""
        return self.rank == 0

    def mine(self, records: Sequence[Record]) -> list[Record]:
        """This process's records: every `size`-th of each topic."""
        seen: dict[str, int] = {}
        kept = []
        for record in records:
            place = seen[record.topic] = seen.get(record.topic, -1) + 1
            if place % self.size == self.rank:
                kept.append(record)
        return kept

    def gather(self, value: T) -> list[T]:
        """Every process's object, by rank, on every process. All must call."""
        if self.size == 1:
            return [value]
        found: list[T] = [value] * self.size
        dist.all_gather_object(found, value)
        return found

    def agree(self, work: Callable[[], T]) -> T:
        """Does the work on every process; an error of one is everyone's, so that nobody waits for it.

        Raises:
            InputError: what the work raised on the first process that failed.
        """
        value: list[T] = []
        fault = None
        try:
            value.append(work())
        except InputError as error:
            fault = str(error)
        for said in self.gather(fault):
            if said is not None:
                raise InputError(said)
        return value[0]

    def in_turn(self, work: Callable[[], T]) -> T:
        """The same, the first process before the others: they find what it has made.

        Raises:
            InputError: see `agree`.
        """
        done = self.agree(lambda: [work()] if self.first else [])
        rest = self.agree(lambda: [] if self.first else [work()])
        return (done or rest)[0]


def join() -> Ranks:
    """The group that the launcher's variables describe; one process without a launcher."""
    rank, size, local = launched_as()
    if size > 1 and not dist.is_initialized():
        # One waits for the other until its share is decoded, however long that takes.
        dist.init_process_group("gloo", timeout=timedelta(days=30))
    return Ranks(rank, size, local)


def leave(ranks: Ranks) -> None:
    """Ends the group."""
    if ranks.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def own_device(device: str, ranks: Ranks) -> str:
    """The device of this process: of several GPUs each its own; a CPU is shared."""
    if ranks.size > 1 and device == "cuda":
        return f"cuda:{ranks.local % torch.cuda.device_count()}"
    return device
