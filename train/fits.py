"""Which settings fit a device: the recipe's own and others that train the same thing, from the fastest on.

Invariant: the global batch is the recipe's, whatever micro-batch and accumulation a setting has. What changes the
numbers of training (narrower floats, quantised weights) is tried as well, and marked.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mmspec.recipe import Recipe
from mmspec.types import InputError
from train import memory
from train.estimate import GIB, Assumed, Sizes, answer_seconds, work

CHUNKS = (1024, 256)
"""Values of loss.chunk that are tried; a smaller one saves logits and costs nothing that can be foreseen."""
SAME = ("optim.micro_batch", "optim.accumulate", "loss.chunk", "deepspeed.zero_stage", "deepspeed.offload_optimizer",
        "deepspeed.offload_param", "target.placement", "data.pack", "data.answer_batch")  # fmt: skip
NARROWER = ("target.dtype", "target.quantize", "deepspeed.bf16")
"""Keys that are changed: those after which training computes the same, and the others."""
OFFLOADS = ((False, False), (True, False), (True, True))
"""Of the optimizer, and of parameters."""


@dataclass(frozen=True)
class Setting:
    """A recipe with some keys changed.

    Args:
        changes: {key: value}, empty for the recipe as it is.
        bytes: at most, on a device.
        host: offloaded to the host's memory, by all its processes.
        seconds: of the head's training and the answers it takes.
        fits: whether it stays below the limit.
    """

    changes: dict[str, str]
    bytes: int
    host: int
    seconds: float
    fits: bool

    @property
    def same(self) -> bool:
        """Whether it computes what the recipe computes."""
        return not set(self.changes) & set(NARROWER)

    @property
    def overrides(self) -> str:
        """What to write behind the training command."""
        return " ".join(f"{key}={value}" for key, value in self.changes.items())


def search(
    recipe: Recipe, sized: Sizes, processes: int, limit: int, assumed: Assumed, global_batch: int = 0
) -> tuple[Setting, list[Setting]]:
    """The recipe as it is, and all other settings, the fastest first; among equals the one that changes least.

    Args:
        limit: bytes of a device that may be used.
        global_batch: conversations of an optimizer step, 0: the recipe's on so many processes.

    Raises:
        InputError: the global batch cannot be divided by the processes.
    """
    optim = scaled(recipe, processes, global_batch).optim
    own = _values(recipe, [*SAME, *NARROWER])

    def judged(changes: dict[str, str | int | bool]) -> Setting:
        changed = _changed(recipe, changes)
        held = memory.count(
            changed, sized.target, sized.head, memory.worst(changed, sized.target), processes, decoding=True
        )
        seconds = recipe.run.max_steps * work(changed, sized, processes, assumed).seconds
        seconds += answer_seconds(changed, sized, processes, assumed)
        named = {key: str(value).lower() for key, value in changes.items() if value != own[key]}
        return Setting(named, held.peak, processes * sum(held.host.values()), seconds, held.peak <= limit)

    mine = judged({"optim.micro_batch": optim.micro_batch, "optim.accumulate": optim.accumulate})
    each = optim.micro_batch * optim.accumulate
    found = [judged(changes) for changes in _candidates(recipe, each, processes)]
    return mine, sorted(found, key=lambda s: (round(s.seconds, 3), not s.same, len(s.changes), s.bytes))


def scaled(recipe: Recipe, processes: int, global_batch: int) -> Recipe:
    """The recipe with another global batch, 0: its own; micro-batches stay as they are where they can.

    Raises:
        InputError: the global batch cannot be divided by the processes.
    """
    if not global_batch:
        return recipe
    if global_batch % processes:
        raise InputError(f"a global batch of {global_batch} cannot be divided by {processes} processes")
    each, micro = global_batch // processes, recipe.optim.micro_batch
    micro = micro if each % micro == 0 else 1
    return _changed(recipe, {"optim.micro_batch": micro, "optim.accumulate": each // micro})


def recommended(mine: Setting, found: Sequence[Setting]) -> list[Setting]:
    """What to do: the recipe itself where it fits and none that computes the same takes a tenth less time, else the
    fastest of those; and after it the fastest of all, where that changes numbers and takes a tenth less. Empty: nothing
    fits."""
    same = next((setting for setting in found if setting.fits and setting.same), None)
    if mine.fits and (same is None or same.seconds > 0.9 * mine.seconds):
        same = mine
    other = next((setting for setting in found if setting.fits and not setting.same), None)
    if same is not None and other is not None and other.seconds > 0.9 * same.seconds:
        other = None
    return [setting for setting in (same, other) if setting is not None]


def shortlist(mine: Setting, found: Sequence[Setting]) -> list[Setting]:
    """A few settings worth a line: what is recommended, and for each way to hold target and optimizer the fastest that
    fits, else the smallest."""
    groups: dict[tuple[str | None, ...], list[Setting]] = {}
    keys = (
        *("target.placement", "target.quantize", "target.dtype"),
        *("deepspeed.offload_optimizer", "deepspeed.offload_param", "deepspeed.bf16"),
    )
    for setting in found:
        groups.setdefault(tuple(setting.changes.get(key) for key in keys), []).append(setting)
    best = [
        next((setting for setting in group if setting.fits), min(group, key=lambda setting: setting.bytes))
        for group in groups.values()
    ]
    listed = sorted(best, key=lambda setting: setting.seconds)
    fitting = recommended(mine, found)
    fitting += [setting for setting in listed if setting.fits and setting not in fitting][:4]
    # Of those that do not fit the ones that come closest.
    others = sorted((setting for setting in listed if not setting.fits), key=lambda setting: setting.bytes)[:3]
    return sorted([mine, *(s for s in fitting + others if s != mine)], key=lambda setting: setting.seconds)


def _candidates(recipe: Recipe, each: int, processes: int) -> Iterator[dict[str, str | int | bool]]:
    """Changes to try; each names every key it decides."""
    engine, target = recipe.deepspeed, recipe.target
    # What a file of the engine's own says of stage and offload is not to be contradicted.
    own = engine.config is not None
    stages = {engine.zero_stage, *(() if own else (0, 1, 2, 3) if processes > 1 else (0, 2, 3))}
    offloads = {(engine.offload_optimizer, engine.offload_param), *(() if own else OFFLOADS)}
    placements = ["replicated", *(["sharded"] if processes > 1 else []), "offloaded"]
    # Stored features were made by one target in one arithmetic, conversation by conversation.
    stored = bool(recipe.data.features)
    quantised = {recipe.target.quantize, *(() if stored else ("none", "8bit", "4bit"))}
    narrow = [(target.dtype, engine.bf16)]
    if target.dtype == "float32" or not engine.bf16:
        narrow.append(("bfloat16" if target.dtype == "float32" and not stored else target.dtype, True))
    held = [
        (stage, optimizer, param)
        for stage in sorted(stages)
        for optimizer, param in sorted(offloads)
        if (not optimizer or stage >= 1) and (not param or stage == 3)
    ]
    micros = [n for n in range(1, each + 1) if each % n == 0]
    chunks = sorted({recipe.loss.chunk, *(size for size in CHUNKS if size < recipe.loss.chunk)}, reverse=True)
    answers = sorted({recipe.data.answer_batch, *(n for n in (16, 8, 4, 2, 1) if n < recipe.data.answer_batch)})
    for micro, chunk, (stage, optimizer, param), placement, quantize, (dtype, bf16) in itertools.product(
        micros, chunks, held, placements, sorted(quantised), narrow
    ):
        if placement != "replicated" and quantize != "none":
            continue  # quantised weights stay where they are
        changes: dict[str, str | int | bool] = {
            "optim.micro_batch": micro,
            "optim.accumulate": each // micro,
            "loss.chunk": chunk,
            "deepspeed.zero_stage": stage,
            "deepspeed.offload_optimizer": optimizer,
            "deepspeed.offload_param": param,
            "target.placement": placement,
            "target.quantize": quantize,
            "target.dtype": dtype,
            "deepspeed.bf16": bf16,
        }
        packed = [recipe.data.pack]
        if micro > 1 and not recipe.data.pack and recipe.data.max_length and not stored:
            packed.append(recipe.data.max_length)
        for pack, batch in itertools.product(packed, answers if recipe.data.answers == "regenerated" else answers[-1:]):
            yield changes | {"data.pack": pack, "data.answer_batch": batch}


def _values(recipe: Recipe, keys: Sequence[str]) -> dict[str, str | int | bool]:
    found = {}
    for key in keys:
        node, name = key.split(".")
        found[key] = getattr(getattr(recipe, node), name)
    return found


def _changed(recipe: Recipe, changes: dict[str, str | int | bool]) -> Recipe:
    """A copy of a recipe with other values; what is not changed is shared."""
    nodes: dict[str, dict[str, str | int | bool]] = {}
    for key, value in changes.items():
        node, name = key.split(".")
        nodes.setdefault(node, {})[name] = value
    changed = copy.copy(recipe)
    for node, values in nodes.items():
        setattr(changed, node, replace(getattr(recipe, node), **values))
    return changed


def usable(gpu_gb: float, reserve_gb: float) -> int:
    """Bytes of a device of `gpu_gb` GiB without what libraries and fragmentation take."""
    return int((gpu_gb - reserve_gb) * GIB)
