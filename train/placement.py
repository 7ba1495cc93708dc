"""Where the frozen target's text layers live: whole on every device, shared out over the ranks, or in host memory.

Invariant: what is computed does not depend on it. A layer that lives elsewhere has its weights on the device only while
a pass of the text model runs, two layers at a time: the one that computes and the next, already on its way. Embedding,
unembedding, final norm and vision tower are whole on every device, for ranks call them as often as their own data ask.
Passes of a shared-out target belong to all ranks: as many on each, or inside `uneven`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmspec.arguments import launched_as
from mmspec.recipe import TargetNode
from mmspec.targets import load_target
from mmspec.types import InputError, Target
from train.tracking import Tracker
from train.world import World

if TYPE_CHECKING:
    from mmspec.targets.base import HFTarget

ALIGNMENT = 256
"""Bytes: a weight starts where a tensor of its own would."""
PATIENCE = timedelta(hours=2)


class LostRank(BaseException):
    """A pass of a shared-out target cannot be finished.

    No `Exception`: the decoding loop would take it for the fault of the request that it was working on, go on with the
    next, and have it written down as unusable.
    """


def load(node: TargetNode, world: World, tracker: Tracker) -> HFTarget:
    """The recipe's target, placed. Every rank must call.

    A target that is not to be whole on a device is read into host memory first; the ranks of a machine take turns where
    they keep a share of it, so that the machine holds it once.

    Raises:
        InputError: on every rank, what `load_target` raised on any.
    """
    placement = node.placement
    if placement == "sharded" and world.size == 1:
        tracker.say("target.placement=sharded: one process has nobody to share with; its target is replicated")
        placement = "replicated"
    if placement == "replicated":
        return load_target(node.name, node.dtype, str(world.device), node.quantize)
    group = dist.new_group(timeout=PATIENCE) if placement == "sharded" else None
    made: list[Layers] = []

    def place(model: Any) -> None:
        store = Host(world.device) if group is None else Shares(world, group)
        made.append(Layers(model.model.language_model, store, world.device))
        model.to(world.device)

    def read() -> HFTarget:
        target = load_target(node.name, node.dtype, str(world.device), place=place)
        # Weights that come and go stand at other addresses in each pass, which a CUDA graph would not notice.
        target.static = False
        _HOOKED[target] = made[0]
        return target

    target = read() if group is None else _in_turns(world, read)
    whole = sum(made[0].sizes)
    tracker.say(
        f"target: {placement}; {resident_bytes(target) / 1e6:,.1f} MB of its layers' {whole / 1e6:,.1f} MB on this "
        "device between passes"
    )
    return target


def _in_turns(world: World, read: Callable[[], HFTarget]) -> HFTarget:
    """One rank of each machine after the other; a fault of one is everybody's."""
    mine = launched_as()[2]
    target: HFTarget | None = None
    for turn in range(world.largest(mine) + 1):
        fault: str | None = None
        try:
            target = read() if turn == mine else target
        except InputError as error:
            fault = str(error)
        for found in filter(None, world.gather(fault)):
            raise InputError(found)
    assert target is not None
    return target


def uneven(target: Target) -> contextlib.AbstractContextManager[None]:
    """For work in which ranks need different numbers of passes. Every rank must enter; none leaves before all are done.

    A rank that has left its block (by an exception, too) goes on giving its share of the weights to the others.
    """
    layers = _HOOKED.get(target)
    return contextlib.nullcontext() if layers is None else layers.uneven()


def lend(target: HFTarget, index: int) -> contextlib.AbstractContextManager[nn.Module]:
    """One text layer with its weights in place, to be read inside the block. Every rank must enter."""
    layers = _HOOKED.get(target)
    if layers is None:
        return contextlib.nullcontext(target.text_model.layers[index])
    return layers.lend(index)


def resident_bytes(target: HFTarget) -> int:
    """Bytes of text layers that this rank's device holds between passes, whatever they are part of."""
    weights = [p.untyped_storage().nbytes() for p in target.text_model.layers.parameters()]
    layers = _HOOKED.get(target)
    return sum(weights) + (layers.store.device_bytes if layers is not None else 0)


class Store(Protocol):
    """Keeps the packed weights of all layers, and gives them back one layer at a time."""

    @property
    def device_bytes(self) -> int:
        """Bytes that it holds on the device."""

    def add(self, packed: Tensor) -> int:
        """Takes the next layer, [n] uint8 on the host; returns the bytes that `fetch` fills."""

    def fetch(self, index: int, into: Tensor) -> Callable[[], Any]:
        """Begins to fill `into`, [n] uint8 on the device; whoever uses it calls the returned function first."""

    def announce(self, coming: bool) -> int:
        """Says whether a pass of this rank comes; the number of ranks of which one does."""


class Host:
    """All of every layer, in host memory (pinned where there is a GPU), copied beside the pass that computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.packed: list[Tensor] = []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def device_bytes(self) -> int:
        return 0

    def add(self, packed: Tensor) -> int:
        self.packed.append(packed.pin_memory() if self._stream is not None else packed)
        return len(packed)

    def fetch(self, index: int, into: Tensor) -> Callable[[], Any]:
        if self._stream is None:
            into.copy_(self.packed[index])
            return lambda: None
        stream, now = self._stream, torch.cuda.current_stream(self.device)
        # What was computed with the buffer's former contents is in the queue of the stream that computes.
        stream.wait_stream(now)
        with torch.cuda.stream(stream):
            into.copy_(self.packed[index], non_blocking=True)
        return lambda: torch.cuda.current_stream(self.device).wait_stream(stream)

    def announce(self, coming: bool) -> int:
        return int(coming)


class Shares:
    """An equal part of every layer, on the device; a layer is gathered from all ranks.

    Args:
        group: a process group of its own, so that its calls never meet those of the training engine.
    """

    def __init__(self, world: World, group: Any) -> None:
        self.world, self.group = world, group
        self.shares: list[Tensor] = []

    @property
    def device_bytes(self) -> int:
        return sum(share.untyped_storage().nbytes() for share in self.shares)

    def add(self, packed: Tensor) -> int:
        rank, size = self.world.rank, self.world.size
        each = _aligned(-(-len(packed) // size))
        mine = packed.new_zeros(each)
        part = packed[rank * each : (rank + 1) * each]
        mine[: len(part)] = part
        self.shares.append(mine.to(self.world.device))
        return each * size

    def fetch(self, index: int, into: Tensor) -> Callable[[], Any]:
        work: Any = dist.all_gather_into_tensor(into, self.shares[index], group=self.group, async_op=True)
        # On a GPU this holds up the stream that computes, not the host.
        return lambda: work.wait()

    def announce(self, coming: bool) -> int:
        many = torch.tensor([int(coming)], device=self.world.device)
        dist.all_reduce(many, group=self.group)
        # Who has a pass of its own need not know about others, nor wait for the device to hear of them.
        return 1 if coming else int(many.item())


@dataclass(frozen=True)
class Weight:
    """A parameter's place in its layer's packed bytes."""

    owner: nn.Module
    name: str
    start: int
    end: int
    dtype: torch.dtype
    shape: torch.Size

    def take(self, packed: Tensor) -> None:
        """Points the parameter into the packed bytes."""
        getattr(self.owner, self.name).data = packed[self.start : self.end].view(self.dtype).view(self.shape)

    def drop(self) -> None:
        """Leaves the parameter without contents."""
        parameter = getattr(self.owner, self.name)
        parameter.data = parameter.data.new_empty(0)


class Layers:
    """The layers of a text model, whose weights come for a pass and go with it.

    Args:
        text_model: with all its weights in host memory; they are taken out of it.
        store: where they go.
        device: where they are wanted.

    A pass runs every layer once, in order. One that breaks off fetches the rest all the same: a rank on which a pass
    fails stays in step with the others.
    """

    def __init__(self, text_model: nn.Module, store: Store, device: torch.device) -> None:
        self.store, self.device = store, device
        self.weights: list[list[Weight]] = []
        self.sizes: list[int] = []
        self.modules: list[nn.Module] = list(text_model.layers)  # type: ignore[arg-type]
        for index, layer in enumerate(self.modules):
            weights, packed = _pack(layer)
            self.weights.append(weights)
            self.sizes.append(store.add(packed))
            for weight in weights:
                weight.drop()
            layer.register_forward_pre_hook(self._hook(self._enter, index))
            layer.register_forward_hook(self._hook(self._leave, index), always_call=True)
        text_model.register_forward_pre_hook(self._hook(self._begin))
        text_model.register_forward_hook(self._hook(self._end), always_call=True)
        self._uneven = False
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._coming: dict[int, Callable[[], Any]] = {}
        self._next = 0

    @property
    def present(self) -> list[int]:
        """The layers that have their weights now."""
        return [
            index for index, weights in enumerate(self.weights) if getattr(weights[0].owner, weights[0].name).numel()
        ]

    @contextlib.contextmanager
    def uneven(self) -> Iterator[None]:
        """See the function `uneven`."""
        self._uneven = True
        try:
            try:
                yield
            finally:
                self._serve()
        except LostRank as lost:
            raise RuntimeError(str(lost)) from lost
        finally:
            self._uneven = False

    @contextlib.contextmanager
    def lend(self, index: int) -> Iterator[nn.Module]:
        """See the function `lend`."""
        weights = self.weights[index]
        with torch.inference_mode(False):
            packed = self._buffer()
            self.store.fetch(index, packed[: self.sizes[index]])()
        for weight in weights:
            weight.take(packed)
        try:
            yield self.modules[index]
        finally:
            for weight in weights:
                weight.drop()

    def _hook(self, function: Callable[..., None], *known: int) -> Callable[..., None]:
        """A module hook without arguments; tensors of an inference-only pass would not do as weights."""

        def hook(*_: Any) -> None:
            try:
                with torch.inference_mode(False), torch.no_grad():
                    function(*known)
            except RuntimeError as error:
                if self._uneven:
                    raise LostRank(str(error)) from error
                raise

        return hook

    def _buffer(self) -> Tensor:
        return torch.empty(max(self.sizes), dtype=torch.uint8, device=self.device)

    def _begin(self) -> None:
        if self._uneven:
            self.store.announce(True)
        self._prepare()

    def _prepare(self) -> None:
        self._buffers, self._next = (self._buffer(), self._buffer()), 0
        self._start(0)

    def _start(self, index: int) -> None:
        assert self._buffers is not None
        self._coming[index] = self.store.fetch(index, self._buffers[index % 2][: self.sizes[index]])

    def _arrive(self) -> int:
        """Waits for the next layer and sends for the one behind it."""
        index, self._next = self._next, self._next + 1
        self._coming.pop(index)()
        if self._next < len(self.sizes):
            self._start(self._next)
        return index

    def _enter(self, index: int) -> None:
        if self._buffers is None or index != self._next:
            raise RuntimeError(f"layer {index} was called outside its turn in a pass of the whole text model")
        self._arrive()
        for weight in self.weights[index]:
            weight.take(self._buffers[index % 2])

    def _leave(self, index: int) -> None:
        for weight in self.weights[index]:
            weight.drop()

    def _end(self) -> None:
        if self._buffers is None:
            return
        while self._next < len(self.sizes):
            self._arrive()
        # Freed in the order of the stream that computes, which has waited for every fetch.
        self._buffers = None

    def _serve(self) -> None:
        """Takes part in the passes of other ranks until there are none."""
        while self.store.announce(False):
            self._prepare()
            self._end()


_HOOKED: WeakKeyDictionary[Target, Layers] = WeakKeyDictionary()


def _pack(layer: nn.Module) -> tuple[list[Weight], Tensor]:
    """A layer's parameters one behind the other, [n] uint8, and where each stands."""
    weights: list[Weight] = []
    parts: list[Tensor] = []
    end = 0
    for owner in layer.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            content = parameter.detach().contiguous().flatten().view(torch.uint8)
            start, end = end, end + _aligned(len(content))
            weights.append(Weight(owner, name, start, start + len(content), parameter.dtype, parameter.shape))
            parts += [content, content.new_zeros(end - start - len(content))]
    return weights, torch.cat(parts)


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT
