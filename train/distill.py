"""Trains a draft head and its ViSkip controller from a frozen vision-language model.

    deepspeed --num_gpus 2 train/distill.py recipes/viskip_tiny.yaml optim.lr=1e-3 run.name=trial
    python train/distill.py recipes/viskip_tiny.yaml --dry-run

Phases: answers (the target answers the training questions itself) -> head -> rollout (the real decoding loop on
training prompts) -> controller. Everything is in runs/<run.name>/. Ctrl-C or SIGTERM saves and ends; the same command
with run.resume=true goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if __name__ == "__main__":
    # The launcher puts train/ itself first on the path, where a file could shadow a library; the root belongs there.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    # Before torch is loaded, for threads of all kinds: processes that share cores slow each other down many times over
    # when each runs as many threads as there are cores.
    cores, processes = len(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_SIZE", "1"))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))

from mmspec.arguments import Parser, add_recipe, command, default_signals
from mmspec.recipe import Recipe, Source, load
from mmspec.types import InputError

if TYPE_CHECKING:
    from train.session import Session

EPILOG = """\
overrides: any recipe key, later ones win
  data.train=PATH            train on all of this file, folder or hub:org/name (short for one entry of data.sources)
  data.features=DIR          the target's states from scripts/extract_features.py instead of computing them
  head.init_from=DIR         start from the head of this run folder
  head.lora.rank=N           with it, train low-rank adapters alone; what is saved is merged
  run.name=NAME              write to runs/NAME
  run.max_steps=N            optimizer steps of the head
  run.resume=true            go on where runs/NAME stopped
  optim.micro_batch=N        sequences per process and pass; global batch = processes x micro_batch x accumulate
  deepspeed.zero_stage=0..3  what the processes share; the loss curve is the same
examples:
  deepspeed --num_gpus 2 train/distill.py recipes/viskip_tiny.yaml
  python scripts/regenerate.py recipes/viskip_tiny.yaml      # the answers alone, beforehand
  python train/distill.py recipes/viskip_llava7b.yaml --dry-run
  python scripts/plan.py recipes/viskip_llava7b.yaml --gpus 4 --gpu-gb 40   # which settings fit
exit codes: 0 done, 2 wrong input, 130 / 143 stopped by Ctrl-C / SIGTERM (resumable)
"""


@command("distill")
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    recipe = load(arguments.recipe, arguments.overrides)
    if arguments.dry_run:
        return _dry_run(recipe)
    return train(recipe)


def train(recipe: Recipe, instead: Callable[[Session], None] | None = None, answer: bool = True) -> int:
    """Answers the training questions and trains on them; returns the exit code.

    Args:
        recipe: checked settings.
        instead: what to do with the answered questions instead of training.
        answer: False where that needs no answers.

    Raises:
        InputError: the input is wrong.
    """
    from train import decontaminate
    from train.corpus import check_sources
    from train.drafting import check_drafting
    from train.features import read_manifest
    from train.stopping import Stopped, Stopper
    from train.tracking import check_trackers

    check_sources([*recipe.data.sources, Source(recipe.run.eval_data)])
    if instead is None:
        check_trackers(recipe.run.trackers)
    if instead is None and recipe.head.init_from is not None:
        _check_base(recipe.head.init_from)
    check_drafting(recipe.data)
    if recipe.data.decontaminated:
        decontaminate.check(Path(recipe.data.decontaminated))
    if recipe.data.features:
        read_manifest(Path(recipe.data.features))
    default_signals()
    stopper = Stopper()

    from train.run import run

    try:
        return run(recipe, stopper, instead, answer)
    except Stopped as stop:
        return stop.exit_code


def _check_base(folder: str) -> None:
    """Whether `head.init_from` is a complete run folder."""
    from mmspec import checkpoint

    try:
        checkpoint.load(folder)
    except InputError as error:
        raise InputError(f"head.init_from: {error}") from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """For a command's last part, which writes a file: what goes wrong is wrong input.

    Raises:
        InputError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or path} cannot be written ({error.strerror or error})") from error


def _dry_run(recipe: Recipe) -> int:
    if os.environ.get("RANK", "0") == "0":
        from train.estimate import report

        print(report(recipe, int(os.environ.get("WORLD_SIZE", "1"))))
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="train/distill.py", description=__doc__, epilog=EPILOG)
    add_recipe(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print settings, sizes, memory, disk and hours; train nothing"
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(argv)


def leave(code: int) -> NoReturn:
    """Ends the process of a command."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code > 128 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # The launcher ends helper processes of libraries along with us; their exit hooks would only wait and complain.
        # After a finished run of several processes, threads that a ZeRO-3 engine leaves behind aborted the shutdown of
        # the interpreter now and then. Everything is written and closed by now.
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
