"""Policies: how much to draft, decided before anything is drafted.

`sense` looks at what the last verification left on the device (no sync); `plan` reads it on the host, where it arrived
with the step's one transfer. Any choice made of the committed context alone leaves the output unchanged.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from mmspec.types import Calibration, Evidence, Plan, StepTrace

SCALARS = (
    "entropy",
    "top1_probability",
    "top2_margin",
    "root_log_probability",
    "accepted_share_ema_fast",
    "accepted_share_ema_slow",
    "accepted_share_last",
    "accepted_share_previous",
    "rounds_since_zero",
    "log_committed",
    "log_generated",
    "log_visual",
    "visual_share",
    "has_image",
)
"""Free scalars of the controller, in the order of its input."""

_FAST, _SLOW = 0.5, 0.9
_TINY = math.exp(-20.0)
_START = (0.7, 0.7, 0.7, 0.7, 4.0)
"""History of a row that has none."""


class History:
    """Acceptance of recent rounds per row, on the device: [B, 5] (two averages, last two shares, rounds since zero)."""

    def __init__(self, max_batch: int, device: torch.device) -> None:
        self.start = torch.tensor(_START, device=device)
        self.state = self.start.repeat(max_batch, 1)

    def update(self, evidence: Evidence, rows: Tensor) -> Tensor:
        """Take in the last round of some rows; a skip (reach 0) says nothing, a fresh row (n_kept 0) starts anew.

        Returns:
            [R, 5].
        """
        old = self.state[rows]
        share = ((evidence.n_kept - 1) / evidence.reach.clamp_min(1)).to(old.dtype).unsqueeze(1)
        age = (old[:, 4:] + 1).masked_fill(share <= 0, 0.0)
        new = torch.cat(
            [
                _FAST * old[:, :1] + (1 - _FAST) * share,
                _SLOW * old[:, 1:2] + (1 - _SLOW) * share,
                share,
                old[:, 2:3],
                age,
            ],
            1,
        )
        new = torch.where((evidence.reach > 0).unsqueeze(1), new, old)
        new = torch.where((evidence.n_kept == 0).unsqueeze(1), self.start, new)
        self.state[rows] = new
        return new


class Records:
    """`History` and `scalars` on the host, for policies that decide there: the same numbers from the same evidence.

    Args:
        max_batch: rows.
    """

    def __init__(self, max_batch: int) -> None:
        self.state: list[tuple[float, ...]] = [_START] * max_batch
        self.committed = [0.0] * max_batch

    def scalars(self, told: Sequence[Sequence[float]], rows: Sequence[int]) -> list[tuple[float, ...]]:
        """Take in the last round of some rows; see `History.update`. A row whose text got shorter is another's.

        Args:
            told: per row of `rows` n_kept, reach, n_committed, n_prompt, n_visual; then of the logits that the root was
                chosen from the entropy, the two largest probabilities and the root's.

        Returns:
            [R, len(SCALARS)].
        """
        table = []
        for row, (kept, reach, committed, n_prompt, visual, entropy, first, second, root) in zip(rows, told):
            if kept == 0 or committed < self.committed[row]:
                self.state[row] = _START
            elif reach > 0:
                fast, slow, last, _, age = self.state[row]
                share = (kept - 1) / reach
                fast, slow = _FAST * fast + (1 - _FAST) * share, _SLOW * slow + (1 - _SLOW) * share
                self.state[row] = fast, slow, share, last, age + 1 if share > 0 else 0.0
            self.committed[row] = committed
            *shares, age = self.state[row]
            table.append(
                (
                    *(entropy, first, first - second, math.log(max(root, _TINY))),
                    *(*shares, math.log1p(age)),
                    *(math.log(committed), math.log1p(committed - n_prompt), math.log1p(visual)),
                    *(visual / committed, float(visual > 0)),
                )
            )
        return table


def scalars(evidence: Evidence, history: Tensor) -> Tensor:
    """The controller's free scalars, [R, len(SCALARS)] fp32, not yet standardised."""
    p = evidence.logits.float().softmax(-1)
    top = p.topk(2, dim=-1).values
    committed, visual = evidence.n_committed.float(), evidence.n_visual.float()
    columns = [
        torch.special.entr(p).sum(-1),
        top[:, 0],
        top[:, 0] - top[:, 1],
        p.gather(1, evidence.roots.unsqueeze(1)).squeeze(1).clamp_min(_TINY).log(),
        *history[:, :4].float().unbind(1),
        history[:, 4].float().log1p(),
        committed.log(),
        (committed - evidence.n_prompt).log1p(),
        visual.log1p(),
        visual / committed,
        (visual > 0).float(),
    ]
    return torch.stack(columns, 1)


class FixedPolicy:
    """The same depth and node budget every round.

    Args:
        depth: draft levels.
        budget: draft nodes a row, root excluded.
    """

    senses = False
    mass_layer: int | None = None

    def __init__(self, depth: int, budget: int) -> None:
        if depth < 0 or budget < 0:
            raise ValueError(f"depth and budget must not be negative, got {depth} and {budget}")
        self.max_depth, self.max_budget = depth, budget

    def open(self, max_batch: int, device: torch.device, sampled: bool = False) -> None:
        """No state."""

    def sense(self, evidence: Evidence, rows: Tensor) -> Tensor | None:
        return None

    def plan(self, sensed: Sequence[Sequence[float]], remaining: Sequence[int]) -> Plan:
        # A round emits up to depth + 1 tokens: deeper than what is still wanted would be thrown away.
        depth = min(self.max_depth, max(remaining) - 1)
        return Plan(depth, tuple(self.max_budget if left > 1 and depth > 0 else 0 for left in remaining))

    def observe(self, trace: StepTrace) -> None:
        """Nothing to adapt."""


class SkipPolicy(FixedPolicy):
    """Never draft: plain decoding."""

    def __init__(self) -> None:
        super().__init__(0, 0)


class AttentionPolicy(FixedPolicy):
    """ViSkip as the benchmark's paper has it, but decided before drafting: a row whose target looks at the image is
    not drafted for.

    The signal is the share of attention, mean over the heads of one layer, that the state which chose the root gave to
    image positions. It costs that layer's scores a second time.

    Args:
        depth, budget: of a round that is drafted.
        threshold: from this share on a row is skipped; 0.35 in the paper.
        layer: decoder layer, 0-based; -1 is the last, the paper's.

    Source: MMSpec (arXiv 2603.14989), ViSkip.
    """

    senses = True

    def __init__(self, depth: int, budget: int, threshold: float = 0.35, layer: int = -1) -> None:
        super().__init__(depth, budget)
        self.threshold, self.mass_layer = threshold, layer

    def sense(self, evidence: Evidence, rows: Tensor) -> Tensor | None:
        return None if evidence.visual_mass is None else evidence.visual_mass.unsqueeze(1)

    def plan(self, sensed: Sequence[Sequence[float]], remaining: Sequence[int]) -> Plan:
        full = super().plan(sensed, remaining)
        budget = tuple(n if n and mass[0] < self.threshold else 0 for n, mass in zip(full.budget, sensed))
        return Plan(full.depth if any(budget) else 0, budget)


class AdaptivePolicy(FixedPolicy):
    """The node budget that has paid best of late, plain decoding among the candidates.

    For drafters that nobody trained a controller for. Budgets 0, 1, 2, 4, .. are arms of a bandit (`_Arms`). There is
    one for about each number of active rows (1, 2, 3 to 4, 5 to 8, ..): what pays for few rows need not for many. Idle
    rows are computed as well, so that few active rows of a large batch pay for all of it. Measured times stay out of
    it, so that one table always gives one sequence of plans.

    Args:
        costs: measured seconds.
        depth, budget: the largest plan.
    """

    def __init__(self, costs: Costs, depth: int, budget: int) -> None:
        super().__init__(depth, budget)
        self.costs = costs
        self.arms = sorted({0, *(2**i for i in range(budget.bit_length())), budget})
        self.rows = 1
        self._bandits: dict[tuple[int, int], _Arms] = {}
        self._known: dict[tuple[int, int, int], float] = {}

    def open(self, max_batch: int, device: torch.device, sampled: bool = False) -> None:
        self.rows = max_batch

    def _bandit(self, n_active: int) -> _Arms:
        """Of about so many active rows of the batch."""
        size = self.rows, (n_active - 1).bit_length()
        if size not in self._bandits:
            costs = [self._cost(1 + n, self.max_depth) for n in self.arms]
            self._bandits[size] = _Arms([min(n, self.max_depth) for n in self.arms], costs)
        return self._bandits[size]

    def _cost(self, nodes: int, depth: int) -> float:
        """A round by the table, in plain rounds of the batch."""
        cell = self.rows, nodes, depth if nodes > 1 else 0
        if cell not in self._known:
            drafting = self.costs.draft(self.rows, max(depth, 1)) if nodes > 1 else 0.0
            self._known[cell] = (self.costs.verify(self.rows, nodes) + drafting) / self.costs.verify(self.rows, 1)
        return self._known[cell]

    def plan(self, sensed: Sequence[Sequence[float]], remaining: Sequence[int]) -> Plan:
        full = super().plan(sensed, remaining)
        n_active = sum(n > 0 for n in remaining)
        budget = self.arms[self._bandit(n_active).choose(full.depth > 0)] if n_active else 0
        if not budget:
            return Plan(0, (0,) * len(remaining))
        return Plan(full.depth, tuple(min(n, budget) for n in full.budget))

    def observe(self, trace: StepTrace) -> None:
        n_active = sum(trace.active)
        cost = self._cost(trace.n_nodes, trace.plan.depth)
        self._bandit(n_active).learn(sum(trace.emitted) / n_active, cost)


class _Arms:
    """A bandit: the arm with the most tokens per cost is pulled, what its rounds emitted and cost kept as fading sums.

    Another one gets a round whenever all such rounds together have lost less than a two-hundredth of what was spent.

    Args:
        levels: tokens that an arm can have accepted.
        costs: of one of its rounds as expected, in any unit.
    """

    _MEMORY = 0.96
    """Weight that a round keeps with each further round of its arm."""
    _LOSS = 0.005
    """Share of the cost that looking at other arms may lose."""
    _PRIOR = 0.4
    """Chance that a draft token goes on being right, of an arm that was never pulled."""

    def __init__(self, levels: Sequence[int], costs: Sequence[float]) -> None:
        self.rounds = [2.0] * len(costs)
        self.tokens = [2 * sum(self._PRIOR**k for k in range(1 + n)) for n in levels]
        self.costs = [2 * cost for cost in costs]
        self.rates = [tokens / cost for tokens, cost in zip(self.tokens, self.costs)]
        self.best = max(range(len(self.rates)), key=self.rates.__getitem__)
        self.pulled_at = [0] * len(self.rates)
        self.turn, self.arm, self.spent, self.lost = 0, 0, 0.0, 0.0
        self._look_at = 0.0
        """Cost spent from which on another arm may be due."""

    def choose(self, may_draft: bool) -> int:
        """The next arm; the first one, plain decoding, where nothing can be drafted."""
        self.arm = self._choose() if may_draft else 0
        return self.arm

    def _choose(self) -> int:
        best = self.best
        if self.spent < self._look_at:
            return best
        rate = self.rates[best]
        losses = [(c - t / rate) / n for c, t, n in zip(self.costs, self.tokens, self.rounds)]
        others = [arm for arm in range(len(self.rates)) if arm != best]
        # Dear arms are looked at less often than cheap ones, in proportion.
        due = max(others, key=lambda arm: (self.turn + 1 - self.pulled_at[arm]) / max(losses[arm], 1e-12), default=best)
        self._look_at = (self.lost + losses[due]) / self._LOSS
        return due if self.spent >= self._look_at else best

    def learn(self, tokens: float, cost: float) -> None:
        """What the round of the arm just chosen emitted and cost."""
        arm = self.arm
        self.turn += 1
        self.pulled_at[arm] = self.turn
        self.spent += cost
        if arm != self.best:
            self.lost += cost - tokens / self.rates[self.best]
        for sums, new in ((self.rounds, 1.0), (self.tokens, tokens), (self.costs, cost)):
            sums[arm] = self._MEMORY * sums[arm] + new
        self.rates[arm] = self.tokens[arm] / self.costs[arm]
        self.best = max(range(len(self.rates)), key=self.rates.__getitem__)


class RecordingPolicy(FixedPolicy):
    """A fixed policy that keeps what a controller would have seen, and what came of the draft.

    Args:
        depth, budget: the largest that the controller shall be able to choose.
        embed: the target's token embedding.
        explore: share of the rounds that are of any depth, none included. A controller ends drafts early and skips
            some: rounds after those begin elsewhere, and remember other drafts, than rounds after full drafts do.
        seed: of the depths that are explored.
    """

    senses = True

    def __init__(
        self, depth: int, budget: int, embed: Callable[[Tensor], Tensor], explore: float = 0.0, seed: str = ""
    ) -> None:
        super().__init__(depth, budget)
        self.embed, self.explore, self._random = embed, explore, random.Random(seed)
        self._fresh: list[dict[str, Tensor]] = []
        """Evidence that is still on the device."""
        self._known: dict[int, tuple[dict[str, Tensor], int]] = {}
        """Of each row the latest evidence, and the row's place in it."""
        self._planned: dict[int, tuple[dict[str, Tensor], int]] = {}
        self._explored = False
        self._rounds: list[dict[str, Tensor]] = []

    def open(self, max_batch: int, device: torch.device, sampled: bool = False) -> None:
        self.history = History(max_batch, device)

    def sense(self, evidence: Evidence, rows: Tensor) -> Tensor | None:
        self._fresh.append(
            {
                "key": evidence.keys.clone(),  # the loop's own tensor changes when the row is given away
                "n_committed": evidence.n_committed,
                "last_hidden": evidence.last_hidden.float(),
                "root": evidence.roots,
                "root_embed": self.embed(evidence.roots).float(),
                "scalars": scalars(evidence, self.history.update(evidence, rows)),
                "reach": evidence.reach,
                "row": rows,
            }
        )
        return None

    def _settle(self) -> None:
        """Evidence to the host: once a round, not once a row, and while the loop has nothing under way."""
        for table in self._fresh:
            moved = {name: value.cpu() for name, value in table.items()}
            for place, row in enumerate(moved["row"].tolist()):
                self._known[row] = moved, place
        self._fresh = []

    def plan(self, sensed: Sequence[Sequence[float]], remaining: Sequence[int]) -> Plan:
        # By the time the outcome of this plan is observed, the evidence for the next one has been sensed already.
        self._settle()
        self._planned = dict(self._known)
        full = super().plan(sensed, remaining)
        self._explored = self._random.random() < self.explore
        if not self._explored:
            return full
        depth = self._random.randrange(full.depth + 1)
        return replace(full, depth=depth) if depth else Plan(0, (0,) * len(full.budget))

    def observe(self, trace: StepTrace) -> None:
        self._settle()
        for row, active in enumerate(trace.active):
            if active and trace.plan.budget[row]:
                (before, place), (after, now) = self._planned[row], self._known[row]
                # As deep as it was drafted, which may be less than what was planned; nothing at all says nothing.
                seen = {name: value[place] for name, value in before.items() if name != "row"}
                seen["reach"] = after["reach"][now]
                seen["accepted"] = torch.tensor(trace.accepted[row])
                seen["explored"] = torch.tensor(self._explored)
                if seen["reach"] > 0:
                    self._rounds.append(seen)

    def rounds(self) -> dict[str, Tensor]:
        """One entry a drafted round: key, n_committed, last_hidden [R, D], root, root_embed [R, D], scalars [R, K],
        accepted, reach, and whether its depth was explored (then reach is not what the drafter had to offer)."""
        if not self._rounds:
            return {}
        return {name: torch.stack([r[name] for r in self._rounds]) for name in self._rounds[0]}


class Costs(Protocol):
    """Seconds on this machine: of a verification with `nodes` per row, and of drafting `depth` levels."""

    def verify(self, batch: int, nodes: int) -> float: ...
    def draft(self, batch: int, depth: int) -> float: ...


class Controller(Protocol):
    """A trained survival model, ready to decode with: what needs the device in few operations, the rest on the host."""

    def at(self, sampled: bool) -> Calibration:
        """What its logits mean where tokens are drawn (`sampled`), or the best ones are taken."""

    def look(self, last_hidden: Tensor, roots: Tensor) -> list[Tensor]:
        """What it reads of the target, as columns [R, any]; none where it reads scalars alone."""

    def logits(self, seen: Sequence[Sequence[float]], scalars: Sequence[Sequence[float]]) -> list[list[float]]:
        """Of the chance of each level once the one before is accepted, [R, Dmax], before `at` is applied.

        Args:
            seen: [R, any], what `look`'s columns were.
            scalars: [R, len(SCALARS)], not standardised.
        """
