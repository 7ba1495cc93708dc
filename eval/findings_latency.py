"""The third finding: where the speedup of a throughput and that of a request's latency part, and why.

Invariant: both are of the same requests of the same run. Throughput counts seconds, so long answers weigh most; the
typical request (geometric mean of the requests' own ratios) counts each request alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from eval.findings_runs import (
    FAST_GROUP_S,
    FAST_S,
    FAST_SHARE_S,
    FAST_TTFT_S,
    SLOW_GROUP_S,
    SLOW_S,
    SLOW_SHARE_S,
    SLOW_TTFT_S,
    TOKENS,
    Found,
    Run,
    shown,
)
from eval.plots import Series, standalone, ticks
from eval.tasks import PLAIN
from eval.verdicts import Claim, Compared, Figure, Rows, at, estimate, family, growth, over, totals, typical
from mmspec import metrics

FINDING = "throughput speedup alone does not reliably reflect latency."
FIFTHS = 5


def columns(figure: Figure, *picked: int) -> Figure:
    """The figure of some columns."""
    return lambda rows: figure(rows[:, picked])


THROUGHPUT = columns(totals, SLOW_SHARE_S, FAST_SHARE_S)
TYPICAL = columns(typical, SLOW_S, FAST_S)
LATENCIES: Mapping[str, Figure] = {
    "throughput": THROUGHPUT,
    "typical request": TYPICAL,
    "latency p50": columns(at(50), SLOW_S, FAST_S),
    "latency p90": columns(at(90), SLOW_S, FAST_S),
    "first token": columns(totals, SLOW_TTFT_S, FAST_TTFT_S),
}
"""Speedups over plain decoding, of the rows of `Run.requests`."""


def found(run: Run, seed: int = 0) -> Found:
    """What came of it; the first method after plain decoding stands for all in the plots and decides the claims.

    Args:
        run: a sweep over batch sizes, the smallest of them 1.
        seed: of the bootstrap.
    """
    first, methods = run.batches[0], _leading(run)
    cells = [(batch, name) for batch in run.batches for name in methods]
    rows = {cell: run.requests(cell[0], PLAIN, cell[1]) for cell in cells}

    def tests(figure: Figure, batches: Sequence[int]) -> tuple[Compared, ...]:
        return family(
            [estimate(f"{name}, batch {b}", *rows[b, name], figure, seed) for b, name in cells if b in batches]
        )

    longer = family(
        [
            estimate(f"{name}, batch {first}", with_fifths(rows[first, name][0]), rows[first, name][1], by_length, seed)
            for name in methods
        ]
    )
    more = run.batches[1:]
    parts = over(THROUGHPUT, TYPICAL)
    claims = [
        Claim(
            "The throughput speedup of single requests says more than a typical request gets",
            "Throughput speedup over the typical request's", tests(parts, [first]), run.valid,
        ),
        Claim(
            "The longest answers gain more than the shortest",
            "Speedup of the fifth with the longest answers over that of the fifth with the shortest", longer, run.valid,
        ),
        Claim(
            "The first token comes sooner too", "Seconds to the first token of plain decoding over the method's",
            tests(LATENCIES["first token"], [first]), run.valid,
        ),
    ]  # fmt: skip
    if more:
        claims += [
            Claim(
                "In a batch the two part as well", "Throughput speedup of the batches over the typical request's",
                tests(parts, more), run.valid,
            ),
            Claim(
                "Drafting leaves more of a batch waiting for its last row",
                "Share of the rows' time that they decode in, plain decoding over the method",
                tests(columns(growth, SLOW_S, SLOW_GROUP_S, FAST_S, FAST_GROUP_S), more), run.valid,
            ),
        ]  # fmt: skip
    if len(methods) > 1:
        claims.append(Claim(
            "Whoever chooses by throughput chooses another method than by latency",
            "Latency of the method with the best throughput over the least there is",
            family([estimate(f"{what}, batch {b}", *_all(run, b, methods), chosen(q), seed)
                    for b in run.batches for what, q in (("p50", 50), ("p90", 90))]), run.valid,
        ))  # fmt: skip
    even = {
        name: {
            what: metrics.break_even({b: figure(rows[b, name][0]) for b in run.batches})
            for what, figure in LATENCIES.items()
        }
        for name in methods
    }
    share = long_share(rows[first, methods[0]][0])
    facts = {"break_even": even, "long_share": share}
    table = {
        "Speedups over plain decoding of the same batch size": [
            ["", "batch", *LATENCIES],
            *([name, str(b), *(shown(f(rows[b, name][0]), 2) for f in LATENCIES.values())] for b, name in cells),
        ],
        f"Ahead of plain decoding up to batch (the fifth with the longest answers has {share:.0%} of its seconds)": [
            ["", *LATENCIES], *([name, *(str(b or "-") for b in even[name].values())] for name in methods),
        ],
    }  # fmt: skip
    return Found(FINDING, claims, table, _charts(run, rows, methods), run, facts)


def _leading(run: Run) -> list[str]:
    """Methods, heads first: those that have weights stand in front of those that copy."""
    how = run.summary["settings"]["methods"]
    return sorted(run.methods(), key=lambda name: "checkpoint" not in how[name])


def with_fifths(rows: Rows) -> Rows:
    """The rows with one more column: which fifth by length of the answer, 0 the shortest; ties by order."""
    ranks = np.empty(len(rows))
    ranks[np.argsort(rows[:, TOKENS], kind="stable")] = np.arange(len(rows))
    return np.column_stack([rows, ranks * FIFTHS // max(len(rows), 1)])


def by_length(rows: Rows) -> float:
    """Speedup of the longest fifth over that of the shortest; the last column says which."""
    fifth = rows[:, -1]
    if not ((fifth == 0).any() and (fifth == FIFTHS - 1).any()):
        return float("nan")
    return over(lambda r: THROUGHPUT(r[r[:, -1] == FIFTHS - 1]), lambda r: THROUGHPUT(r[r[:, -1] == 0]))(rows)


def long_share(rows: Rows) -> float:
    """Share of plain decoding's seconds that the longest fifth has."""
    fifths = with_fifths(rows)
    return float(fifths[fifths[:, -1] == FIFTHS - 1, SLOW_SHARE_S].sum() / fifths[:, SLOW_SHARE_S].sum())


def chosen(percent: float) -> Figure:
    """Latency of the method with the best throughput over the least latency there is; 1 where it is the same method.

    Of rows [N, 2K]: latencies of K methods, and their parts of the groups' seconds.
    """

    def figure(rows: Rows) -> float:
        k = rows.shape[1] // 2
        latency = np.percentile(rows[:, :k], percent, axis=0)
        return float(latency[rows[:, k:].sum(0).argmin()] / latency.min())

    return figure


def _all(run: Run, batch: int, methods: Sequence[str]) -> tuple[Rows, list[Hashable]]:
    """[N, 2K] latencies and shares of all methods, and clusters; of groups that all answered as the first did."""
    pairs = [run.paired(batch, methods[0], name) for name in methods]
    groups = set.intersection(*({one.group for one in mine} for mine, _ in pairs))
    first = [one for one in pairs[0][0] if one.group in groups]
    size = Counter(one.group for one in first)
    by_method = [[one for one in mine if one.group in groups] for _, mine in pairs]
    latencies = [[one.output.latency_s for one in mine] for mine in by_method]
    shares = [[one.group_s / size[one.group] for one in mine] for mine in by_method]
    rows = np.array([*latencies, *shares]).T.reshape(-1, 2 * len(methods))
    return rows, [one.image if batch == 1 else one.group for one in first]


def _charts(
    run: Run, rows: Mapping[tuple[int, str], tuple[Rows, list[Hashable]]], methods: Sequence[str]
) -> dict[str, str]:
    """Speedups of the first method by batch size, and of all by length of the answer."""
    lines = [
        Series(what, f"m{k}", [(float(b), figure(rows[b, methods[0]][0])) for b in run.batches])
        for k, (what, figure) in enumerate(LATENCIES.items())
    ]
    lengths = []
    for k, name in enumerate(methods):
        fifths = with_fifths(rows[run.batches[0], name][0])
        parts = [fifths[fifths[:, -1] == fifth] for fifth in range(FIFTHS)]
        points = [(float(n), THROUGHPUT(part)) for n, part in enumerate(parts, start=1) if len(part)]
        lengths.append(Series(name, f"m{k % 9}", points))
    places = [0.0, *map(float, run.batches)]
    return {
        "": standalone(f"Speedups of {methods[0]} by batch size", lines, "batch size", "speedup over plain decoding",
                       places, _ticks(lines)),
        "_length": standalone("Speedup by length of the answer, batch 1", lengths, "fifth by length, 5 the longest",
                              "speedup over plain decoding", [float(n) for n in range(FIFTHS + 1)], _ticks(lengths)),
    }  # fmt: skip


def _ticks(lines: Sequence[Series]) -> list[float]:
    return ticks(max((y for line in lines for _, y in line.points if y == y), default=1.0))
