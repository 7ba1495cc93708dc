"""What two methods differ by, each beside plain decoding of its own run: figures of both, the change, how sure it is.

Invariant: both sides answer the same requests in the same order, and seconds enter only as ratios to plain decoding's
seconds of the same run, so that a machine that was slower on one of the days changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eval.bench import Result
from eval.claims import Units
from mmspec import metrics

DEFINITIONS = {
    "mat": "MAT of both, and the second's minus the first's",
    "speedup": "each one's speedup over plain decoding of its own run, and the second's / the first's",
    "decode_speedup": "the same of the seconds after the first token (summary.json has the definitions)",
    "latency_p50": "median latency of a request / plain decoding's in the same run (smaller is faster), and the "
    "second's / the first's",
    "latency_p90": "the same of the 90th percentile",
}
FIGURES = tuple(DEFINITIONS)
TIMES = tuple(name for name in FIGURES if name != "mat")


@dataclass(frozen=True)
class Side:
    """A method and plain decoding of one run: one result each for the same requests, in the same order."""

    mine: list[Result]
    plain: list[Result]

    def of(self, topic: str) -> Side:
        """What of it is about one topic."""
        return Side(*([one for one in some if one.topic == topic] for some in (self.mine, self.plain)))


def contrast(first: Side, second: Side, batch_size: int, seed: int) -> dict[str, dict[str, Any]]:
    """By figure of `FIGURES`: `first`, `second`, `change`, its 95% interval `lo` and `hi`, and the two-sided `p`.

    Args:
        first, second: of the same requests in the same order.
        batch_size: decides whether requests or groups are the units of time, and images or groups are drawn.
        seed: of the bootstrap.
    """
    images = [result.image for result in first.mine]
    rounds = [_tokens_and_rounds(side.mine) for side in (first, second)]
    found = {"mat": _entry([column for pair in rounds for column in pair], images, _mat_change, 0.0, seed)}
    a, b = (Units.of(side.mine, side.plain, batch_size) for side in (first, second))
    times = {
        "speedup": (a.plain_s, a.mine_s, b.plain_s, b.mine_s),
        "decode_speedup": (a.plain_decode_s, a.mine_decode_s, b.plain_decode_s, b.mine_decode_s),
    }
    for name, columns in times.items():
        found[name] = _entry(columns, a.clusters, _ratio_of_ratios, 1.0, seed)
    drawn = images if batch_size == 1 else [result.group for result in first.mine]
    latencies = [[result.output.latency_s for result in some]
                 for side in (first, second) for some in (side.mine, side.plain)]  # fmt: skip
    for q in (50, 90):
        found[f"latency_p{q}"] = _percentiles(latencies, drawn, q, seed)
    return found


def _tokens_and_rounds(results: Sequence[Result]) -> tuple[list[float], list[float]]:
    """Kept tokens and target forwards after the prefill, of each request (`metrics.mat`)."""
    outputs = [result.output for result in results]
    return [float(max(len(o.tokens) - 1, 0)) for o in outputs], [float(len(o.rounds)) for o in outputs]


def _sides(totals: Tensor) -> tuple[Tensor, Tensor]:
    """Ratios of the first two and of the last two of four totals [..., 4]."""
    return metrics.ratio(totals[..., :2]), metrics.ratio(totals[..., 2:])


def _mat_change(totals: Tensor) -> Tensor:
    first, second = _sides(totals)
    return second - first


def _ratio_of_ratios(totals: Tensor) -> Tensor:
    first, second = _sides(totals)
    return second / first


def _entry(
    columns: Sequence[Sequence[float]], clusters: Sequence[Any], statistic: Callable[[Tensor], Tensor],
    neutral: float, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """A figure that is a ratio of totals."""
    change, p = metrics.contrast(columns, clusters, statistic, neutral, metrics.RESAMPLES, seed)
    totals = torch.tensor([math.fsum(column) for column in columns], dtype=torch.float64)
    first, second = map(float, _sides(totals))
    return {"first": first, "second": second, "change": change.value, "lo": change.lo, "hi": change.hi, "p": p}


def _percentiles(latencies: Sequence[Sequence[float]], clusters: Sequence[Any], q: float, seed: int) -> dict[str, Any]:
    """Percentiles of latencies over plain decoding's: of the first method, plain, the second method, plain."""
    index = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    drawn = metrics.draws(len(index), metrics.RESAMPLES, seed)
    times = torch.zeros((metrics.RESAMPLES, len(index)), dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    weights = times[:, [index[name] for name in clusters]]
    mine_a, plain_a, mine_b, plain_b = (torch.tensor(some, dtype=torch.float64) for some in latencies)
    first, second = (
        metrics.percentile(m.tolist(), q) / metrics.percentile(p.tolist(), q) if len(p) else math.nan
        for m, p in ((mine_a, plain_a), (mine_b, plain_b))
    )
    if len(clusters) and first > 0:
        a, pa, b, pb = (weighted_percentile(some, weights, q) for some in (mine_a, plain_a, mine_b, plain_b))
        change, p = metrics.judged(second / first, (b / pb) / (a / pa), len(index), 1.0)
    else:
        change, p = metrics.Interval(math.nan, math.nan, math.nan), math.nan
    return {"first": first, "second": second, "change": change.value, "lo": change.lo, "hi": change.hi, "p": p}


def weighted_percentile(values: Tensor, weights: Tensor, q: float) -> Tensor:
    """The percentile of each of many samples that hold each value a whole number of times.

    Args:
        values: [N].
        weights: [R, N] how often a sample holds each; no sample is empty.
        q: 0 to 100; interpolated between order statistics as `metrics.percentile` does.

    Returns:
        [R].
    """
    ordered, order = values.sort()
    below = weights[:, order].cumsum(1)
    place = (below[:, -1:] - 1) * (q / 100)
    low = place.floor()
    # The k-th of a sample (from 0) is the first value at which more than k have been counted.
    ends = [ordered[torch.searchsorted(below, k, right=True).clamp_max(len(ordered) - 1)] for k in (low, low + 1)]
    # Behind the last one there is nothing, and nothing of it is asked for.
    return (ends[0] + (place - low) * (ends[1] - ends[0])).squeeze(1)
