"""What all phases of a run share, and the run folder's state between them.

Invariant: `state.json` says which phase is under way. A run that is started anew sets the old results aside in
`previous/` and keeps only the regenerated answers, which are keyed by what they depend on. All ranks see one run
folder; across machines it must be on a shared file system.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmspec.checkpoint import write_json
from mmspec.recipe import Recipe
from mmspec.records import Quarantine
from mmspec.types import InputError, Target
from train.answers import Prepared
from train.corpus import Corpus
from train.features import FeatureStore
from train.stopping import Stopper
from train.tracking import Tracker
from train.world import World

PHASES = ("head", "rollout", "controller", "done")
RESULTS = (
    *("head.safetensors", "head.json", "viskip.safetensors", "viskip.json", "tree.json", "recipe.yaml"),
    *("adapter_model.safetensors", "adapter_config.json"),
    *("provenance.json", "metrics.jsonl", "samples.jsonl", "quarantine.jsonl", "state.json"),
)
WORKING = ("state", "rollout", "tensorboard")
FREE_TO_CHANGE = {
    "run.resume", "run.samples", "run.eval_every", "run.eval_prompts", "run.eval_data", "run.eval_max_new_tokens",
    "run.save_every", "run.keep", "data.answer_batch", "data.answers_dir", "data.answer_head",
    "data.answer_method", "data.pack", "data.workers", "loss.chunk", "target.device",
    "target.placement", "run.trackers", "run.peak_tflops", "loss.recompute",
    "optim.micro_batch", "optim.accumulate", "policy.optim.micro_batch", "policy.optim.accumulate",
    "deepspeed.zero_stage", "deepspeed.offload_optimizer", "deepspeed.offload_param", "policy.rollouts_from",
}  # fmt: skip
"""Recipe keys that do not change what is learned, so a resumed run may change them. How the global batch is split among
processes, passes and ZeRO's shares is free; its size is not. Rounds that are taken are those that would be decoded."""


@dataclass
class State:
    """Where a run is.

    Args:
        phase: one of PHASES: the one under way.
        world_size: processes it was started with.
        data: digest of its corpus, once read.
        wandb_id: its W&B run, or None.
        recipe: its settings.
    """

    phase: str
    world_size: int
    data: str | None
    wandb_id: str | None
    recipe: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Writes `state.json`."""
        write_json(folder / "state.json", self.__dict__)


@dataclass
class Session:
    """One run on one rank."""

    recipe: Recipe
    world: World
    stopper: Stopper
    tracker: Tracker
    state: State
    target: Target
    corpus: Corpus
    prepared: Prepared
    quarantine: Quarantine
    features: FeatureStore | None = None
    """The target's states, where the recipe says that they are stored."""
    lost: frozenset[tuple[str, int]] = frozenset()
    """File and line of samples that an earlier part of this run lost in training; the quarantine has them."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.recipe.folder

    def enter(self, phase: str) -> None:
        """Notes the next phase. Every rank must call, so that nobody goes on before it is written."""
        self.state.phase = phase
        if self.world.first:
            self.state.save(self.folder)
        self.world.barrier()


def begin(recipe: Recipe, world_size: int) -> tuple[State, bool]:
    """Prepares the run folder, on one rank; returns the state to start from, and whether it is an earlier run's.

    Raises:
        InputError: what is to be resumed was made with another recipe or global batch.
    """
    folder = recipe.folder
    fresh = State("head", world_size, None, None, recipe.as_dict())
    state = read_state(folder) if recipe.run.resume else None
    if state is not None:
        if state.phase != "done":
            _check_same(state, fresh, folder)
        return state, True
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"run folder {folder} cannot be made ({error.strerror}); set run.out to a writable folder"
        ) from error
    _set_aside(folder)
    recipe.save(folder / "recipe.yaml")
    fresh.save(folder)
    return fresh, False


def finished(recipe: Recipe) -> bool:
    """Whether `run.resume=true` has nothing left to do.

    Raises:
        InputError: see `read_state`.
    """
    state = read_state(recipe.folder) if recipe.run.resume else None
    return state is not None and state.phase == "done"


def read_state(folder: Path) -> State | None:
    """Where the run of a folder stands; None where there is none.

    Raises:
        InputError: there is one, and what it says of itself is missing or damaged.
    """
    path = folder / "state.json"
    if not path.is_file():
        if work := next((name for name in ("state", "rollout") if (folder / name).is_dir()), None):
            raise InputError(
                f"run.resume: {folder} has {work}/ but no state.json that says what it belongs to; put it back, or "
                "start over without run.resume=true"
            )
        return None
    try:
        state = State(**json.loads(path.read_text(encoding="utf-8")))
        if state.phase not in PHASES:
            raise ValueError(f"phase {state.phase!r}")
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"run.resume: {path} cannot be read ({' '.join(str(error).split())}); start over without run.resume=true"
        ) from error
    return state


def _check_same(old: State, new: State, folder: Path) -> None:
    before, now = flat(old.recipe), flat(new.recipe)
    nodes = ["optim"] + ["policy.optim"] * (now["policy.kind"] == "learned")
    for node in nodes:
        sizes = [
            (run.world_size, *(entries[f"{node}.{key}"] for key in ("micro_batch", "accumulate")))
            for run, entries in ((old, before), (new, now))
        ]
        if math.prod(sizes[0]) != math.prod(sizes[1]):
            was, found = (f"{n} processes x micro_batch {micro} x accumulate {times}" for n, micro, times in sizes)
            raise InputError(
                f"run.resume: {folder} was started with {was} = {math.prod(sizes[0])} of {node}, not {found} = "
                f"{math.prod(sizes[1])}; choose {node}.micro_batch and {node}.accumulate to make the product the same"
            )
    for key in sorted(set(before) | set(now)):
        if key not in FREE_TO_CHANGE and before.get(key) != now.get(key):
            raise InputError(
                f"run.resume: {folder} was started with {key}={before.get(key)}, not {now.get(key)}; "
                "change it back, or start over without run.resume=true"
            )


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Entries of nested mappings by their dotted names."""
    if not isinstance(node, dict):
        return {prefix: node}
    out: dict[str, Any] = {}
    for key, value in node.items():
        out |= flat(value, f"{prefix}.{key}" if prefix else key)
    return out


def _set_aside(folder: Path) -> None:
    """Moves an earlier run's results to `previous/`, and drops its working state."""
    for name in WORKING:
        shutil.rmtree(folder / name, ignore_errors=True)
    old = [folder / name for name in RESULTS if (folder / name).is_file()]
    if old:
        shutil.rmtree(folder / "previous", ignore_errors=True)
        (folder / "previous").mkdir()
        for path in old:
            path.replace(folder / "previous" / path.name)
