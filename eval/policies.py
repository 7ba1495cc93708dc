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
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from eval.bench import N_WARMUP, Bench, Method, Result
from eval.mmspec import open_target
from eval.options import add_records, add_target
from eval.summary import OVERALL, Contention, clean, figures, hardware, unreliable
from eval.tasks import MMSPEC_SYSTEM, PLAIN, Dialogues, data_folder, limit_pixels, load_records
from eval.tune_tree import parse_tree
from mmspec import checkpoint as checkpoints
from mmspec import metrics
from mmspec.api import find_device, make_drafter
from mmspec.arguments import Parser, as_temperature, at_least, command
from mmspec.assets import EMBEDDED
from mmspec.checkpoint import DraftTree
from mmspec.costs import CostTable, load_or_measure
from mmspec.drafters.null import NullDrafter
from mmspec.hindsight import Prices, Recorder, Step, fixed_rate, oracle_rate
from mmspec.methods import make_method, method_names
from mmspec.policies import Parts, make_policy
from mmspec.policies._learned import LearnedPolicy
from mmspec.policy import FixedPolicy, SkipPolicy
from mmspec.records import Quarantine
from mmspec.sampling import make_sampler
from mmspec.types import Drafter, Evidence, InputError, Plan, Policy, StepTrace, Target

T = TypeVar("T")

PROGRAM = "eval.policies"
BASELINES = ("P0", "P1", "P2", "P3", "P4", "marginal")
LEARNED = {"P5": "viskip", "P6": "viskip", "P7": "viskip", "P8": "viskip_refined"}
POLICIES = (*BASELINES, *LEARNED)
ORACLE = "P9"
RECORD, AGAIN = "record", "again"
FIXED_GRID = ((1, 2), (2, 3), (3, 4), (5, 7), (7, 8), (7, 12), (10, 12), (12, 12), (12, 16))
THRESHOLDS = {
    "P2": ("attention", (0.05, 0.1, 0.2, 0.35, 0.5)),
    "P3": ("ema", (0.1, 0.2, 0.35, 0.5)),
    "P4": ("confidence", (0.03, 0.1, 0.2, 0.35, 0.5)),
}
FEW, LIKELY_TREES, FINALISTS = 4, 3, 2
"""Tuning: the share of the records that looks first are at, trees of the grid and thresholds of a policy that stay."""
FIGURES = ("speedup", "speedup_lo", "speedup_hi", "exact_match", "mat", "skip_rate", "draft_efficiency", "n_requests")


class Timed:
    """A policy whose own seconds are counted: of sensing, planning and observing."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.own_s = policy, 0.0
        self.max_depth, self.max_budget, self.mass_layer = policy.max_depth, policy.max_budget, policy.mass_layer
        self.senses = policy.senses

    def open(self, max_batch: int, device: torch.device, sampled: bool = False) -> None:
        self.policy.open(max_batch, device, sampled)
        self.senses = self.policy.senses

    def sense(self, evidence: Evidence, rows: Tensor) -> Tensor | None:
        return self._counted(lambda: self.policy.sense(evidence, rows))

    def plan(self, sensed: Sequence[Sequence[float]], remaining: Sequence[int]) -> Plan:
        made = self._counted(lambda: self.policy.plan(sensed, remaining))
        self.senses = self.policy.senses  # a policy that sleeps says so when it plans
        return made

    def observe(self, trace: StepTrace) -> None:
        self._counted(lambda: self.policy.observe(trace))

    def _counted(self, call: Callable[[], T]) -> T:
        start = time.perf_counter()
        result = call()
        self.own_s += time.perf_counter() - start
        return result


@dataclass(frozen=True)
class Setup:
    """One drafter with what its policies are made of.

    Args:
        make: the drafter as it is offered; a fresh one each time where it learns.
        script: depth and nodes of P0.
        offer: the largest draft.
        controllers: by policy, folders.
        width: see `Parts`.
    """

    target: Target
    make: Callable[[], Drafter]
    script: tuple[int, int]
    offer: DraftTree
    costs: CostTable
    controllers: Mapping[str, Path]
    width: int | None

    def policy(self, label: str, tuned: Mapping[str, Any]) -> Policy:
        """A policy by its number, with its tuned settings."""
        depth, budget = tuned.get("P1", self.script)
        if label in ("P0", "P1"):
            depth, budget = self.script if label == "P0" else (depth, budget)
            return make_policy("fixed", Parts(depth, budget))
        if label in THRESHOLDS:
            name, _ = THRESHOLDS[label]
            # Early exit chooses the depth itself; the other two have the best tree or none.
            parts = Parts(self.offer.depth if label == "P4" else depth, budget)
            return make_policy(name, parts, {"threshold": tuned[label]} if label in tuned else None)
        parts = Parts(self.offer.depth, self.offer.budget, self.costs, width=self.width)
        if label == "marginal":
            return make_policy(label, parts)
        controller = checkpoints.load_controller(self.controllers[label], self.target)
        return make_policy(LEARNED[label], replace(parts, controller=controller))

    def method(self, name: str, policy: Policy) -> Method:
        return Method(name, self.make(), Timed(policy))


def prepare(args: argparse.Namespace) -> Setup:
    """The drafter of the command line, its costs and its controllers.

    Raises:
        InputError: it is missing or does not fit.
    """
    controllers = {"P5": args.scalars_controller, "P6": args.blind_controller}
    controllers |= dict.fromkeys(("P7", "P8"), args.controller)
    folders = {label: Path(folder) for label, folder in controllers.items() if folder}
    offer, wanted = parse_tree(args.offer), parse_tree(args.script) if args.script else None
    width: int | None
    if args.ckpt:
        loaded = checkpoints.load(args.ckpt, args.target, args.dtype)
        target = open_target([loaded], args.target, args.dtype, args.device)
        drafter = make_drafter(replace(loaded, tree=offer), target)
        own = wanted or loaded.tree
        script, make = (min(own.depth, offer.depth), min(own.budget, offer.budget)), lambda: drafter
        home, key, width = loaded.folder / "costs", f"w{offer.width}", offer.width
    else:
        target = open_target([], args.target, args.dtype, args.device)
        drafter, plan = make_method(args.method, target)
        script = (wanted.depth, wanted.budget) if wanted else (plan.max_depth, plan.max_budget)
        make = lambda: make_method(args.method, target)[0]  # noqa: E731
        # As many nodes as levels: its drafts are chains, and a shallower one has fewer nodes.
        home, key, width = Path("runs") / args.method / "costs", "", 1 if plan.max_depth == plan.max_budget else None
    limit_pixels(target, None)
    folder = Path(args.costs) if args.costs else home
    depth, budget = max(offer.depth, script[0]), max(offer.budget, script[1])
    costs = load_or_measure(folder, target, drafter, args.batch_size, depth, budget, key)
    return Setup(target, make, script, offer, costs, folders, width)


class Scored:
    """What a list of methods did on the data.

    Args:
        mixed: groups hold records of all topics, so that few of them fill a batch; topics then have no figures.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        setup: Setup,
        methods: list[Method],
        data: str,
        limit: int | None,
        mixed: bool = False,
    ):
        quarantine, self.args = Quarantine(None), args
        records = load_records(data_folder(data), limit, quarantine, args.max_bad_share)
        if mixed:
            records = [replace(record, topic=OVERALL) for record in records]
        system = "" if setup.target.name == EMBEDDED else MMSPEC_SYSTEM
        dialogues = Dialogues(setup.target, records, system, args.max_new_tokens, quarantine)
        plain = Method(PLAIN, NullDrafter(), SkipPolicy())
        sampler = make_sampler(args.temperature, seed=args.seed)
        bench = Bench(setup.target, [plain, *methods], sampler, args.batch_size, metrics.TIE_GAPS[args.dtype])
        bench.warm_up(dialogues.warmup(max(N_WARMUP, args.batch_size)))
        self.recorder = next((m.drafter for m in methods if isinstance(m.drafter, Recorder)), None)
        self.steps: dict[str, list[Step]] = {}
        self.results: list[Result] = []
        for method in methods:
            assert isinstance(method.policy, Timed)
            method.policy.own_s = 0.0
            if isinstance(method.policy.policy, LearnedPolicy):
                method.policy.policy.outcomes = []
        if self.recorder:
            self.recorder.steps.clear()
        contention = Contention()
        bench.run(dialogues, self._take)
        self.other_cores = contention.cores()
        self.methods = methods

    def _take(self, group: list[Result]) -> None:
        self.results.extend(group)
        if self.recorder:
            self.steps.setdefault(group[0].topic, []).extend(self.recorder.steps)
            self.recorder.steps.clear()

    def of(self, name: str, topic: str = OVERALL) -> list[Result]:
        return [r for r in self.results if r.method == name and topic in (OVERALL, r.topic)]

    def topics(self) -> list[str]:
        return [OVERALL, *dict.fromkeys(result.topic for result in self.results)]

    def figures(self, name: str, other: str = PLAIN, topic: str = OVERALL) -> dict[str, Any]:
        """Figures of one method, its speedup being over `other`; plain decoding has the mean time of its two runs."""
        base = self.of(other, topic)
        if other == PLAIN and name != AGAIN:
            again = {result.group: result.group_s for result in self.of(AGAIN, topic)}
            base = [replace(r, group_s=(r.group_s + again.get(r.group, r.group_s)) / 2) for r in base]
        return figures(self.of(name, topic), base, self.args.batch_size, self.args.seed)

    def control_share(self, method: Method) -> float:
        """The policy's own seconds / all seconds."""
        total = sum({r.group: r.group_s for r in self.of(method.name)}.values())
        assert isinstance(method.policy, Timed)
        return method.policy.own_s / total


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
    steps = Scored(
        args, setup, [Method(RECORD, Recorder(setup.make()), everything)], args.data, limit, mixed=True
    ).steps.get(OVERALL)
    if steps:
        prices = Prices.of(setup.costs, args.batch_size, offer.depth, offer.budget)
        grid = sorted(grid, key=lambda tree: -fixed_rate(steps, prices, *tree))[:LIKELY_TREES]
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
    steps = [s for name, some in scored.steps.items() if topic in (OVERALL, name) for s in some]
    row: dict[str, Any] = {"policy": ORACLE, "topic": topic, **dict.fromkeys(FIGURES)}
    if steps:
        prices = Prices.of(setup.costs, args.batch_size, setup.offer.depth, setup.offer.budget)
        depth, nodes = min(tree[0], setup.offer.depth), min(tree[1], setup.offer.budget)
        gain = oracle_rate(steps, prices) / fixed_rate(steps, prices, depth, nodes)
        row |= {"speedup": scored.figures("P1", topic=topic)["speedup"] * gain, "over_P1": gain}
    return row


def about(args: argparse.Namespace, scored: Scored) -> dict[str, Any]:
    """What else a reader must know."""
    return {
        "settings": {
            "drafter": args.method or Path(args.ckpt).name, "batch": args.batch_size, "temperature": args.temperature,
            "data": args.data if args.data.startswith("synth:") else Path(args.data).name, "limit": args.limit,
            "offer": args.offer, "max_new_tokens": args.max_new_tokens, "seed": args.seed, "dtype": args.dtype,
            "threads": torch.get_num_threads(),
        },
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
    add("--policies", nargs="+", choices=(*POLICIES, ORACLE), default=[*POLICIES, ORACLE], metavar="P")
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
    if args.tuned and not Path(args.tuned).is_file():
        raise InputError(f"--tuned {args.tuned} does not exist; make it with --tune")
    args.device = find_device(args.device)


@command(PROGRAM)
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = build_parser().parse_args(argv)
    check_arguments(args)
    setup = prepare(args)
    found = tune(args, setup) if args.tune else score(args, setup, json.loads(Path(args.tuned).read_text("utf-8")))
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    checkpoints.write_json(Path(args.out), clean(found))


if __name__ == "__main__":
    sys.exit(main())
