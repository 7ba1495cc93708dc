"""A real training step in a process of its own, and the most that was resident during it: what the planner predicts.

    python -m tests.memory SETTINGS      # JSON; prints one JSON line

Whatever is allocated is given back to the system as soon as it is freed (the process is started with a threshold for
that), so that resident memory is live memory; what code and thread pools occupy is taken before, by a step of the same
kind on a tiny model.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def measure(settings: Mapping[str, Any]) -> int:
    """Peak bytes of a run of two steps, over what the process had before anything of it was built.

    Args:
        settings: see `run`.

    Returns:
        The most that Linux saw resident since then, less what was resident then.

    Raises:
        RuntimeError: the process failed; what it said.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    words = [sys.executable, "-m", "tests.memory", json.dumps(settings)]
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def recipe(settings: Mapping[str, Any]) -> Any:
    """The recipe of some settings: the file `base` with the overrides `recipe`, on a CPU."""
    from mmspec.recipe import load

    return load(ROOT / "recipes" / f"{settings['base']}.yaml", [*settings["recipe"], "target.device=cpu"])


def run(settings: Mapping[str, Any]) -> None:
    """Prints the peak of two optimizer steps, by the engine that trains.

    Args:
        settings: base and recipe (see `recipe`); text: sizes of the target's text model; lengths and answers: tokens of
            each conversation of a micro-batch, and those of its answer.
    """
    import torch

    from train.world import join

    torch.set_num_threads(1)
    world = join("cpu")
    tiny = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    tiny |= {"num_key_value_heads": 2, "vocab_size": 128}
    small = {**settings, "recipe": [*settings["recipe"], *["head.draft_vocab_size=0"] * ("eagle3" in settings["base"])]}
    steps(recipe(small), tiny, [32] * len(settings["lengths"]), [16] * len(settings["lengths"]), world)
    before = reset_peak()
    steps(recipe(settings), settings["text"], settings["lengths"], settings["answers"], world)
    print(json.dumps({"peak_bytes": status("VmHWM") - before, "before": before}))


def steps(recipe: Any, text: Mapping[str, int], lengths: list[int], answers: list[int], world: Any) -> None:
    """Builds target, head and engine, and trains two steps: the first one makes the optimizer's state."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from mmspec import checkpoint
    from mmspec.losses import valid_pairs
    from mmspec.targets._adapters import ATTENTION
    from mmspec.targets.llava import Target
    from mmspec.types import Prompt
    from tests import tiny
    from train.fit import Fit, MicroBatch, Plan, Trainee
    from train.head import _objective
    from train.sources import LiveBatch
    from train.stopping import Stopper
    from train.tracking import Tracker

    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=LlamaConfig(**text, max_position_embeddings=8192),
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ),
        image_token_index=2,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration._from_config(
        config,
        dtype=getattr(torch, recipe.target.dtype),
        attn_implementation={"text_config": ATTENTION, "vision_config": "sdpa"},
    )
    target = Target(model, tiny.processor(), "random-llava")
    head = checkpoint.build_head(recipe.head.kind, recipe.head.config.resolve(target.shape), recipe.loss)
    plan = Plan("head", 2, recipe.optim, recipe.deepspeed, Path("/nowhere"), 0, 0)
    tracker = Tracker(Path("/nowhere"), "memory", {}, active=False, record=False, resume_id=None)
    fit = Fit(Trainee(head, _objective(target, None, recipe.loss.steps)), plan, world, Stopper(), tracker)
    rows = []
    for length, n in zip(lengths, answers):
        ids = torch.randint(3, text["vocab_size"], (length,))
        marks = (torch.arange(length) >= length - n).long()
        rows.append((Prompt(ids, torch.zeros(length, dtype=torch.bool), {}), marks))

    def make() -> dict[str, Any]:
        found = LiveBatch(target, head.taps, rows, recipe.data.pack).features()
        return {item.name: getattr(found, item.name) for item in dataclasses.fields(found)}

    count = sum(valid_pairs(marks) for _, marks in rows)
    micro = [MicroBatch(make, count)] * recipe.optim.accumulate
    fit.run(lambda step: micro, {}, lambda step: None, lambda metrics: {})


def reset_peak() -> int:
    """Resident bytes now, from where the peak starts."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return status("VmRSS")


def status(name: str) -> int:
    """Bytes that Linux counts for this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
