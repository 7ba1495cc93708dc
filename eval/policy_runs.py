"""One drafter under all policies: what they are made of, and what they did on the data (`eval.policies`)."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from eval.bench import N_WARMUP, Bench, Method, Result
from eval.mmspec import open_target
from eval.summary import OVERALL, Contention, figures
from eval.tasks import (
    PLAIN,
    Dialogues,
    check_left_out,
    data_folder,
    limit_pixels,
    load_records,
    system_text,
)
from eval.tune_tree import parse_tree
from mmspec import checkpoint as checkpoints
from mmspec import metrics
from mmspec.api import make_drafter
from mmspec.checkpoint import DraftTree
from mmspec.costs import CostTable, load_or_measure
from mmspec.drafters.null import NullDrafter
from mmspec.hindsight import Priced, Prices, Recorder, Step
from mmspec.methods import make_method
from mmspec.policies import Parts, make_policy
from mmspec.policies._learned import LearnedPolicy
from mmspec.policy import SkipPolicy
from mmspec.records import Quarantine
from mmspec.sampling import make_sampler
from mmspec.types import Drafter, Evidence, Plan, Policy, StepTrace, Target

T = TypeVar("T")

BASELINES = ("P0", "P1", "P2", "P3", "P4", "marginal")
LEARNED = {"P5": "viskip", "P6": "viskip", "P7": "viskip", "P8": "viskip_refined"}
POLICIES = (*BASELINES, *LEARNED)
ATTENTION, ORACLE = "P2", "P9"
"""The paper's threshold; hindsight."""
CONTROLLERS = {"P5": "scalars_controller", "P6": "blind_controller", "P7": "controller", "P8": "controller"}
"""Which option names the controller of a policy."""
AGAIN = "again"
THRESHOLDS = {
    "P2": ("attention", (0.05, 0.1, 0.2, 0.35, 0.5)),
    "P3": ("ema", (0.1, 0.2, 0.35, 0.5)),
    "P4": ("confidence", (0.03, 0.1, 0.2, 0.35, 0.5)),
}


class Timed:
    """A policy whose own seconds are counted: of sensing, planning, early exit, pruning and observing.

    On a GPU those of early exit and pruning are also the wait for the scores that they read.
    """

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
        extend, prune = made.extend, made.prune
        if extend is not None:
            made = replace(made, extend=lambda level, scores: self._counted(lambda: extend(level, scores)))
        if prune is not None:
            made = replace(made, prune=lambda trees: self._counted(lambda: prune(trees)))
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
            if label == "P4":  # early exit chooses the depth itself: a level has a node at least
                depth, budget = self.offer.depth, max(budget, self.offer.depth)
            parts = Parts(depth, budget)
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
    folders = {label: Path(getattr(args, option)) for label, option in CONTROLLERS.items() if getattr(args, option)}
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
        quarantine, self.args, self.setup = Quarantine(None), args, setup
        records = load_records(data_folder(data), limit, quarantine, args.max_bad_share)
        if mixed:
            records = [replace(record, topic=OVERALL) for record in records]
        dialogues = Dialogues(setup.target, records, system_text(setup.target), args.max_new_tokens, quarantine)
        plain = Method(PLAIN, NullDrafter(), SkipPolicy())
        sampler = make_sampler(args.temperature, seed=args.seed)
        bench = Bench(setup.target, [plain, *methods], sampler, args.batch_size, metrics.TIE_GAPS[args.dtype])
        bench.warm_up(dialogues.warmup(max(N_WARMUP, args.batch_size)))
        self.recorder = next((m.drafter for m in methods if isinstance(m.drafter, Recorder)), None)
        self.steps: dict[str, list[tuple[int, Step]]] = {}
        """By topic, each with the rows of its batch: a topic's last group may be a small one."""
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
        check_left_out(quarantine, args.max_bad_share)
        self.other_cores = contention.cores()
        self.methods = methods

    def _take(self, group: list[Result]) -> None:
        self.results.extend(group)
        if self.recorder:
            rows = self.recorder.rows
            self.steps.setdefault(group[0].topic, []).extend((rows, step) for step in self.recorder.steps)
            self.recorder.steps.clear()

    def of(self, name: str, topic: str = OVERALL) -> list[Result]:
        return [r for r in self.results if r.method == name and topic in (OVERALL, r.topic)]

    def topics(self) -> list[str]:
        return [OVERALL, *dict.fromkeys(result.topic for result in self.results)]

    def recorded(self, topic: str = OVERALL) -> list[Priced]:
        """The recorded steps of a topic, each with what it costs in its batch."""
        steps = [one for name, some in self.steps.items() if topic in (OVERALL, name) for one in some]
        offer, costs = self.setup.offer, self.setup.costs
        prices = {rows: Prices.of(costs, rows, offer.depth, offer.budget) for rows in {rows for rows, _ in steps}}
        return [(step, prices[rows]) for rows, step in steps]

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
