"""What is claimed of a run: who is faster than whom, and where answers differ.

Invariant: two times are compared on the same units (requests; at batch > 1 groups), and claims that are made together
are held to the level of their family.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.bench import Result
from eval.tasks import PLAIN
from mmspec import metrics

N_DIVERGENCES = 50
"""Listed by name for each method."""


@dataclass(frozen=True)
class Units:
    """The units of time of a method and of plain decoding, in one order: requests, at batch > 1 groups.

    Args:
        groups: one result of each group of the method, which has the group's figures.
        clusters: what the bootstrap draws: images, at batch > 1 groups.
    """

    groups: list[Result]
    plain_s: list[float]
    mine_s: list[float]
    plain_decode_s: list[float]
    mine_decode_s: list[float]
    clusters: list[Any]

    @staticmethod
    def of(results: Sequence[Result], plain: Sequence[Result], batch_size: int) -> Units:
        mine, base = ({result.group: result for result in some} for some in (results, plain))
        groups, pairs = list(mine.values()), [base[number] for number in mine]
        clusters: list[Any] = [result.image for result in groups] if batch_size == 1 else list(mine)

        def decode_s(result: Result) -> float:
            output = result.output
            return output.latency_s - output.ttft_s if batch_size == 1 else sum(result.phases_s.values())

        return Units(
            groups,
            [result.group_s for result in pairs],
            [result.group_s for result in groups],
            list(map(decode_s, pairs)),
            list(map(decode_s, groups)),
            clusters,
        )


def claims(
    results: Sequence[Result], names: Sequence[str], primary: str, batch_size: int, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Two families of claims about time, each ratio with its interval, p and p after Holm within the family.

    `faster_than_plain`: every method against plain decoding. `primary_faster_than`: the primary against every other.
    """
    by_name = {name: [result for result in results if result.method == name] for name in names}

    def family(pairs: Sequence[tuple[str, str, str]]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for label, slow, fast in pairs:
            units = Units.of(by_name[fast], by_name[slow], batch_size)
            times = units.plain_s, units.mine_s
            gain, p = metrics.contrast(times, units.clusters, metrics.ratio, 1.0, seed=seed)
            rows.append({"method": label, "ratio": gain.value, "lo": gain.lo, "hi": gain.hi, "p": p})
        for row, adjusted in zip(rows, metrics.holm([row["p"] for row in rows])):
            row["p_holm"] = adjusted
        return rows

    drafting = [name for name in names if name != PLAIN]
    return {
        "faster_than_plain": family([(name, PLAIN, name) for name in drafting]),
        "primary_faster_than": family([(name, name, primary) for name in drafting if name != primary]),
    }


def divergences(results: Sequence[Result]) -> dict[str, Any] | None:
    """Where a method's answers first differ from plain decoding's, and how close the runner-up was there; None where
    all are identical or only their distribution is the same."""
    differ = [result for result in results if result.match is not None and not result.match.identical]
    if not differ:
        return None
    places = [float(result.match.first_divergence or 0) for result in differ if result.match is not None]
    gaps = [result.gap for result in differ if result.gap is not None]
    return {
        "count": len(differ),
        "share": len(differ) / len(results),
        "first_p50": metrics.percentile(places, 50),
        "gap_p50": metrics.percentile(gaps, 50),
        "gap_max": max(gaps, default=math.nan),
        "first": [
            {"id": result.id, "turn": result.turn, "at": result.match.first_divergence, "gap": result.gap,
             "tie": result.match.tie}
            for result in differ[:N_DIVERGENCES] if result.match is not None
        ],
    }  # fmt: skip
