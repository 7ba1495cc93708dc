"""From measurements to an answer: ratios with paired bootstrap intervals, and what a claim about them comes to.

Invariant: a claim holds, does not hold, or cannot be decided here, and which one follows from the interval and from p
within its family (Holm) alone. A gain that is at most `MARGIN` is none, however sure it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmspec import metrics

HOLDS, FAILS, OPEN = "holds", "does not hold", "not decidable here"
MARGIN = 0.02
"""A ratio whose whole interval lies below 1 + MARGIN is no gain to speak of."""
LEVEL = 0.05
RESAMPLES = 4000
LEAST = 6
"""Clusters that an interval needs: of fewer, draws are too few and too alike."""

Rows = NDArray[np.float64]
Figure = Callable[[Rows], float]
"""From [M, K] rows, a unit each, to a ratio that is 1 where nothing is gained."""


@dataclass(frozen=True)
class Compared:
    """One comparison.

    Args:
        what: is compared with what.
        value, lo, hi: the ratio and its 95% interval; above 1 speaks for the claim.
        p: two-sided, of "it is 1".
        p_holm: the same within the family.
    """

    what: str
    value: float
    lo: float
    hi: float
    p: float
    p_holm: float = math.nan

    @property
    def answer(self) -> str:
        """What it says of "the ratio is above 1"."""
        if math.isnan(self.p_holm):
            return OPEN
        if self.hi < 1 + MARGIN:
            return FAILS
        return HOLDS if self.value > 1 and self.p_holm < LEVEL else OPEN


@dataclass(frozen=True)
class Claim:
    """A sentence and the family of tests it stands on.

    Args:
        says: the sentence; its first test decides.
        measured: what the ratio is.
        tests: of one family, adjusted together (`family`).
        valid: whether what was measured may be used: all answers were plain decoding's.
    """

    says: str
    measured: str
    tests: tuple[Compared, ...]
    valid: bool = True

    @property
    def answer(self) -> str:
        """Of the first test; a run whose answers differ decides nothing."""
        return self.tests[0].answer if self.tests and self.valid else OPEN

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the answers."""
        tests = [{**asdict(test), "answer": test.answer if self.valid else OPEN} for test in self.tests]
        return {"claim": self.says, "measured": self.measured, "answer": self.answer, "tests": tests}


def estimate(what: str, rows: Rows, clusters: Sequence[Hashable], figure: Figure, seed: int = 0) -> Compared:
    """A ratio with its interval and p, by the paired bootstrap of `metrics.speedup`: whole clusters are drawn, and what
    was measured on one unit stays together.

    Args:
        what: is compared.
        rows: [N, K], what was measured on each unit.
        clusters: what each unit belongs to.
        figure: of the rows; may be NaN.
        seed: of the resampling.

    Returns:
        The test, not adjusted; its ends and p are NaN with fewer than `LEAST` clusters.

    Raises:
        ValueError: rows and clusters differ in number.
    """
    if len(rows) != len(clusters):
        raise ValueError(f"unpaired units: {len(rows)} rows, {len(clusters)} clusters")
    value = figure(rows) if len(rows) else math.nan
    members: dict[Hashable, list[int]] = {}
    for place, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(place)
    if len(members) < LEAST or math.isnan(value):
        return Compared(what, value, math.nan, math.nan, math.nan)
    in_order = np.array([place for mine in members.values() for place in mine])
    sizes = np.array([len(mine) for mine in members.values()])
    starts = sizes.cumsum() - sizes
    drawn = np.random.default_rng(seed).integers(len(sizes), size=(RESAMPLES, len(sizes)))
    ratios = np.array([figure(rows[in_order[_expand(starts[draw], sizes[draw])]]) for draw in drawn])
    ratios = ratios[~np.isnan(ratios)]
    if not len(ratios):
        return Compared(what, value, math.nan, math.nan, math.nan)
    lo, hi = np.quantile(ratios, [0.025, 0.975])
    fewer = min(int((ratios <= 1).sum()), int((ratios >= 1).sum()))
    return Compared(what, value, float(lo), float(hi), min(1.0, 2 * (1 + fewer) / (1 + len(ratios))))


def _expand(starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """start, start + 1, .. of each stretch, one after another."""
    places: NDArray[np.int64] = np.repeat(starts - (sizes.cumsum() - sizes), sizes) + np.arange(
        int(sizes.sum()), dtype=np.int64
    )
    return places


def family(tests: Sequence[Compared]) -> tuple[Compared, ...]:
    """The tests with p adjusted for each other."""
    return tuple(replace(test, p_holm=p) for test, p in zip(tests, metrics.holm([test.p for test in tests])))


# ---- figures ----


def totals(rows: Rows) -> float:
    """Column 0 over column 1, summed: seconds of the slow over seconds of the fast."""
    return _over(rows[:, 0].sum(), rows[:, 1].sum())


def growth(rows: Rows) -> float:
    """The ratio of totals of columns 0 and 1, over that of columns 2 and 3."""
    a, b, c, d = rows[:, :4].sum(0)
    return _over(_over(a, b), _over(c, d))


def typical(rows: Rows) -> float:
    """The geometric mean of the units' own ratios of column 0 over column 1."""
    if not (rows[:, :2] > 0).all():
        return math.nan
    return float(np.exp(np.log(rows[:, 0] / rows[:, 1]).mean()))


def at(percent: float) -> Figure:
    """The percentile of column 0 over that of column 1."""
    return lambda rows: _over(*np.percentile(rows[:, :2], percent, axis=0))


def over(first: Figure, second: Figure) -> Figure:
    """One figure over another, of the same rows."""
    return lambda rows: _over(first(rows), second(rows))


def _over(a: float, b: float) -> float:
    return float(a / b) if b > 0 else math.nan
