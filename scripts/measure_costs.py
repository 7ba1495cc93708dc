"""Measures what drafting and verifying cost on this machine, for a head or a training-free method, and keeps the table.

    python scripts/measure_costs.py --ckpt runs/eagle_tiny --max-batch 16
    python scripts/measure_costs.py --method sam --out runs/costs/sam --max-batch 8

The table is one JSON file named by hardware, threads, dtype and torch version, beside the head, where policies find it,
or in --out (`--costs` of eval.policies). One that covers the batch, depth and nodes asked for is kept, unless --again.
Measure on an idle machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from eval.mmspec import open_target
from eval.options import add_target
from eval.tune_tree import parse_tree
from mmspec import checkpoint as checkpoints
from mmspec.api import find_device, make_drafter
from mmspec.arguments import Parser, at_least, command
from mmspec.costs import CostTable, load_or_measure, table_path
from mmspec.methods import make_method, method_names
from mmspec.types import InputError

PROGRAM = "measure_costs"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog=f"scripts/{PROGRAM}.py", description=__doc__)
    add = parser.add_argument
    add("--ckpt", metavar="DIR", help="run folder of a head, or")
    add("--method", choices=method_names(), help="a training-free method")
    add("--offer", metavar="D,W,N", help="the largest draft (default: the checkpoint's tree.json, a method's own)")
    add("--max-batch", type=int, default=1, metavar="N", help="batch sizes 1, 2, 4, .. up to this (default: 1)")
    add_target(parser)
    add("--out", metavar="DIR", help="folder of the table (default: CKPT/costs; needed for a method)")
    add("--again", action="store_true", help="measure anew")
    return parser


def run(args: argparse.Namespace) -> tuple[Path, CostTable]:
    """Measure unless it is there; returns where the table is, and the table.

    Raises:
        InputError: the input is wrong.
    """
    if bool(args.ckpt) == bool(args.method):
        raise InputError("give --ckpt DIR or --method NAME")
    if args.method and not args.out:
        raise InputError("--method needs --out: there is no folder of its own to keep the table in")
    at_least(args, max_batch=1)
    device = find_device(args.device)
    if args.ckpt:
        loaded = checkpoints.load(args.ckpt, args.target, args.dtype)
        tree = parse_tree(args.offer) if args.offer else loaded.tree
        target = open_target([loaded], args.target, args.dtype, device)
        drafter = make_drafter(replace(loaded, tree=tree), target)
        depth, budget = tree.depth, tree.budget
        folder, key = Path(args.out) if args.out else loaded.folder / "costs", f"w{tree.width}"
    else:
        target = open_target([], args.target, args.dtype, device)
        drafter, plan = make_method(args.method, target)
        depth, budget = plan.max_depth, plan.max_budget
        if args.offer:
            tree = parse_tree(args.offer)
            depth, budget = max(depth, tree.depth), max(budget, tree.budget)
        folder, key = Path(args.out), ""
    path = table_path(folder, target, key)
    if args.again:
        path.unlink(missing_ok=True)
    return path, load_or_measure(folder, target, drafter, args.max_batch, depth, budget, key)


@command(PROGRAM)
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = build_parser().parse_args(argv)
    path, table = run(args)
    for batch, row in table.verify_s.items():
        verify = ", ".join(f"{nodes} {seconds * 1e3:.2f}" for nodes, seconds in row.items())
        draft = ", ".join(f"{depth} {seconds * 1e3:.2f}" for depth, seconds in table.draft_s[batch].items())
        print(f"batch {batch}: ms of a round by nodes: {verify}; of a draft by levels: {draft}")
    print(path)


if __name__ == "__main__":
    sys.exit(main())
