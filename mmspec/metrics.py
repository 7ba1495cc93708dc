"""What the numbers mean: pure functions from decoded outputs to figures, each defined once and used everywhere.

Invariant: a figure that cannot be computed (no rounds, no seconds, fewer than two clusters) is NaN, never 0 or 1.

A round is `(action, nodes, accepted, emitted)` as in `types.Output`: one active forward of one row after its prefill.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmspec.types import Output

CALIBRATION_BINS = 10
RESAMPLES = 4000
"""Of every bootstrap."""
LEVEL = 0.05
"""A claim holds where its p within its family (`holm`) is under this."""
TIE_GAP = 1e-4
"""Top-2 logit gap under which a divergence in fp32 is a tie: cached and full forward differ by 1e-5 in logits."""
TIE_GAPS = {"float64": 0.0, "float32": TIE_GAP, "float16": 2**-5, "bfloat16": 2**-2}
"""The same by dtype. In half precision two steps of the numbers between 16 and 32, which logits reach: a tree of tokens
and a single one are matrices of other shapes, and their logits differ by that much."""


@dataclass(frozen=True)
class Interval:
    """A point estimate with the ends of its 95% interval."""

    value: float
    lo: float
    hi: float


@dataclass(frozen=True)
class Match:
    """How a method's tokens compare with plain decoding's.

    Args:
        first_divergence: index of the first token that differs, None when the outputs are identical.
        tie: they differ, and there the target's two best logits were closer than the tolerance.
    """

    first_divergence: int | None
    tie: bool

    @property
    def identical(self) -> bool:
        """No token differs."""
        return self.first_divergence is None

    @property
    def lossless(self) -> bool:
        """Identical, or different only because of a tie."""
        return self.identical or self.tie


def mat(outputs: Sequence[Output]) -> float:
    """tau: kept tokens after the prefill token / active row-forwards of the target after prefill.

    Bonus tokens and skipped steps count, tokens after a stop do not. Without the bonus it is `mat - 1`.
    """
    n_rounds = sum(len(output.rounds) for output in outputs)
    n_kept = sum(len(output.tokens) - 1 for output in outputs if output.tokens)
    return n_kept / n_rounds if n_rounds else math.nan


def mat_untruncated(outputs: Sequence[Output]) -> float:
    """tau with the last round of every output counted whole: mean of accepted + 1, the drafter's own quality."""
    accepted = [round[2] for output in outputs for round in output.rounds]
    return 1 + sum(accepted) / len(accepted) if accepted else math.nan


def skip_rate(outputs: Sequence[Output]) -> float:
    """Rounds that drafted nothing / all rounds."""
    actions = [round[0] for output in outputs for round in output.rounds]
    return actions.count("skip") / len(actions) if actions else math.nan


def acceptance_by_depth(outputs: Sequence[Output]) -> list[float]:
    """Share of the drafting rounds that accepted at least k draft tokens, for k = 1, 2, ...

    These are joint prefix hits: 1 + their sum is `mat_untruncated` of the drafting rounds, and the ratio of neighbours
    is the conditional acceptance of one depth.

    Returns:
        One share a depth, up to the deepest that was ever accepted; [] when nothing was drafted.
    """
    accepted = [round[2] for output in outputs for round in output.rounds if round[0] == "draft"]
    deepest = max(accepted, default=0)
    return [sum(a >= k for a in accepted) / len(accepted) for k in range(1, deepest + 1)]


def draft_efficiency(outputs: Sequence[Output]) -> float:
    """Accepted draft tokens / drafted tree nodes."""
    rounds = [round for output in outputs for round in output.rounds]
    nodes = sum(round[1] for round in rounds)
    return sum(round[2] for round in rounds) / nodes if nodes else math.nan


def calibration(outcomes: Sequence[tuple[Sequence[float], int]]) -> list[dict[str, Any]]:
    """How far stated chances are from what came of the drafts, by depth.

    Args:
        outcomes: of each draft the chances of the levels that were observed, each once the one before is accepted, and
            how many levels were accepted.

    Returns:
        By depth: n observed, ece (expected calibration error, 10 bins of equal width), honest (the ece that chances
        which are exactly right would show on so few levels), brier, and the bins as [mean chance, share accepted, n].
    """
    deepest = max((len(chances) for chances, _ in outcomes), default=0)
    rows = []
    for level in range(deepest):
        bins, spread = [[0.0, 0.0, 0] for _ in range(CALIBRATION_BINS)], [0.0] * CALIBRATION_BINS
        brier, n = 0.0, 0
        for chances, accepted in outcomes:
            if level < len(chances):
                q, y = chances[level], float(accepted > level)
                number = min(int(q * CALIBRATION_BINS), CALIBRATION_BINS - 1)
                place = bins[number]
                spread[number] += q * (1 - q)
                place[0], place[1], place[2] = place[0] + q, place[1] + y, place[2] + 1
                brier, n = brier + (q - y) ** 2, n + 1
        full = [(p / m, y / m, m) for p, y, m in bins if m]
        ece = sum(abs(p - y) * m for p, y, m in full) / n
        # A bin's sum of misses is nearly normal then, with the variance of its levels.
        honest = sum(math.sqrt(2 / math.pi * variance) for variance in spread) / n
        facts = {"depth": level + 1, "n": n, "ece": ece, "honest": honest, "brier": brier / n}
        rows.append({**facts, "bins": [list(b) for b in full]})
    return rows


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100) with linear interpolation between order statistics."""
    if not values:
        return math.nan
    return float(torch.quantile(torch.tensor(values, dtype=torch.float64), q / 100))


def speedup(
    null_s: Sequence[float],
    method_s: Sequence[float],
    clusters: Sequence[Hashable],
    n_resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Total seconds of plain decoding / total seconds of the method, with a paired bootstrap interval.

    A resample draws whole clusters with replacement and keeps each unit's two times together: prompts about one image
    are alike, and so are the two times of one prompt.

    Args:
        null_s, method_s: seconds of the same units (a request; at batch > 1 a group) in the same order.
        clusters: what each unit belongs to: its image (at batch > 1 its group).
        n_resamples: bootstrap resamples; the interval is their 2.5th to 97.5th percentile.
        seed: of the resampling only.

    Returns:
        The ratio and its 95% interval; the ends are NaN with fewer than two clusters.

    Raises:
        ValueError: the three sequences differ in length.
    """
    return contrast((null_s, method_s), clusters, ratio, 1.0, n_resamples, seed)[0]


def ratio(totals: torch.Tensor) -> torch.Tensor:
    """The first of the totals [..., 2] by the second."""
    return totals[..., 0] / totals[..., 1]


def contrast(
    columns: Sequence[Sequence[float]],
    clusters: Sequence[Hashable],
    statistic: Callable[[torch.Tensor], torch.Tensor],
    neutral: float,
    n_resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Interval, float]:
    """A statistic of several totals of the same units, with the bootstrap of `speedup`: whole clusters are drawn.

    Args:
        columns: K sequences of figures of the units, in one order.
        clusters: what each unit belongs to.
        statistic: of totals [..., K] float64 the figure [...].
        neutral: its value where there is no difference.
        n_resamples, seed: see `speedup`.

    Returns:
        The figure with its interval, and the two-sided p of its being `neutral`; both as `judged` has them.

    Raises:
        ValueError: the sequences differ in length.
    """
    totals = _by_cluster(columns, clusters)
    drawn = draws(len(totals), n_resamples, seed)
    resampled = torch.stack([column[drawn].sum(1) for column in totals.T], -1)
    return judged(float(statistic(totals.sum(0))), statistic(resampled), len(totals), neutral)


def judged(value: float, resampled: torch.Tensor, n_clusters: int, neutral: float) -> tuple[Interval, float]:
    """A figure with its 95% interval, and its two-sided p: twice the share of `resampled` on the other side of
    `neutral`, with the observed figure counted among them, so that it is never 0.

    NaN throughout where the figure cannot be computed; interval and p are NaN with fewer than two clusters. Resamples
    of which the figure cannot be computed do not count.
    """
    if not math.isfinite(value):
        return Interval(math.nan, math.nan, math.nan), math.nan
    resampled = resampled[~resampled.isnan()]
    if n_clusters < 2 or not len(resampled):
        return Interval(value, math.nan, math.nan), math.nan
    ends = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64))
    fewer = min(int((resampled <= neutral).sum()), int((resampled >= neutral).sum()))
    return Interval(value, float(ends[0]), float(ends[1])), min(1.0, 2 * (1 + fewer) / (1 + len(resampled)))


def draws(n_clusters: int, n_resamples: int, seed: int) -> torch.Tensor:
    """[n_resamples, n_clusters] numbers of clusters drawn with replacement."""
    if not n_clusters:
        return torch.zeros((n_resamples, 0), dtype=torch.long)
    return torch.randint(n_clusters, (n_resamples, n_clusters), generator=torch.Generator().manual_seed(seed))


def mean_difference(
    first: torch.Tensor,
    second: torch.Tensor,
    clusters: Sequence[Hashable],
    n_resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Interval, float]:
    """Mean of `second - first` over the same units, with a bootstrap interval that draws whole clusters, and the
    two-sided p of "no difference".

    Args:
        first, second: [N] figures of the same units in the same order.
        clusters: what each unit belongs to: its image.
        n_resamples: bootstrap resamples.
        seed: of the resampling only.

    Returns:
        The interval, and p as in `judged`; ends and p are NaN with fewer than two clusters, all is NaN without units.
    """
    gain = (second - first).tolist()
    return contrast((gain, [1.0] * len(gain)), clusters, ratio, 0.0, n_resamples, seed)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being one of a family (Holm): those under 0.05 hold together with 95% confidence.

    A NaN was no test: it stays, and is not counted.
    """
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    adjusted, least = [math.nan] * len(p_values), 0.0
    for place, i in enumerate(order):
        least = max(least, min(1.0, (len(order) - place) * p_values[i]))
        adjusted[i] = least
    return adjusted


def break_even(speedups: Mapping[int, float | None]) -> int | None:
    """The largest batch size up to which a speedup (or the lower end of its interval) is above 1 at every size.

    Args:
        speedups: by batch size; None or NaN is not above 1.

    Returns:
        None where not even the smallest size is.
    """
    last = None
    for batch, gain in sorted(speedups.items()):
        if gain is None or not gain > 1:
            break
        last = batch
    return last


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean of positive numbers; NaN of none."""
    if not values or min(values) <= 0:
        return math.nan
    return math.exp(sum(map(math.log, values)) / len(values))


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean; NaN of none."""
    return sum(values) / len(values) if values else math.nan


def rank_correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """Spearman's: the correlation of the ranks of two [N], ties sharing their mean rank; NaN where one is constant."""
    ranks = torch.stack([_ranks(x), _ranks(y)])
    ranks = ranks - ranks.mean(1, keepdim=True)
    scale = float(ranks.norm(dim=1).prod())
    return float(ranks[0] @ ranks[1]) / scale if scale > 0 else math.nan


def auc(scores: torch.Tensor, positive: torch.Tensor) -> float:
    """Chance that a positive one of [N] has the higher score than one that is not, ties counting half; NaN where there
    is none of either kind."""
    n, m = int(positive.sum()), int((~positive).sum())
    return float(_ranks(scores)[positive].sum() - n * (n - 1) / 2) / (n * m) if n and m else math.nan


def _ranks(x: torch.Tensor) -> torch.Tensor:
    """Ranks from 0, [N] float64; equal ones share their mean."""
    _, place, counts = x.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0)
    mean: torch.Tensor = (ends - counts).double() + (counts.double() - 1) / 2
    return mean[place]


def _by_cluster(columns: Sequence[Sequence[float]], clusters: Sequence[Hashable]) -> torch.Tensor:
    """Figures of units summed by cluster, [C, K] float64."""
    if any(len(column) != len(clusters) for column in columns):
        lengths = ", ".join(str(len(column)) for column in columns)
        raise ValueError(f"unpaired units: {lengths} figures, {len(clusters)} clusters")
    index = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    rows = torch.tensor([index[name] for name in clusters], dtype=torch.long)
    values = torch.tensor([list(column) for column in columns], dtype=torch.float64).T.reshape(len(rows), len(columns))
    return torch.zeros((len(index), len(columns)), dtype=torch.float64).index_add(0, rows, values)


def first_divergence(tokens: Sequence[int], reference: Sequence[int]) -> int | None:
    """Index of the first token that differs (an output that ends early differs at its end), None when identical."""
    for i, (token, expected) in enumerate(zip(tokens, reference)):
        if token != expected:
            return i
    return None if len(tokens) == len(reference) else min(len(tokens), len(reference))


def compare(
    tokens: Sequence[int], reference: Sequence[int], gaps: Sequence[float] = (), tolerance: float = TIE_GAP
) -> Match:
    """Compare a method's output with plain decoding's.

    Args:
        tokens: the method's ids.
        reference: the plain run's ids.
        gaps: top-2 logit gap of the plain run at each of its tokens; without them no divergence is a tie.
        tolerance: gaps strictly under it are ties (fp32: `TIE_GAP`; fp64: 0, no exception).
    """
    at = first_divergence(tokens, reference)
    # An output that merely ends early is no tie: both chose the same tokens, one of them stopped.
    is_tie = at is not None and at < min(len(tokens), len(reference), len(gaps)) and gaps[at] < tolerance
    return Match(at, is_tie)


def exact_match(matches: Sequence[Match]) -> float:
    """Share of outputs that are identical to plain decoding's or diverge first at a tie."""
    return sum(match.lossless for match in matches) / len(matches) if matches else math.nan


def token_sources(output_rounds: Sequence[tuple[str, int, int, int]]) -> list[str]:
    """Where each generated token came from: "prefill", then per round "draft" (accepted), "bonus" or "skip"."""
    sources = ["prefill"]
    for action, _, accepted, emitted in output_rounds:
        if action == "skip":
            sources += ["skip"] * emitted
        else:
            sources += ["draft"] * min(accepted, emitted) + ["bonus"] * max(0, emitted - accepted)
    return sources
