"""Answers a recipe's training questions with its target, ahead of train/distill.py, which then finds them.

    python scripts/regenerate.py recipes/viskip_tiny.yaml --procs 2
    python scripts/regenerate.py recipes/eagle3_tiny.yaml --ckpt runs/viskip_tiny              # a head drafts: sooner
    python scripts/regenerate.py recipes/eagle3_tiny.yaml --ckpt runs/viskip_tiny --compare 96 # by how much

The same function does it inside distill.py, so this is only worth its own command when answers are made elsewhere, or
before heads of several kinds share them (data.answers_dir). Interrupted, even by a kill, it goes on where it was, with
any number of processes, to the same file.

what is written, in data.answers_dir or <run folder>/answers, in a folder named after data, target and settings
  answers.jsonl   a line for every sample, in order: its answers, or why it has none
  manifest.json   what they were made from and by whom, and how many were dropped for which reason
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
THREADS = os.environ.get("OMP_NUM_THREADS")
"""As the user set it; what follows sets it for a single process, which the launched ones must not inherit."""

# As in train/distill.py: no more threads than cores, over all processes.
os.environ.setdefault(
    "OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_SIZE", "1"))))
)

from mmspec.arguments import Parser, add_recipe, at_least, command  # noqa: E402
from mmspec.recipe import load  # noqa: E402
from mmspec.types import InputError  # noqa: E402
from train.distill import leave, train  # noqa: E402
from train.world import free_port  # noqa: E402


@command("regenerate")
def main() -> int:
    """The command; returns the exit code."""
    arguments = _parse()
    recipe = load(arguments.recipe, arguments.overrides)
    if not arguments.compare:
        if arguments.procs > 1 and "RANK" not in os.environ:
            _relaunch(arguments)
        return train(recipe, instead=lambda session: None)
    from train.session import Session
    from train.sooner import check, compare

    check(recipe.data, int(os.environ.get("WORLD_SIZE", "1")))

    def timed(session: Session) -> None:
        compare(session, arguments.compare)

    return train(recipe, instead=timed, answer=False)


def _relaunch(arguments: argparse.Namespace) -> None:
    """Becomes the launcher of several processes of this script; does not return."""
    script = [str(Path(__file__).resolve()), arguments.recipe, *arguments.overrides]
    if THREADS is None:
        os.environ.pop("OMP_NUM_THREADS", None)
    # A free port: the launcher's fixed one may be taken by another run on this machine.
    port = ["--master_port", str(free_port())]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(arguments.procs), *port]
    os.execv(sys.executable, [*launcher, *script])


def _parse() -> argparse.Namespace:
    parser = Parser(prog="scripts/regenerate.py", description=__doc__)
    add = parser.add_argument
    add_recipe(parser)
    add("--procs", type=int, default=1, help="processes that share the work (default 1)")
    add("--ckpt", metavar="DIR", help="run folder whose head drafts the answers: short for data.answer_head=DIR")
    add("--method", metavar="NAME", help="method without training that drafts them: short for data.answer_method=NAME")
    add(
        "--compare", type=int, default=0, metavar="N", help="answer N samples with and without a drafter, and time both"
    )
    add("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    at_least(arguments, compare=0, procs=1)
    if arguments.compare and arguments.procs > 1:
        raise InputError(f"--compare times one process, not {arguments.procs}; leave --procs out")
    for key, value in (("answer_head", arguments.ckpt), ("answer_method", arguments.method)):
        arguments.overrides += [f"data.{key}={value}"] if value else []
    return arguments


if __name__ == "__main__":
    leave(main())
