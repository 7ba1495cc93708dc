"""Measures how much each answer token of a recipe's training data owes to the image, and stores it for the loss.

    python scripts/measure_dependence.py recipes/eagle_tiny.yaml --out runs/dependence
    deepspeed --num_gpus 8 scripts/measure_dependence.py recipes/eagle_llava7b.yaml --out runs/dependence_llava7b
    deepspeed train/distill.py recipes/eagle_llava7b.yaml data.dependence=runs/dependence_llava7b loss.dependence=1

The target reads every answered conversation twice: with its image, and with image features replaced by their mean over
the training images (--counterfactual mean), with the image blurred (blur), or with image positions hidden from the
answers (knockout). Stored per answer token are KL and
Jensen-Shannon divergence of its two distributions and whether their likeliest tokens differ: 5 bytes. Without
data.dependence the first is measured anew in every training step, at the price of a second pass of the target.

Interrupted, the same command goes on: finished shards are kept, whatever the number of processes.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
# As in train/distill.py: no more threads than cores, over all processes.
os.environ.setdefault(
    "OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_SIZE", "1"))))
)

from mmspec.arguments import Parser, add_recipe, at_least, command  # noqa: E402
from mmspec.recipe import load  # noqa: E402
from mmspec.types import COUNTERFACTUALS  # noqa: E402
from train.distill import leave, train  # noqa: E402


@command("measure_dependence")
def main() -> int:
    """The command; returns the exit code."""
    arguments = _parse()
    recipe = load(arguments.recipe, arguments.overrides)
    recipe.data.features = ""
    from train.labels import Store, distribution, write_store
    from train.session import Session

    def write(session: Session) -> None:
        manifest = write_store(session, arguments.out, arguments.counterfactual, arguments.batch)
        if session.world.first:
            rows = distribution(session, Store(arguments.out, manifest))
            session.tracker.say(f"{arguments.out}: KL in nats between with and without the image\n{_table(rows)}")

    return train(recipe, instead=write)


def _table(rows: list[dict[str, object]]) -> str:
    names = list(rows[0])
    cells = [names] + [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(line[k]) for line in cells) for k in range(len(names))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)


def _parse() -> argparse.Namespace:
    parser = Parser(prog="scripts/measure_dependence.py", description=__doc__)
    add = parser.add_argument
    add_recipe(parser)
    add("--out", required=True, type=Path, metavar="DIR", help="the folder to write")
    add("--counterfactual", choices=COUNTERFACTUALS, default="mean", help="what stands for the image (default: mean)")
    add("--batch", type=int, default=8, metavar="N", help="conversations in one pass of the target (default: 8)")
    add("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    at_least(arguments, batch=1)
    return arguments


if __name__ == "__main__":
    leave(main())
