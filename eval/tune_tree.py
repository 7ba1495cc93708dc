"""Finds the draft tree that pays best for a head on this machine: depth, width and nodes, by speedup on held-out data.

    python -m eval.tune_tree --ckpt runs/eagle_tiny --out runs/eagle_tiny/tuned_tree.json

All trees decode the same prompts interleaved with plain decoding, as in `eval.mmspec`, so a slow minute falls on all of
them alike. Tune on synth:val, report on synth:test (`python -m eval.mmspec --tree DEPTH WIDTH NODES`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from eval.bench import N_WARMUP, Bench, Method, Result
from eval.mmspec import open_target
from eval.options import DTYPES
from eval.summary import Contention, clean, figures, hardware, unreliable
from eval.tasks import MMSPEC_SYSTEM, PLAIN, Dialogues, data_folder, limit_pixels, load_records
from mmspec import checkpoint as checkpoints
from mmspec import metrics
from mmspec.api import find_device, make_drafter
from mmspec.arguments import OneLineParser, at_least
from mmspec.assets import EMBEDDED
from mmspec.checkpoint import Checkpoint, DraftTree
from mmspec.drafters.null import NullDrafter
from mmspec.policy import FixedPolicy, SkipPolicy
from mmspec.records import Quarantine
from mmspec.sampling import GreedySampler
from mmspec.types import Drafter, InputError, Target

PROGRAM = "eval.tune_tree"
GRID = ("3,1,3", "5,1,5", "7,1,7", "10,1,10", "13,1,13", "4,2,6", "5,2,7", "7,2,10", "10,2,14", "7,4,16")
FIGURES = ("mat", "speedup", "speedup_lo", "speedup_hi", "exact_match")


def parse_tree(text: str) -> DraftTree:
    """`DEPTH,WIDTH,NODES` as a tree. Raises InputError."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise InputError(f"{text!r} is no tree; write DEPTH,WIDTH,NODES, as in 5,2,7")
    return DraftTree(*map(int, parts))


def make_methods(target: Target, loaded: Checkpoint, trees: Sequence[DraftTree]) -> list[Method]:
    """Plain decoding, and the head with each tree; trees of one width share a drafter."""
    by_width: dict[int, Drafter] = {}
    methods = [Method(PLAIN, NullDrafter(), SkipPolicy())]
    for tree in trees:
        if tree.width not in by_width:
            by_width[tree.width] = make_drafter(replace(loaded, tree=tree), target)
        methods.append(Method(name(tree), by_width[tree.width], FixedPolicy(tree.depth, tree.budget)))
    return methods


def name(tree: DraftTree) -> str:
    """How a tree is written: DEPTH,WIDTH,NODES."""
    return f"{tree.depth},{tree.width},{tree.budget}"


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Decode with all trees and write the best; returns what was written.

    Raises:
        InputError: the input is wrong.
    """
    trees = list(dict.fromkeys(parse_tree(text) for text in args.grid))
    loaded = checkpoints.load(args.ckpt, args.target, args.dtype)
    quarantine = Quarantine(None)
    records = load_records(data_folder(args.data), args.limit, quarantine, args.max_bad_share)
    target = open_target([loaded], args.target, args.dtype, args.device)
    limit_pixels(target, None)
    methods = make_methods(target, loaded, trees)
    system = "" if target.name == EMBEDDED else MMSPEC_SYSTEM
    dialogues = Dialogues(target, records, system, args.max_new_tokens, quarantine)
    bench = Bench(target, methods, GreedySampler(), args.batch_size, metrics.TIE_GAPS[args.dtype])
    results: list[Result] = []
    contention = Contention()
    bench.warm_up(dialogues.warmup(N_WARMUP))
    bench.run(dialogues, results.extend)
    others = contention.cores()
    plain = [result for result in results if result.method == PLAIN]
    rows = []
    for tree in trees:
        mine = [result for result in results if result.method == name(tree)]
        found = figures(mine, plain, args.batch_size, args.seed)
        rows.append({**asdict(tree), **{key: found[key] for key in FIGURES}})
        console.print(f"{name(tree):>8}  MAT {found['mat']:.2f}  speedup {found['speedup']:.2f}x", highlight=False)
    best = max(rows, key=lambda row: row["speedup"])
    written = {
        "best": {key: best[key] for key in ("depth", "width", "budget")},
        "trees": rows,
        "settings": {
            "data": args.data if args.data.startswith("synth:") else Path(args.data).name, "limit": args.limit,
            "max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size, "dtype": args.dtype,
            "threads": torch.get_num_threads(),
        },
        "contention": {"other_cores": others, "unreliable": unreliable(others, torch.get_num_threads())},
        "hardware": hardware(target.device),
    }  # fmt: skip
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.write_json(out, clean(written))
    return written


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = OneLineParser(
        prog=f"python -m {PROGRAM}", description=f"{summary}\n\n{rest}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--ckpt", required=True, metavar="DIR", help="run folder of train/distill.py")
    add("--out", required=True, metavar="FILE", help="JSON file to write")
    add("--grid", nargs="+", default=list(GRID), metavar="D,W,N", help=f"trees to try (default: {' '.join(GRID)})")
    add("--data", default="synth:val", metavar="DATA", help="as of eval.mmspec (default: %(default)s)")
    add("--limit", type=int, default=60, metavar="N", help="records, taken in turn from the topics (default: 60)")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="per request (default: 256)")
    add("--batch-size", type=int, default=1, metavar="N", help="requests decoded together (default: 1)")
    add("--target", metavar="NAME", help="to decode with (default: the checkpoint's)")
    add("--dtype", choices=DTYPES, default="float32", help="of target and head (default: float32)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda where there is one, else cpu)")
    add("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    add("--max-bad-share", type=float, default=0.05, metavar="S", help="as of eval.mmspec (default: 0.05)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    args = build_parser().parse_args(argv)
    console = Console()
    try:
        at_least(args, limit=1, max_new_tokens=1, batch_size=1)
        args.device = find_device(args.device)
        found = run(args, console)
    except InputError as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    console.print(f"best: {found['best']}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
