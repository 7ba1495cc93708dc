"""The second finding: what seeing is worth as the batch grows, in the head (against its blind twin) and in the policy.

Invariant: everything that is compared drafts with one tree in one run, and each batch size has a baseline of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from eval.findings_runs import Found, Run, shown, span
from eval.plots import Series, standalone, ticks
from eval.summary import interval
from eval.verdicts import Claim, Rows, estimate, family, growth, totals
from mmspec import metrics
from mmspec.types import InputError

FINDING = "vision awareness becomes increasingly important as the batch grows."
SEEING, BLIND = "seeing", "blind"
"""Roles."""


def found(run: Run, heads: Mapping[str, str], policies: Sequence[str], seed: int = 0) -> Found:
    """What came of it.

    Args:
        run: a sweep over batch sizes.
        heads: run folders by role.
        policies: `fixed` and what steers the seeing head besides.
        seed: of the bootstrap.
    """
    seeing, blind = run.name(heads[SEEING]), run.name(heads[BLIND])
    steered = {policy: run.name(heads[SEEING], policy) for policy in policies if policy != "fixed"}
    claims = [
        _grows(run, "What seeing is worth to a head grows with the batch", blind, seeing, seed),
        _worth(run, "A head that sees is faster than its blind twin", blind, seeing, seed),
    ]
    for policy, name in steered.items():
        claims.append(_grows(run, f"What {policy} is worth to the head grows with the batch", seeing, name, seed))
        claims.append(_worth(run, f"The head is faster under {policy} than with its fixed tree", seeing, name, seed))
    lines = lineup(run, heads, policies)
    even = {label: ahead(run, name) for label, name in lines.items()}
    twins = [test for test in claims[1].tests][::-1]
    clockless = [["batch", "seconds, blind over seeing [95%]", "forwards of the batch, blind over seeing"]]
    clockless += [
        [test.what.removeprefix("batch "), span(test), shown(totals(_forwards(run, batch, blind, seeing)[0]))]
        for test, batch in zip(twins, run.batches)
    ]
    return Found(
        FINDING,
        claims,
        {
            "Speedup over plain decoding of the same batch size [95%]": _speedups(run, lines, even),
            "What seeing is worth": clockless,
        },
        {
            "": standalone(
                "Speedup by batch size",
                [Series(label, f"m{k % 9}", _line(run, name)) for k, (label, name) in enumerate(lines.items())],
                "batch size", "speedup over plain decoding", [0.0, *map(float, run.batches)],
                ticks(max(y for name in lines.values() for _, y in _line(run, name))),
            ),
            "_worth": _worth_chart(run, {"a head that sees": (blind, seeing)} | {
                policy: (seeing, name) for policy, name in steered.items()
            }),
        },
        run,
        {"break_even": even},
    )  # fmt: skip


def lineup(run: Run, heads: Mapping[str, str], policies: Sequence[str]) -> dict[str, str]:
    """The methods of each role under each policy that it was scored with, by what they are called here."""
    found = {}
    for role, folder in heads.items():
        for policy in policies:
            with contextlib.suppress(InputError):
                found[f"{role}, {policy}"] = run.name(folder, policy)
    return found


def ahead(run: Run, method: str) -> int | None:
    """The batch size up to which drafting is surely ahead of plain decoding."""
    return metrics.break_even({batch: run.figures(batch, method)["speedup_lo"] for batch in run.batches})


def _grows(run: Run, says: str, slow: str, fast: str, seed: int) -> Claim:
    base, *more = run.batches
    tests = [
        estimate(f"batch {batch} over batch {base}", *run.grown(batch, base, slow, fast), growth, seed)
        for batch in reversed(more)
    ]
    return Claim(says, f"Gain in speed at a batch size over that at batch {base}", family(tests), run.valid)


def _worth(run: Run, says: str, slow: str, fast: str, seed: int) -> Claim:
    tests = [
        estimate(f"batch {batch}", *run.seconds(batch, slow, fast), totals, seed) for batch in reversed(run.batches)
    ]
    return Claim(says, "Seconds of the other over its own", family(tests), run.valid)


def _forwards(run: Run, batch: int, slow: str, fast: str) -> tuple[Rows, list[Hashable]]:
    """[G, 2] forwards of each group's batch: those of its longest row."""
    longest: dict[int, list[float]] = {}
    for column, results in enumerate(run.paired(batch, slow, fast)):
        for one in results:
            sums = longest.setdefault(one.group, [0.0, 0.0])
            sums[column] = max(sums[column], float(len(one.output.rounds)))
    return np.array(list(longest.values())).reshape(-1, 2), list(longest)


def _speedups(run: Run, names: Mapping[str, str], even: Mapping[str, int | None]) -> list[list[str]]:
    lines = [["", *(f"batch {batch}" for batch in run.batches), "ahead up to batch"]]
    for label, name in names.items():
        cells = [interval(run.figures(batch, name)) for batch in run.batches]
        lines.append([label, *cells, str(even[label] or "-")])
    return lines


def _line(run: Run, name: str) -> list[tuple[float, float]]:
    found = [(float(batch), run.figures(batch, name)["speedup"]) for batch in run.batches]
    return [(batch, value) for batch, value in found if value is not None]


def _worth_chart(run: Run, pairs: Mapping[str, tuple[str, str]]) -> str:
    """Gain in speed over the batch size, a line a pair."""
    lines = [
        Series(label, f"m{k % 9}", [(float(b), totals(run.seconds(b, slow, fast)[0])) for b in run.batches])
        for k, (label, (slow, fast)) in enumerate(pairs.items())
    ]
    top = max((y for line in lines for _, y in line.points), default=1.0)
    return standalone(
        "What seeing is worth, by batch size", lines, "batch size", "times as fast as without",
        [0.0, *map(float, run.batches)], ticks(top),
    )  # fmt: skip
