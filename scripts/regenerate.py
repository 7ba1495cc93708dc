"""Answers a recipe's training questions with its target, ahead of train/distill.py, which then finds them.

    python scripts/regenerate.py recipes/viskip_tiny.yaml --procs 2

The same function does it inside distill.py, so this is only worth its own command when answers are made elsewhere, or
before heads of several kinds share them (data.answers_dir). Interrupted, it goes on where it was.
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

from mmspec.recipe import load  # noqa: E402
from mmspec.types import InputError  # noqa: E402
from train.distill import Parser, refuse, train  # noqa: E402
from train.world import free_port  # noqa: E402


def main() -> int:
    """The command; returns the exit code."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        arguments = _parse()
        recipe = load(arguments.recipe, arguments.overrides)
        if arguments.procs > 1 and "RANK" not in os.environ:
            _relaunch(arguments)
        return train(recipe, instead=lambda session: None)
    except InputError as error:
        return refuse("regenerate", str(error), rank)


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
    parser = Parser(
        prog="scripts/regenerate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="YAML file, as in recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    parser.add_argument("--procs", type=int, default=1, help="processes that share the work (default 1)")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    sys.exit(main())
