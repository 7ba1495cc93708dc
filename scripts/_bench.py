"""What the benchmarks of this folder share: texts, the clock, interleaved repeats, and how figures are written."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mmspec import checkpoint as checkpoints
from mmspec.api import find_device
from mmspec.arguments import at_least
from mmspec.synth import SPLITS, sample


def conversation(i: int) -> list[dict[str, Any]]:
    """All turns of a synthetic conversation as text, without its image; the last ones of the test split come first."""
    one = sample("test", SPLITS["test"] - 1 - i)
    talk = []
    for question, answer in zip(one.turns, one.answers):
        talk.append({"role": "user", "content": [{"type": "text", "text": question}]})
        talk.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return talk


def synchronise(device: torch.device) -> None:
    """Wait for what a GPU still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def interleaved(
    works: Sequence[Callable[[], float]], repeats: int, after: Callable[[], Any] = lambda: None
) -> list[list[float]]:
    """Seconds of each work in each repeat, after one that does not count; the order is reversed from one to the next.

    Args:
        works: each returns its seconds.
        repeats: how many count.
        after: called after each of them.
    """
    seconds: list[list[float]] = [[] for _ in works]
    for work in works:
        work()
    settle()
    for repeat in range(repeats):
        order = range(len(works)) if repeat % 2 == 0 else reversed(range(len(works)))
        for i in order:
            seconds[i].append(works[i]())
        after()
    return seconds


def settle() -> None:
    """Keep the garbage collector from what was made while loading: a full pass over it takes longer than an answer."""
    gc.collect()
    gc.freeze()


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of the ratios of each repeat."""
    return statistics.median(a / b for a, b in zip(above, below))


def add_common(parser: argparse.ArgumentParser) -> None:
    """The options of every benchmark."""
    add = parser.add_argument
    add("--json", type=Path, metavar="OUT", help="write the figures there")
    add("--target", default="tiny_llava", help="a target with synthetic prompts (default %(default)s)")
    add("--dtype", default="float32", help="of target and head (default %(default)s)")
    add("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")
    add("--threads", type=int, default=1, help="of torch on a CPU: small targets lose by more (default %(default)s)")


def check(args: argparse.Namespace, *positive: str) -> None:
    """Resolves the device.

    Args:
        positive: options beside `threads` that must be at least 1.

    Raises:
        InputError: one is not, or the device is not there.
    """
    at_least(args, **dict.fromkeys((*positive, "threads"), 1))
    args.device = find_device(args.device)


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on beside the options of one benchmark."""
    device = args.device if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    return {
        "target": args.target,
        "dtype": args.dtype,
        "device": f"{device} ({platform.machine()}, {args.threads} threads)",
        "commit": checkpoints.git_commit(),
        "torch": torch.__version__,
    }


def publish(figures: Mapping[str, Any], path: Path | None) -> None:
    """Prints figures, and writes them where a path is given."""
    for name, value in figures.items():
        print(f"{name:28} {value:.3f}" if isinstance(value, float) else f"{name}: {json.dumps(value, indent=1)}")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.write_json(path, figures)
