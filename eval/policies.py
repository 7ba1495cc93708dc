r"""Scores all policies of one drafter at one batch size and temperature, or tunes them (`--tune`).

    python -m eval.policies --ckpt runs/vispec_tiny --tune --out tuned.json
    python -m eval.policies --ckpt runs/vispec_tiny --controller runs/viskip_only_vispec_tiny --tuned tuned.json \
        --data synth:testmini --out scores.json

P0 the fixed tree of the checkpoint or method; P1 the best fixed one; P2 the attention threshold; P3 the mean of late
acceptance; P4 the draft's confidence; marginal, the marginal rule; P5 a controller of scalars alone, P6 one without
visual attention, P7 the whole one, P8 that with early exit and pruning; P9 the oracle in hindsight, from one more,
recorded decoding with all that is offered. All decode the same prompts interleaved with plain decoding, so a slow
minute falls on all of them alike. Policies that are known to make the same plans are one decoding (`same` in the file):
P0 and P1 where P0's tree was found the best one, P5 to P7 where none of their controllers is worth asking.

Scoring decodes plainly twice, before and after all policies of a group: a speedup is over the mean of both. What the
second is to the first (`again`) says how far the machine's times can be trusted: if its interval is off 1, no further.

Tuning fills its batches with records of all topics. One decoding with all that is offered, of a quarter of the
records, says which trees may be fastest; these are timed on all records. Thresholds are timed on that quarter, and the
best two of each policy on all. Scoring keeps topics apart, so that each has its own seconds: where a topic has fewer
records than the batch has rows, the batch is as small.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from eval.bench import Method
from eval.mmspec import output_folder
from eval.options import add_records, add_target
from eval.policy_runs import (
    AGAIN,
    BASELINES,
    CONTROLLERS,
    LEARNED,
    ORACLE,
    POLICIES,
    THRESHOLDS,
    Scored,
    Setup,
    Timed,
    prepare,
)
from eval.summary import clean, hardware, unreliable
from eval.tasks import data_name
from mmspec import checkpoint as checkpoints
from mmspec import metrics
from mmspec.api import find_device
from mmspec.arguments import Parser, as_temperature, at_least, command
from mmspec.drafters.null import NullDrafter
from mmspec.hindsight import Recorder, fixed_rate, oracle_rate
from mmspec.methods import method_names
from mmspec.policies import Parts, make_policy
from mmspec.policies._learned import LearnedPolicy
from mmspec.policy import FixedPolicy, SkipPolicy
from mmspec.types import InputError, Policy

PROGRAM = "eval.policies"
RECORD = "record"
FIXED_GRID = ((1, 2), (2, 3), (3, 4), (5, 7), (7, 8), (7, 12), (10, 12), (12, 12), (12, 16))
FEW, LIKELY_TREES, FINALISTS = 4, 3, 2
"""Tuning: the share of the records that looks first are at, trees of the grid and thresholds of a policy that stay."""
FIGURES = ("speedup", "speedup_lo", "speedup_hi", "exact_match", "mat", "skip_rate", "draft_efficiency", "n_requests")


def tune(args: argparse.Namespace, setup: Setup) -> dict[str, Any]:
    """The best settings of P1 to P4, then the best baseline; the fixed trees first, as two of the others use one.

    What is far behind on a share of the records is not timed on all of them: trees by what one recorded decoding says
    of each, thresholds by time.
    """
    few = args.limit and min(args.limit, max(args.limit // FEW, args.batch_size))
    trees = _likely_trees(args, setup, few)
    fixed = [setup.method(name, make_policy("fixed", Parts(*tree))) for name, tree in trees.items()]
    first = _speedups(args, setup, fixed, args.limit)
    tuned: dict[str, Any] = {"P1": trees[max(first, key=first.__getitem__)]}
    candidates: dict[str, tuple[str, float]] = {
        f"{label} {t}": (label, t) for label, (_, thresholds) in THRESHOLDS.items() for t in thresholds
    }

    def methods(names: Sequence[str]) -> list[Method]:
        asked = [(name, *candidates[name]) for name in names]
        return [setup.method(name, setup.policy(label, {**tuned, label: t})) for name, label, t in asked]

    coarse = _speedups(args, setup, methods(list(candidates)), few)
    kept = [
        name
        for label in THRESHOLDS
        for name in sorted((n for n in candidates if candidates[n][0] == label), key=coarse.__getitem__)[-FINALISTS:]
    ]
    others = [setup.method(label, setup.policy(label, tuned)) for label in ("P1", "marginal")]
    last = Scored(args, setup, [*others, *methods(kept)], args.data, args.limit, mixed=True)
    found = {method.name: last.figures(method.name)["speedup"] for method in last.methods}
    best = {label: found[label] for label in ("P1", "marginal")}
    for label in THRESHOLDS:
        name = max((n for n in kept if candidates[n][0] == label), key=found.__getitem__)
        tuned[label], best[label] = candidates[name][1], found[name]
    return {
        "tuned": tuned,
        "best": max(best, key=best.__getitem__),
        "speedups": {**coarse, **first, **found},
        **about(args, last),
    }


def _likely_trees(args: argparse.Namespace, setup: Setup, limit: int | None) -> dict[str, tuple[int, int]]:
    """P0's tree, and those of the grid that decode fastest by the costs, going by one recorded decoding of `limit`
    records with all that is offered (`mmspec.hindsight`)."""
    offer = setup.offer
    grid = [(d, n) for d, n in FIXED_GRID if d <= offer.depth and n <= offer.budget]
    everything = Timed(FixedPolicy(offer.depth, offer.budget))
    record = Method(RECORD, Recorder(setup.make()), everything)
    steps = Scored(args, setup, [record], args.data, limit, mixed=True).recorded()
    if steps:
        grid = sorted(grid, key=lambda tree: -fixed_rate(steps, *tree))[:LIKELY_TREES]
    return {f"{d},{n}": (d, n) for d, n in dict.fromkeys([setup.script, *grid])}


def _speedups(args: argparse.Namespace, setup: Setup, methods: list[Method], limit: int | None) -> dict[str, float]:
    scored = Scored(args, setup, methods, args.data, limit, mixed=True)
    return {method.name: scored.figures(method.name)["speedup"] for method in methods}


def score(args: argparse.Namespace, setup: Setup, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of all policies, their ratios to baselines, and the oracle."""
    tuned, best = chosen["tuned"], chosen["best"]
    labels = list(dict.fromkeys([*args.policies, "P1", best]))
    policies = {
        label: setup.policy(label, tuned) for label in labels if label in BASELINES or label in setup.controllers
    }
    same = {"P0": "P1"} if tuple(tuned["P1"]) == tuple(setup.script) else {}
    same |= _unasked(policies, args)
    methods = [setup.method(label, policy) for label, policy in policies.items() if label not in same]
    if ORACLE in args.policies:
        everything = FixedPolicy(setup.offer.depth, setup.offer.budget)
        methods.append(Method(RECORD, Recorder(setup.make()), Timed(everything)))
    methods.append(Method(AGAIN, NullDrafter(), Timed(SkipPolicy())))  # the last, as plain decoding is the first
    scored = Scored(args, setup, methods, args.data, args.limit)
    rows, against = [], []
    for topic in scored.topics():
        for label in policies:
            mine = scored.figures(same.get(label, label), topic=topic)
            rows.append({"policy": label, "topic": topic, **{key: mine[key] for key in FIGURES}})
            for other in dict.fromkeys((best, "P1", "P2")):
                if label in LEARNED and other in policies:
                    ratio = scored.figures(same.get(label, label), same.get(other, other), topic)
                    against.append({"policy": label, "over": other, "topic": topic, **_spans(ratio)})
        if ORACLE in args.policies:
            rows.append(oracle_row(args, setup, scored, tuned["P1"], topic))
    return {
        "best": best,
        "rows": rows,
        "against": against,
        "same": same,
        "again": _spans(scored.figures(AGAIN)),
        "control": {method.name: scored.control_share(method) for method in methods},
        "calibration": {
            k: metrics.calibration(p.outcomes)
            for k, p in policies.items()
            if isinstance(p, LearnedPolicy) and p.outcomes
        },
        "outcomes": {
            k: [[chances[:1], accepted] for chances, accepted in p.outcomes]
            for k, p in policies.items()
            if isinstance(p, LearnedPolicy) and p.outcomes
        },
        **about(args, scored),
    }


def _spans(row: Mapping[str, Any]) -> dict[str, Any]:
    """A speedup as a ratio with its interval."""
    return {key: row[f"speedup{end}"] for key, end in (("ratio", ""), ("lo", "_lo"), ("hi", "_hi"))}


def _unasked(policies: Mapping[str, Policy], args: argparse.Namespace) -> dict[str, str]:
    """Learned policies that ask no controller and so plan what another one, named beside each, does."""
    first: dict[Any, str] = {}
    same = {}
    for label, policy in policies.items():
        if isinstance(policy, LearnedPolicy):
            plans = policy.unasked(args.batch_size, torch.device(args.device), args.temperature > 0)
            if plans is not None and first.setdefault(plans, label) != label:
                same[label] = first[plans]
    return same


def oracle_row(
    args: argparse.Namespace, setup: Setup, scored: Scored, tree: Sequence[int], topic: str
) -> dict[str, Any]:
    """P9: P1's measured speedup times what the oracle gains over P1 by predicted cost, on the recorded steps."""
    steps = scored.recorded(topic)
    row: dict[str, Any] = {"policy": ORACLE, "topic": topic, **dict.fromkeys(FIGURES)}
    if steps:
        depth, nodes = min(tree[0], setup.offer.depth), min(tree[1], setup.offer.budget)
        gain = oracle_rate(steps) / fixed_rate(steps, depth, nodes)
        row |= {"speedup": scored.figures("P1", topic=topic)["speedup"] * gain, "over_P1": gain}
    return row


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that could change a figure, without this machine's folders."""
    return {
        "drafter": args.method or Path(args.ckpt).name, "batch": args.batch_size, "temperature": args.temperature,
        "data": data_name(args.data), "limit": args.limit, "offer": args.offer, "max_new_tokens": args.max_new_tokens,
        "seed": args.seed, "dtype": args.dtype, "threads": torch.get_num_threads(),
    }  # fmt: skip


def about(args: argparse.Namespace, scored: Scored) -> dict[str, Any]:
    """What else a reader must know."""
    return {
        "settings": settings(args),
        "contention": {
            "other_cores": scored.other_cores, "unreliable": unreliable(scored.other_cores, torch.get_num_threads()),
        },
        "hardware": hardware(torch.device(args.device)),
        "commit": checkpoints.git_commit(),
    }  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__)
    add = parser.add_argument
    add("--ckpt", metavar="DIR", help="run folder of a head, or")
    add("--method", choices=method_names(), help="a training-free method")
    add("--controller", metavar="DIR", help="run folder with its controller, for P7 and P8")
    add("--scalars-controller", metavar="DIR", help="the same with controller.reads=scalars, for P5")
    add("--blind-controller", metavar="DIR", help="the same with controller.n_mass=0 and counterfactual=none, for P6")
    add("--offer", default="12,2,16", metavar="D,W,N", help="the largest draft (default: %(default)s)")
    add("--script", metavar="D,W,N", help="the draft of P0 (default: the checkpoint's tree.json, a method's own)")
    add("--costs", metavar="DIR", help="where the cost table is kept (default: beside the head, or runs/METHOD/costs)")
    add("--tune", action="store_true", help="tune P1 to P4 and name the best baseline, instead of scoring")
    add("--tuned", metavar="FILE", help="what --tune found")
    add(
        "--policies",
        nargs="+",
        choices=(*POLICIES, ORACLE),
        metavar="P",
        help="P0 to P9 and marginal (default: all that a controller was given for)",
    )
    add_records(parser, "synth:val")
    add_target(parser)
    add("--batch-size", type=int, default=1, metavar="N", help="requests decoded together (default: 1)")
    add("--temperature", type=as_temperature, default=0.0, metavar="T", help="0 is greedy (default)")
    add("--seed", type=int, default=0, help="of noise and bootstrap (default: 0)")
    add("--out", required=True, metavar="FILE", help="JSON file to write")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raises InputError."""
    if bool(args.ckpt) == bool(args.method):
        raise InputError("give --ckpt DIR or --method NAME")
    if args.tune == bool(args.tuned):
        raise InputError("give --tune, or --tuned FILE with what it found")
    at_least(args, limit=1, max_new_tokens=1, batch_size=1, seed=0)
    for label in args.policies or ():
        option = CONTROLLERS.get(label)
        if option and not getattr(args, option):
            raise InputError(f"--policies {label} needs --{option.replace('_', '-')} DIR")
    args.policies = args.policies or [*POLICIES, ORACLE]
    output_folder(Path(args.out).parent)
    args.device = find_device(args.device)


def read_tuned(args: argparse.Namespace) -> dict[str, Any]:
    """What `--tune` found.

    Raises:
        InputError: there is none, or it was tuned for something else than what is to be scored.
    """
    wanted = settings(args)
    try:
        found: dict[str, Any] = json.loads(Path(args.tuned).read_text("utf-8"))
        tuned_for = {key: found["settings"][key] for key in ("drafter", "batch", "temperature", "offer", "dtype")}
        found["tuned"]["P1"], found["best"]  # what was scored has the rest as well
    except FileNotFoundError:
        raise InputError(f"--tuned {args.tuned} does not exist; make it with --tune") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"--tuned {args.tuned} is not a file that --tune wrote") from None
    for key, value in tuned_for.items():
        if value != wanted[key]:
            raise InputError(f"--tuned {args.tuned} is for {key} {value}, not {wanted[key]}; tune anew")
    return found


@command(PROGRAM)
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = build_parser().parse_args(argv)
    check_arguments(args)
    chosen = None if args.tune else read_tuned(args)
    setup = prepare(args)
    found = tune(args, setup) if chosen is None else score(args, setup, chosen)
    checkpoints.write_json(Path(args.out), clean(found))


if __name__ == "__main__":
    sys.exit(main())
