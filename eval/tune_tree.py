"""Finds what pays best on this machine, by speedup on held-out data: a head's tree, or a method's settings.

    python -m eval.tune_tree --ckpt runs/eagle_tiny --out runs/eagle_tiny/tuned_tree.json
    python -m eval.tune_tree --ckpt runs/viskip_tiny --policy viskip --out runs/tuned.json   # with its controller
    python -m eval.tune_tree --ckpt runs/eagle_tiny --static runs/fitted.json --grid 6 10 25 --out runs/static.json
    python -m eval.tune_tree --method pld --grid "{num_pred: 4}" "{num_pred: 10, min_ngram: 2}" --out runs/pld.json

Tried are trees (depth, width and nodes), with --static the first so many nodes of a fitted one (scripts/fit_tree.py),
or settings of a method without training (recipes/methods/training_free.yaml has all). All of them decode the same
prompts interleaved with plain decoding, as in `eval.mmspec`, so a slow minute falls on all alike. Tune on synth:val,
report on synth:test (`python -m eval.mmspec --tree DEPTH WIDTH NODES`, `--method-settings FILE`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from eval.bench import N_WARMUP, Bench, Method, Result
from eval.mmspec import open_target, output_folder
from eval.options import add_records, add_target
from eval.summary import Contention, clean, figures, hardware, unreliable
from eval.tasks import (
    PLAIN,
    Dialogues,
    check_left_out,
    data_folder,
    data_name,
    limit_pixels,
    load_records,
    system_text,
)
from mmspec import checkpoint as checkpoints
from mmspec import metrics
from mmspec.api import METHOD_POLICIES, TRAINED, drafter_and_policy, find_device, make_drafter, method_and_policy
from mmspec.arguments import Parser, at_least, command
from mmspec.checkpoint import Checkpoint, DraftTree
from mmspec.drafters.null import NullDrafter
from mmspec.methods import method_names, resolved
from mmspec.policy import FixedPolicy, SkipPolicy
from mmspec.records import Quarantine
from mmspec.sampling import GreedySampler
from mmspec.static_tree import StaticTree
from mmspec.types import Drafter, InputError, Target

PROGRAM = "eval.tune_tree"
GRID = ("3,1,3", "5,1,5", "7,1,7", "10,1,10", "13,1,13", "4,2,6", "5,2,7", "7,2,10", "10,2,14", "7,4,16")
STATIC_GRID = ("6", "10", "16", "25")
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "pld": [{}, {"num_pred": 5}, {"max_ngram": 4, "min_ngram": 2}, {"max_ngram": 5}],
    "sam": [{}, {"alpha": 1.0}, {"min_match": 2}, {"n_predicts": 12}, {"prefer": "recent"}],
    "lookahead": [{}, {"decoding_length": 8}, {"decoding_length": 32}, {"max_query": 4}, {"branch_length": 6}],
    "recycling": [{}, {"seed_prompt": False}],
    "lade": [{}, {"ngram": 3}, {"window": 4, "guesses": 4}],
}
"""What is tried of a method without `--grid`; nothing that makes drafts depend on earlier requests."""
FIGURES = ("mat", "speedup", "speedup_lo", "speedup_hi", "exact_match")


def parse_tree(text: str) -> DraftTree:
    """`DEPTH,WIDTH,NODES` as a tree. Raises InputError."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise InputError(f"{text!r} is no tree; write DEPTH,WIDTH,NODES, as in 5,2,7")
    return DraftTree(*map(int, parts))


@dataclass(frozen=True)
class Candidate:
    """What is tried.

    Args:
        facts: what is written of it, and has to be said to decode with it.
        method: named as it is printed.
    """

    facts: dict[str, Any]
    method: Method


def of_trees(args: argparse.Namespace, target: Target, loaded: Checkpoint) -> list[Candidate]:
    """The head with each tree of the grid; steered by nothing, trees of one width share a drafter."""
    by_width: dict[int, Drafter] = {}
    found = []
    for tree in dict.fromkeys(parse_tree(text) for text in args.grid or GRID):
        shaped = replace(loaded, tree=tree)
        if args.policy != "fixed":
            pair = drafter_and_policy(shaped, target, args.policy, args.batch_size)
        else:
            if tree.width not in by_width:
                by_width[tree.width] = make_drafter(shaped, target)
            pair = by_width[tree.width], FixedPolicy(tree.depth, tree.budget)
        found.append(Candidate(asdict(tree), Method(name(tree), *pair)))
    return found


def of_static(args: argparse.Namespace, target: Target, loaded: Checkpoint) -> list[Candidate]:
    """The head with the first so many nodes of a static tree. Raises InputError for a number that it cannot be."""
    whole = StaticTree.load(args.static)
    found = []
    for text in dict.fromkeys(args.grid or STATIC_GRID):
        if not (text.isdigit() and int(text)):
            raise InputError(f"--grid {text}: of a static tree give numbers of nodes, as in 6 10 25")
        tree = whole.cut(int(text), whole.depth)
        policy = FixedPolicy(tree.depth, tree.budget)
        method = Method(f"{tree.budget} nodes", make_drafter(loaded, target, shape=tree), policy)
        found.append(Candidate({"nodes": tree.budget}, method))
    return list({one.method.name: one for one in found}.values())


def of_settings(args: argparse.Namespace, target: Target) -> list[Candidate]:
    """A method without training with each of the settings; costs measured for larger drafts serve for smaller ones."""
    found = []
    costs = Path(args.out).parent / f"{args.method}_costs"
    for some in settings_of(args):
        label = ", ".join(f"{key}={value}" for key, value in some.items()) or "defaults"
        pair = method_and_policy(
            args.method, target, some, policy=args.method_budget, max_batch=args.batch_size, costs=costs
        )
        found.append(Candidate({"settings": some}, Method(label, *pair)))
    return found


def settings_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What is tried of a method, each checked. Raises InputError."""
    found: list[dict[str, Any]] = SETTINGS.get(args.method, [{}])
    if args.grid:
        found = []
        for text in args.grid:
            try:
                value = yaml.safe_load(text)
            except yaml.YAMLError:
                value = None
            if not isinstance(value, dict):
                raise InputError(f"--grid {text!r} is no mapping of settings; write one as in '{{num_pred: 4}}'")
            found += [value] if value not in found else []
    for some in found:
        resolved(args.method, some)
    return found


def name(tree: DraftTree) -> str:
    """How a tree is written: DEPTH,WIDTH,NODES."""
    return f"{tree.depth},{tree.width},{tree.budget}"


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Decode with all candidates and write the best; returns what was written.

    Raises:
        InputError: the input is wrong.
    """
    if args.method:
        settings_of(args)  # what is wrong is said before a large target is loaded
    loaded = [checkpoints.load(args.ckpt, args.target, args.dtype)] if args.ckpt else []
    quarantine = Quarantine(None)
    records = load_records(data_folder(args.data), args.limit, quarantine, args.max_bad_share)
    target = open_target(loaded, args.target, args.dtype, args.device)
    limit_pixels(target, None)
    if loaded:
        candidates = (of_static if args.static else of_trees)(args, target, loaded[0])
    else:
        candidates = of_settings(args, target)
    methods = [Method(PLAIN, NullDrafter(), SkipPolicy()), *(one.method for one in candidates)]
    dialogues = Dialogues(target, records, system_text(target), args.max_new_tokens, quarantine)
    bench = Bench(target, methods, GreedySampler(), args.batch_size, metrics.TIE_GAPS[args.dtype])
    results: list[Result] = []
    contention = Contention()
    bench.warm_up(dialogues.warmup(N_WARMUP))
    bench.run(dialogues, results.extend)
    others = contention.cores()
    check_left_out(quarantine, args.max_bad_share)
    plain = [result for result in results if result.method == PLAIN]
    rows = []
    for one in candidates:
        mine = [result for result in results if result.method == one.method.name]
        found = figures(mine, plain, args.batch_size, args.seed)
        rows.append({**one.facts, **{key: found[key] for key in FIGURES}})
        said = f"{one.method.name:>8}  MAT {found['mat']:.2f}  speedup {found['speedup']:.2f}x"
        console.print(said, highlight=False, markup=False)
    best = max(rows, key=lambda row: row["speedup"])
    written = {
        "best": {key: best[key] for key in candidates[0].facts},
        "tried": rows,
        "settings": {
            "data": data_name(args.data), "limit": args.limit,
            "max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size, "dtype": args.dtype,
            "threads": torch.get_num_threads(),
            "steered_by": args.method_budget if args.method else "fixed" if args.static else args.policy,
        },
        "contention": {"other_cores": others, "unreliable": unreliable(others, torch.get_num_threads())},
        "hardware": hardware(target.device),
    }  # fmt: skip
    checkpoints.write_json(Path(args.out), clean(written))
    return written


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__)
    add = parser.add_argument
    add("--ckpt", metavar="DIR", help="run folder of train/distill.py")
    add("--method", choices=method_names(), help="instead: a method without training")
    add("--out", required=True, metavar="FILE", help="JSON file to write")
    add(
        "--grid", nargs="+", metavar="D,W,N",
        help=f"trees to try (default: {' '.join(GRID)}); with --static numbers of nodes (default: "
        f"{' '.join(STATIC_GRID)}), with --method settings (default: some around its own)",
    )  # fmt: skip
    add("--policy", choices=("fixed", *TRAINED), default="fixed", help="what steers the head (default: %(default)s)")
    add("--static", metavar="FILE", help="try the head with the first nodes of this static tree")
    add("--method-budget", choices=METHOD_POLICIES, default="adaptive", help="as of eval.mmspec (default: adaptive)")
    add_records(parser, "synth:val", 60)
    add_target(parser)
    add("--batch-size", type=int, default=1, metavar="N", help="requests decoded together (default: 1)")
    add("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    return parser


@command(PROGRAM)
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = build_parser().parse_args(argv)
    console = Console()
    at_least(args, limit=1, max_new_tokens=1, batch_size=1)
    if bool(args.ckpt) == bool(args.method):
        raise InputError("give --ckpt DIR or --method NAME")
    if args.static and (args.method or args.policy != "fixed"):
        raise InputError("--static goes with --ckpt and no --policy: its tree is the same every round")
    output_folder(Path(args.out).parent)
    args.device = find_device(args.device)
    found = run(args, console)
    console.print(f"best: {found['best']}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
