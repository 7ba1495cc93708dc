"""How good a controller's decisions are: foresight, skips, and what the best choices in hindsight would have gained.

Invariant: everything is of the same rounds, those in which the largest draft was made, so that what a smaller one or
none would have given is known; rates are tokens over seconds of the cost table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any

from torch import Tensor

from eval.policy_tables import skip_quality
from eval.summary import OVERALL
from eval.tasks import Task
from mmspec import metrics
from mmspec.checkpoint import DraftTree
from mmspec.costs import CostTable
from mmspec.hindsight import Outcome, Priced, Prices, fixed_rate, oracle_rate
from mmspec.policies._learned import LearnedPolicy
from mmspec.types import Output

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
BOUNDS = (0.001, 0.01, 0.1, 1.0)
"""Nats between the levels of visual dependence, of which there is one more."""
LEVELS = ("under 0.001", "to 0.01", "to 0.1", "to 1", "1 and more")
DEFINITIONS = {
    "asks": "whether the controller is asked at all here; where it would not repay its own time, drafts have the depth "
    "that has paid best of late, nothing is foreseen, and plans and regret are that rule's",
    "foreseen": "mean number of draft tokens that the controller expects to be accepted of the draft that it plans",
    "plan": "depth of the draft that the controller decides on before anything is drafted; 0 is a skip",
    "calibration": "stated chance of each level, once the one before is accepted, against how often that came true",
    "precision, recall": "of the statement that nothing of a draft will be accepted (a = 0)",
    "rate": "tokens a second by the cost table: kept tokens of the rounds / seconds that they are said to take, the "
    "controller's own time left out",
    "regret": "1 - rate of the controller's plans / rate of the best plan of each round in hindsight",
    "captured": "(controller - best fixed depth) / (hindsight - best fixed depth), of the rates",
    "dependence": "KL(p || q) in nats of the target's distributions of a token with the image (p) and with the mean "
    "image feature in its place (q)",
    "break-even": "largest batch up to which the rate of a fixed depth is above plain decoding's, each batch with its "
    "own measured costs and with the acceptance of these rounds",
}


@dataclass(frozen=True)
class Decision:
    """A plan.

    Args:
        depth: levels to draft; 0 is a skip.
        nodes: draft nodes that such a draft has.
        chances: of each level, once the one before is accepted; None where it did not look.
        unseen: why it did not: "not asked", "asleep" or "nothing to draft"; "" where it did.
    """

    depth: int
    nodes: int
    chances: tuple[float, ...] | None
    unseen: str = ""

    @property
    def foreseen(self) -> float | None:
        """Draft tokens that it expects to be accepted."""
        return None if self.chances is None else sum(accumulate(self.chances[: self.depth], mul))


@dataclass(frozen=True)
class Asked:
    """A round with the largest draft: what the controller would have done, what came of the draft, and where.

    Args:
        at: tokens of the answer before it, the first included.
    """

    decision: Decision
    outcome: Outcome
    at: int

    @property
    def accepted(self) -> int:
        """Of the whole draft."""
        return len(self.outcome.path)

    @property
    def statement(self) -> tuple[tuple[float, ...], int] | None:
        """Chances of the levels that were observed, and what was accepted, as `calibration` takes them."""
        chances = self.decision.chances
        observed = min(self.accepted + 1, max(self.outcome.depths, default=0))
        return None if chances is None or not observed else (chances[:observed], self.accepted)


@dataclass(frozen=True)
class Answered:
    """One request.

    Args:
        task: whose answer it is.
        output: as the controller's decisions made it.
        decisions: of its rounds.
        asked: the rounds with the largest draft, and what the controller would have done in them.
        kl: [n] visual dependence of every token, None where nothing in the data has an image.
        own_s: seconds of `output` that were the controller's own.
    """

    task: Task
    output: Output
    decisions: list[Decision]
    asked: list[Asked]
    kl: Tensor | None
    own_s: float


def figures(answers: Sequence[Answered], policy: LearnedPolicy, tree: DraftTree) -> dict[str, Any]:
    """All figures, see DEFINITIONS.

    Args:
        answers: at least one, with a round.
        policy: with the costs it decides by.
        tree: of the checkpoint, which is the largest draft.
    """
    asked = [one for answer in answers for one in answer.asked]
    said = [one.statement for one in asked if one.statement is not None]
    chosen = [((float(one.decision.depth > 0),), one.accepted) for one in asked]
    topics = dict.fromkeys(answer.task.record.topic for answer in answers)
    members = {topic: [a for a in answers if a.task.record.topic == topic] for topic in topics}
    costs = policy.costs
    assert isinstance(costs, CostTable)
    by_batch = {batch: _at_batch(asked, policy, tree, batch) for batch in sorted(costs.verify_s)}
    fixed = next(iter(by_batch.values()))
    return {
        "topics": {name: _row(some, policy, tree) for name, some in {OVERALL: answers, **members}.items()},
        "calibration": metrics.calibration(said),
        "skips": {
            "planned": skip_quality(chosen),
            "stated": {f"{threshold:g}": skip_quality(said, threshold) for threshold in THRESHOLDS},
        },
        "levels": _levels(answers),
        "batches": [
            {"batch": batch, "policy": name, "speedup": speedup}
            for batch, found in by_batch.items()
            for name, speedup in found.items()
        ],
        "break_even": {name: metrics.break_even({b: found[name] for b, found in by_batch.items()}) for name in fixed},
        "definitions": DEFINITIONS,
    }


def level(kl: float) -> int:
    """The level of a token's visual dependence, 0 the least."""
    return sum(kl >= bound for bound in BOUNDS)


def _row(answers: Sequence[Answered], policy: LearnedPolicy, tree: DraftTree) -> dict[str, Any]:
    """Figures of a topic: of the answers as they were decoded, and of the rounds with the largest draft."""
    outputs = [answer.output for answer in answers]
    asked = [one for answer in answers for one in answer.asked]
    decided = [
        (d, accepted)
        for answer in answers
        for d, (action, _, accepted, _) in zip(answer.decisions, answer.output.rounds, strict=True)
        if action == "draft" and d.foreseen is not None
    ]
    return {
        "rounds": sum(len(output.rounds) for output in outputs),
        "mat": metrics.mat(outputs),
        "skip_rate": metrics.skip_rate(outputs),
        "depth": metrics.mean([d.depth for d, _ in decided]),
        "foreseen": metrics.mean([d.foreseen or 0.0 for d, _ in decided]),
        "accepted": metrics.mean([accepted for _, accepted in decided]),
        **_rates(asked, policy, tree),
    }


def _rates(asked: Sequence[Asked], policy: LearnedPolicy, tree: DraftTree) -> dict[str, Any]:
    """Rates of plain decoding, fixed trees, the controller and hindsight, over plain decoding's."""
    prices = Prices.of(policy.costs, 1, policy.max_depth, policy.max_budget)
    steps: list[Priced] = [((one.outcome,), prices) for one in asked]
    plain = fixed_rate(steps, 0, 0)
    fixed = {d: fixed_rate(steps, d, policy.offered[d]) for d in range(1, policy.max_depth + 1)}
    best = max(fixed, key=fixed.__getitem__)
    tokens = sum(1 + one.outcome.accepted(one.decision.depth, one.decision.nodes) for one in asked)
    seconds = sum(prices.verify_s[one.decision.nodes] + prices.draft_s[one.decision.depth] for one in asked)
    mine, oracle = tokens / seconds, oracle_rate(steps)
    top = max(fixed[best], plain)
    return {
        "tree": fixed_rate(steps, min(tree.depth, policy.max_depth), tree.budget) / plain,
        "best_depth": best if fixed[best] > plain else 0,
        "best_fixed": top / plain,
        "controller": mine / plain,
        "hindsight": oracle / plain,
        "regret": 1 - mine / oracle,
        "captured": (mine - top) / (oracle - top) if oracle > top * (1 + 1e-9) else None,
    }


def _at_batch(asked: Sequence[Asked], policy: LearnedPolicy, tree: DraftTree, batch: int) -> dict[str, float]:
    """What the cost table says of fixed depths at a batch size, over plain decoding."""
    prices = Prices.of(policy.costs, batch, policy.max_depth, policy.max_budget)
    steps: list[Priced] = [((one.outcome,), prices) for one in asked]
    plain = fixed_rate(steps, 0, 0)
    depths = range(1, policy.max_depth + 1)
    return {
        "the checkpoint's tree": fixed_rate(steps, min(tree.depth, policy.max_depth), tree.budget) / plain,
        "best fixed depth": max(fixed_rate(steps, d, policy.offered[d]) for d in depths) / plain,
    }


def _levels(answers: Sequence[Answered]) -> list[dict[str, Any]]:
    """By visual dependence of the first token that a round could draft: what is foreseen, what is, what is planned."""
    members: list[list[Asked]] = [[] for _ in LEVELS]
    for answer in answers:
        if answer.kl is not None:
            for one in answer.asked:
                members[level(float(answer.kl[one.at]))].append(one)
    rows = []
    for name, some in zip(LEVELS, members):
        looked = [one for one in some if one.decision.chances]
        rows.append(
            {
                "level": name,
                "rounds": len(some),
                "foreseen": metrics.mean([one.decision.chances[0] for one in looked if one.decision.chances]),
                "right": metrics.mean([float(one.accepted > 0) for one in looked]),
                "skipped": metrics.mean([float(not one.decision.depth) for one in some]),
                "accepted": metrics.mean([one.accepted for one in some]),
                "depth": metrics.mean([one.decision.depth for one in some]),
            }
        )
    return rows if any(members) else []
