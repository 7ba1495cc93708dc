"""The part of bench_gpu that trains: a few steps of a recipe on a target of full size with random weights.

    python scripts/_gpu_train.py recipes/eagle3_llava7b.yaml --target llava-1.5-7b --json OUT [--tiny --device cpu]

It is the training of train/distill.py, the frozen target's pass included, on synthetic conversations with the answers
they come with. Written are medians over the steps behind the first three: tokens/s (padding excluded), TFLOP/s by
train/flops.py, MFU where the device's peak is known, seconds by phase; and the most memory that was taken.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _bench import environment, publish
from _random_target import NAMES, random_target

from mmspec.api import find_device
from mmspec.arguments import Parser, command
from mmspec.recipe import Recipe, load
from mmspec.records import Quarantine
from mmspec.types import InputError
from train import regenerate
from train.answers import Prepared
from train.asking import instructed
from train.corpus import read
from train.head import train_head
from train.plain import INSTALLED
from train.session import Session, State
from train.stopping import Stopper
from train.tracking import Tracker
from train.world import join

SETTLING = 3
"""Steps that do not count: kernels are chosen and memory is reserved."""
RATES = ("perf/tokens_per_s", "perf/answer_tokens_per_s", "perf/tflops", "perf/mfu")


def recipe_of(args: argparse.Namespace, out: Path) -> Recipe:
    """The recipe, cut to a few steps on data that is made here."""
    changes = [
        f"data.sources=[{{path: 'synth:val', limit: {8 if args.tiny else 96}}}]", "data.answers=given",
        "data.decontaminated=null", f"run.max_steps={args.steps}", "run.eval_every=0", "run.eval_data=synth:val",
        "run.eval_prompts=1", "run.eval_max_new_tokens=8", f"run.out={out}", "run.name=bench", "run.trackers=[]",
        "run.save_every=0", "optim.warmup=1", f"target.dtype={args.dtype}", f"target.device={args.device}",
        "target.placement=replicated", "deepspeed.zero_stage=0", "deepspeed.offload_optimizer=false",
        "deepspeed.offload_param=false", "policy.kind=fixed", *args.set,
    ]  # fmt: skip
    if args.tiny:
        changes += ["policy.depth=2", "policy.width=2", "policy.budget=4", "optim.micro_batch=1", "optim.accumulate=2"]
    return load(args.recipe, changes)


def measured(folder: Path) -> dict[str, Any]:
    """Figures of a run's steps."""
    entries = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    steps = [entry for entry in entries if "train/loss" in entry][SETTLING:]
    names = [*RATES, *(name for name in steps[0] if name.startswith("time/"))]
    figures: dict[str, Any] = {n: statistics.median(s[n] for s in steps) for n in names if n in steps[0]}
    return figures | {"perf/memory_gb": max(s["perf/memory_gb"] for s in steps), "steps": len(steps)}


def train(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Trains; returns its figures."""
    recipe = recipe_of(args, out)
    recipe.folder.mkdir(parents=True, exist_ok=True)
    world = join(args.device)
    try:
        quarantine = Quarantine(recipe.folder / "quarantine.jsonl", fresh=True)
        corpus = instructed(read(recipe.data.sources, quarantine), recipe.data)
        target = random_target(args.target, args.dtype, args.device, args.tiny)
        tracker = Tracker(recipe.folder, "bench", {}, True, True, None, [])
        state = State("head", 1, None, None, {})
        session = Session(recipe, world, Stopper(), tracker, state, target, corpus, Prepared(), quarantine)
        session.prepared = regenerate.prepare(recipe, corpus, target, world, session.stopper, tracker, quarantine)
        train_head(session)
        tracker.close()
    finally:
        dist.destroy_process_group()
    optim = recipe.optim
    batch = {"micro_batch": optim.micro_batch, "accumulate": optim.accumulate, "head": recipe.head.kind}
    return measured(recipe.folder) | batch | {"engine": "deepspeed" if INSTALLED else "plain torch"}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        InputError: it is wrong.
    """
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("recipe", type=Path, help="YAML file, as in recipes/")
    add("--target", choices=tuple(NAMES), default=next(iter(NAMES)), help="whose shape (default %(default)s)")
    add("--json", type=Path, metavar="OUT", help="write the figures there")
    add("--dtype", default="bfloat16", help="of the target (default %(default)s)")
    add("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")
    add("--steps", type=int, default=12, help="optimizer steps (default %(default)s)")
    add("--set", nargs="*", default=[], metavar="key=value", help="recipe keys to change")
    add("--tiny", action="store_true", help="the same on layers of 64: whether it runs, not how fast")
    args = parser.parse_args(argv)
    if args.steps <= SETTLING:
        raise InputError(f"--steps must be above {SETTLING}, which do not count, got {args.steps}")
    args.device = find_device(args.device)
    args.threads = torch.get_num_threads()
    return args


@command("bench_gpu")
def main(argv: Sequence[str] | None = None) -> None:
    """Trains, measures and prints."""
    args = arguments(argv)
    with tempfile.TemporaryDirectory() as folder:
        figures = train(args, Path(folder))
    figures["settings"] = environment(args) | {"recipe": args.recipe.name, "tiny": args.tiny, "steps": args.steps}
    publish(figures, args.json)


if __name__ == "__main__":
    sys.exit(main())
