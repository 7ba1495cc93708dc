"""What policies are made of: the offered draft, measured costs, a controller; and the price that they go by."""

from __future__ import annotations

from dataclasses import dataclass

from mmspec.policy import Controller, Costs
from mmspec.types import InputError


@dataclass(frozen=True)
class Parts:
    """What a policy may decide by.

    Args:
        depth, budget: the largest plan that the drafter is offered: levels, and draft nodes a row.
        costs: seconds on this machine, measured with this drafter; None where nobody measured.
        controller: trained for this drafter; None where there is none.
        width: candidates of a level, and of each of them on the next; None where the drafter counts otherwise.
    """

    depth: int
    budget: int
    costs: Costs | None = None
    controller: Controller | None = None
    width: int | None = None

    def nodes(self, depth: int) -> int:
        """Draft nodes that a draft of `depth` levels has: its candidates, as far as the budget goes."""
        if self.width is None or not depth:
            return self.budget if depth else 0
        return min(self.budget, self.width + (depth - 1) * self.width**2)

    def measured(self, name: str) -> Costs:
        """The costs. Raises ValueError where a policy that needs them was made without."""
        if self.costs is None:
            raise ValueError(f"policy {name} needs measured costs")
        return self.costs

    def trained(self, name: str) -> Controller:
        """The controller. Raises InputError where there is none."""
        if self.controller is None:
            raise InputError(
                f"policy {name} needs a trained controller (viskip.safetensors); train one, or use another"
            )
        return self.controller


class Price:
    """g, the tokens that a second is worth: what has been achieved lately, by tokens accepted and seconds predicted.

    Tokens per second over a whole answer are maximised by choosing `argmax E(A) - g C(A)` in each round (renewal
    reward), not by the best ratio round by round. Predicted seconds, not measured ones, so that one cost table always
    gives one sequence of plans, whatever else the machine is doing. It is kept per row: a batch that runs empty has
    rounds that cost the same and bring fewer tokens, and at a full batch's price none of its drafts would pay.

    Args:
        tokens_per_s: of a row, to start from.
        rows: of the batch.
    """

    _MEMORY = 0.98
    _PRIOR_S = 0.2
    """Seconds that the start counts for."""

    def __init__(self, tokens_per_s: float, rows: int) -> None:
        self._tokens, self._seconds, self._rows = tokens_per_s * self._PRIOR_S, self._PRIOR_S, rows

    @property
    def per_s(self) -> float:
        """Tokens of all rows of the round at hand."""
        return self._rows * self._tokens / self._seconds

    def among(self, rows: int) -> None:
        """The round at hand has so many active rows."""
        self._rows = rows

    def add(self, tokens: float, seconds: float) -> None:
        """Take in the round at hand."""
        self._tokens = self._MEMORY * self._tokens + tokens / self._rows
        self._seconds = self._MEMORY * self._seconds + seconds


class Probing:
    """When to try what does not seem to pay: as long as all such tries together lose little.

    Args:
        share: of the time that trying may lose.
        late_s: seconds that a try takes beyond those that are predicted of its draft. After rounds without one the
            drafter first reads what they committed, which is a pass more at least.
    """

    def __init__(self, share: float, late_s: float) -> None:
        self.share, self.late_s = share, late_s
        self.spent_s = self.lost_s = 0.0

    def due(self, loss_s: float) -> bool:
        """Whether a try that is expected to lose `loss_s` fits."""
        return self.lost_s + max(loss_s, 0.0) + self.late_s <= self.share * self.spent_s

    def add(self, seconds: float, lost_s: float | None = None) -> None:
        """Take in a round, and what it lost where it was a try."""
        self.spent_s += seconds
        if lost_s is not None:
            self.lost_s += max(lost_s, 0.0) + self.late_s
