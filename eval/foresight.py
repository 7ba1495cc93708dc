"""What foresight is worth here: how much faster depths can be chosen by a controller, by the draft's scores, by both.

    python -m eval.foresight --ckpt runs/viskip_tiny
    python -m eval.foresight --ckpt runs/eagle_tiny --controller runs/viskip_only_eagle_tiny --out runs/foresight.json

Requests are decoded with the largest draft in every round, a chain, while the controller says what it foresees. Then
depths are chosen again on paper, at the costs of this machine, and each way of choosing is compared with the best
single depth: by the controller before the draft; by the draft's own scores while it is made, level by level; by both;
and with all outcomes known. Scores are made honest, alone and together with the controller, by a logistic fit on the
images of the other half. A policy's own time is not counted: `eval.policies` measures what it leaves of these gains.

Invariant: no figure here is a measured speedup; a shorter round would have begun the next one elsewhere, and rounds
there are taken to be like these. Rounds of one image are alike: they are fitted on and drawn together.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from eval import tables
from eval.mmspec import open_target, output_folder
from eval.options import add_records, add_target
from eval.summary import clean, hardware
from eval.tasks import (
    Dialogues,
    check_left_out,
    data_folder,
    data_name,
    image_of,
    limit_pixels,
    load_records,
    system_text,
)
from mmspec import checkpoint as checkpoints
from mmspec import metrics
from mmspec.api import find_device, make_drafter
from mmspec.arguments import Parser, as_temperature, at_least, command
from mmspec.checkpoint import DraftTree, write_json
from mmspec.costs import load_or_measure
from mmspec.loop import all_complete, generate
from mmspec.policies import Parts
from mmspec.policies._learned import LearnedPolicy
from mmspec.records import Quarantine
from mmspec.sampling import make_sampler
from mmspec.types import Evidence, InputError, Plan, StepTrace, Tree

PROGRAM = "eval.foresight"
_SURE = 1e-4
"""No chance is nearer to 0 or 1."""


@dataclass(frozen=True)
class Round:
    """A draft of all levels, and what was said of it.

    Args:
        image: that it is about (`tasks.image_of`).
        foreseen: [D] the controller's chance of each level once the one before is accepted.
        scores: [D] the draft's own log-probability of its tokens up to each level.
        accepted: levels.
    """

    image: str
    foreseen: tuple[float, ...]
    scores: tuple[float, ...]
    accepted: int


class Listener:
    """The largest draft in every round, while a controller is asked what it foresees.

    Args:
        learned: asked; it learns what came of the drafts.
    """

    mass_layer: int | None = None
    senses = True

    def __init__(self, learned: LearnedPolicy) -> None:
        self.learned = learned
        self.max_depth, self.max_budget = learned.max_depth, learned.max_depth
        self.rounds: list[Round] = []
        self.image = ""
        self._scores: tuple[float, ...] = ()

    def open(self, max_batch: int, device: torch.device, sampled: bool = False) -> None:
        self.learned.open(max_batch, device, sampled)
        self.learned.asks = True

    def sense(self, evidence: Evidence, rows: Tensor) -> Tensor:
        return self.learned.sense(evidence, rows)

    def plan(self, sensed: Sequence[Sequence[float]], remaining: Sequence[int]) -> Plan:
        self.learned.asleep = self.learned.skips = 0
        self.learned.plan(sensed, remaining)
        self.learned.planned = depth = min(self.max_depth, remaining[0] - 1)
        return Plan(depth, (depth,), prune=self._listen if depth else None)

    def _listen(self, trees: Tree) -> Tree:
        assert trees.scores is not None
        self._scores = tuple(trees.scores[0, 1:].tolist())
        return trees

    def observe(self, trace: StepTrace) -> None:
        # A draft that the end of the answer made shorter is none to compare depths on.
        if trace.plan.depth == self.max_depth and len(self._scores) == self.max_depth:
            said = tuple(self.learned.said[0])
            self.rounds.append(Round(self.image, said, self._scores, trace.accepted[0]))
        self.learned.observe(trace)


class Paper:
    """Depths chosen again for recorded rounds.

    Args:
        rounds: of at least two images.
        cost_s: [D + 1] seconds of a round by depth.
    """

    def __init__(self, rounds: Sequence[Round], cost_s: Sequence[float]) -> None:
        self.cost_s, self.depth = np.array(cost_s), len(cost_s) - 1
        self.images = np.unique([r.image for r in rounds], return_inverse=True)[1]
        """[R] numbers of their images."""
        self.accepted = np.array([r.accepted for r in rounds])
        self.foreseen = np.array([r.foreseen for r in rounds]).clip(_SURE, 1 - _SURE)
        paths = np.array([r.scores for r in rounds])
        self.sure = np.exp(np.diff(paths, axis=1, prepend=0.0)).clip(_SURE, 1 - _SURE)
        """[R, D] the draft's own chance of each token once the one before is accepted."""
        levels = np.arange(1, self.depth + 1)
        self.seen, self.right = levels <= self.accepted[:, None] + 1, levels <= self.accepted[:, None]

    def rate(self, depths: np.ndarray) -> float:
        """Tokens a second of drafting so deep."""
        return float((1 + np.minimum(self.accepted, depths)).sum() / self.cost_s[depths].sum())

    def usual(self) -> np.ndarray:
        """[D] mean chance of each level once the one before is accepted."""
        share: np.ndarray = (self.right & self.seen).sum(0) / self.seen.sum(0).clip(1)
        return share.clip(_SURE, 1 - _SURE)

    def single(self) -> np.ndarray:
        """[R] the best single depth, in every round."""
        depths = [np.full(len(self.accepted), depth) for depth in range(self.depth + 1)]
        return max(depths, key=self.rate)

    def hindsight(self) -> np.ndarray:
        """[R] with all outcomes known."""
        return self.ahead(self.right.astype(float))

    def ahead(self, chances: np.ndarray) -> np.ndarray:
        """[R] depths chosen before drafting, by chances [R, D] of each level once the one before is accepted."""
        gains = np.pad(chances.cumprod(1).cumsum(1), ((0, 0), (1, 0)))
        return self._at_its_price(lambda price: (gains - price * self.cost_s).argmax(1))

    def along(self, drafted: np.ndarray, to_come: np.ndarray) -> np.ndarray:
        """[R] depths chosen level by level: a draft goes on while any number of further levels pays.

        Args:
            drafted: [R, D] chance of each level once it is drafted.
            to_come: [R, D] the same while it is not.
        """
        reached = np.pad(drafted.cumprod(1), ((0, 0), (1, 0)), constant_values=1.0)

        def at(price: float) -> np.ndarray:
            depths, going = np.zeros(len(drafted), int), np.ones(len(drafted), bool)
            for level in range(self.depth):
                gains = reached[:, level, None] * to_come[:, level:].cumprod(1).cumsum(1)
                going &= (gains > price * (self.cost_s[level + 1 :] - self.cost_s[level])).any(1)
                depths += going
            return depths

        return self._at_its_price(at)

    def _at_its_price(self, choose: Callable[[float], np.ndarray]) -> np.ndarray:
        """Depths at the price of time that they achieve themselves (Dinkelbach's fixed point)."""
        price = self.rate(self.single())
        for _ in range(20):
            depths = choose(price)
            price = self.rate(depths)
        return depths

    def fitted(self, *inputs: np.ndarray) -> np.ndarray:
        """[R, D] chances by a logistic fit of their log-odds and the level, on the images of the other half.

        Args:
            inputs: [R, D] chances each.
        """
        columns = [np.log(x) - np.log1p(-x) for x in inputs]
        columns += [np.broadcast_to(row, self.seen.shape) for row in np.eye(self.depth)]
        features, out = np.stack(columns, -1), np.empty(self.seen.shape)
        for half in (0, 1):
            mine = self.images % 2 == half
            here = self.seen & ~mine[:, None]
            out[mine] = _logistic(features[mine] @ _newton(features[here], self.right[here]))
        return out.clip(_SURE, 1 - _SURE)

    def nll(self, chances: np.ndarray) -> float:
        """Negative log-likelihood of what came of a draft, in nats a round."""
        said = np.log(np.where(self.right, chances, 1 - chances))
        return -float(said[self.seen].sum()) / len(self.accepted)

    def gain(self, depths: np.ndarray) -> metrics.Interval:
        """Over the best single depth, as a ratio of tokens a second; images are drawn."""
        columns = []
        for some in (depths, self.single()):
            columns += [(1 + np.minimum(self.accepted, some)).tolist(), self.cost_s[some].tolist()]

        def statistic(totals: Tensor) -> Tensor:
            return totals[..., 0] / totals[..., 1] / (totals[..., 2] / totals[..., 3])

        return metrics.contrast(columns, self.images.tolist(), statistic, 1.0)[0]


def _logistic(x: np.ndarray) -> np.ndarray:
    out: np.ndarray = 0.5 + 0.5 * np.tanh(0.5 * x)
    return out


def _newton(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Weights of a logistic regression; the ridge keeps levels that were always accepted finite."""
    weights, ridge = np.zeros(x.shape[1]), 1e-2
    for _ in range(25):
        p = _logistic(x @ weights)
        hessian = (x * (p * (1 - p))[:, None]).T @ x + ridge * np.eye(len(weights))
        weights += np.linalg.solve(hessian, x.T @ (y - p) - ridge * weights)
    return weights


def figures(rounds: Sequence[Round], cost_s: Sequence[float]) -> list[dict[str, Any]]:
    """A row for each way of choosing depths: its gain with interval, mean depth, and nats a round of its chances."""
    paper = Paper(rounds, cost_s)
    usual, scores = np.broadcast_to(paper.usual(), paper.sure.shape), paper.fitted(paper.sure)
    both = paper.fitted(paper.sure, paper.foreseen)
    ways: dict[str, tuple[np.ndarray, np.ndarray | None]] = {
        "the best single depth": (paper.single(), usual),
        "the controller": (paper.ahead(paper.foreseen), paper.foreseen),
        "the draft's scores": (paper.along(scores, usual), scores),
        "both": (paper.along(both, paper.foreseen), both),
        "all outcomes": (paper.hindsight(), None),
    }
    rows = []
    for name, (depths, chances) in ways.items():
        gain = paper.gain(depths)
        rows.append({
            "known": name, "gain": gain.value, "gain_lo": gain.lo, "gain_hi": gain.hi,
            "mean_depth": float(depths.mean()), "nll": None if chances is None else paper.nll(chances),
        })  # fmt: skip
    return rows


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Decode and compare, at each temperature.

    Raises:
        InputError: the input is wrong, or too few rounds came of it.
    """
    loaded = checkpoints.load(args.ckpt, args.target, args.dtype)
    depth = args.offer or loaded.tree.depth
    loaded = replace(loaded, tree=DraftTree(depth, 1, depth))
    target = open_target([loaded], args.target, args.dtype, args.device)
    controller = checkpoints.load_controller(Path(args.controller or args.ckpt), target)
    measured = Path(args.costs) if args.costs else loaded.folder / "costs"
    costs = load_or_measure(measured, target, make_drafter(loaded, target), 1, depth, depth, "w1")
    limit_pixels(target, None)
    quarantine = Quarantine(None)
    records = load_records(data_folder(args.data), args.limit, quarantine, args.max_bad_share)
    noted = set[str]()
    result: dict[str, Any] = {"temperatures": {}}
    for temperature in args.temperature:
        sampler = make_sampler(temperature, seed=args.seed)
        drafter, policy = make_drafter(loaded, target), LearnedPolicy(Parts(depth, depth, costs, controller, 1))
        listener = Listener(policy)
        dialogues = Dialogues(target, records, system_text(target), args.max_new_tokens, quarantine, noted=noted)
        shown = f"decoding at T = {temperature:g}"
        for [task] in track(dialogues.groups(1), shown, total=dialogues.n_turns, console=console):
            listener.image = image_of(task.record)
            [output] = all_complete(generate(target, [task.request], drafter, listener, sampler))
            dialogues.answer(task, target.decode(output.tokens))
        check_left_out(quarantine, args.max_bad_share)
        if len({r.image for r in listener.rounds}) < 2:
            raise InputError(f"fewer than two images had a draft of all {listener.max_depth} levels; give more --data")
        cost_s = [policy.cost(d) for d in range(listener.max_depth + 1)]
        rows = figures(listener.rounds, cost_s)
        result["temperatures"][f"{temperature:g}"] = {"rounds": len(listener.rounds), "cost_s": cost_s, "rows": rows}
    result["settings"] = {
        "drafter": Path(args.ckpt).name, "controller": Path(args.controller or args.ckpt).name, "depth": depth,
        "data": data_name(args.data), "limit": args.limit, "max_new_tokens": args.max_new_tokens, "seed": args.seed,
        "dtype": args.dtype,
    }  # fmt: skip
    return clean({**result, "hardware": hardware(target.device), "commit": checkpoints.git_commit()})


def markdown(found: dict[str, Any]) -> str:
    """A table of one temperature."""
    lines = [
        [
            row["known"], f"{row['gain']:.3f} [{row['gain_lo']:.3f}, {row['gain_hi']:.3f}]",
            f"{row['mean_depth']:.1f}", "-" if row["nll"] is None else f"{row['nll']:.3f}",
        ]
        for row in found["rows"]
    ]  # fmt: skip
    return tables.markdown(["known of a round", "tokens a second [95%]", "mean depth", "nats a round"], lines)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, metavar="DIR", help="run folder of a head, with a controller or")
    add(
        "--controller", metavar="DIR", help="another run folder with its controller, trained on chains (policy.width=1)"
    )
    add("--costs", metavar="DIR", help="where the cost table is kept (default: beside the head)")
    add("--offer", type=int, metavar="D", help="levels of the chain (default: of the checkpoint's tree.json)")
    add_records(parser, "synth:val", 100, 128)
    add_target(parser)
    add("--temperature", type=as_temperature, nargs="+", default=[0.0, 1.0], metavar="T", help="(default: 0 1)")
    add("--seed", type=int, default=0, help="of noise (default: 0)")
    add("--out", metavar="FILE", help="JSON file to write as well")
    return parser


@command(PROGRAM)
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = build_parser().parse_args(argv)
    at_least(args, limit=1, max_new_tokens=2, offer=1, seed=0)
    if args.out:
        output_folder(Path(args.out).parent)
    args.device = find_device(args.device)
    result = run(args, Console(stderr=True))
    for temperature, found in result["temperatures"].items():
        print(f"T = {temperature}, {found['rounds']} rounds\n\n{markdown(found)}")
    if args.out:
        write_json(Path(args.out), result)


if __name__ == "__main__":
    sys.exit(main())
