"""A finished evaluation as what the findings compare: the same requests by two methods, as rows of numbers.

Invariant: two methods are compared on requests that both answered with the same tokens, in one order; requests of one
image (at batch > 1 of one group, whose rows wait for each other) are one cluster.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eval import tables
from eval.bench import Result
from eval.claims import Units
from eval.evaluated import load
from eval.summary import OVERALL, clean, interval, number
from eval.tasks import PLAIN
from eval.verdicts import Claim, Compared, Rows
from mmspec.checkpoint import discreet
from mmspec.types import InputError

SLOW_S, FAST_S, SLOW_SHARE_S, FAST_SHARE_S, SLOW_TTFT_S, FAST_TTFT_S, SLOW_GROUP_S, FAST_GROUP_S, TOKENS = range(9)
"""Columns of `Run.requests`: latency, the request's part of its group's seconds, time to the first token, the group's
seconds, tokens of the answer."""


@dataclass(frozen=True)
class Found:
    """What came of an experiment.

    Args:
        finding: what the paper says.
        claims: the first decides.
        tables: by title, a line of headings and then the rows.
        charts: SVG documents by the end of their file's name.
        run: what it was read from.
        facts: further figures, for JSON.
    """

    finding: str
    claims: Sequence[Claim]
    tables: Mapping[str, Sequence[Sequence[str]]]
    charts: Mapping[str, str]
    run: Run
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One folder of eval.mmspec.

    Args:
        summary: its `summary.json`.
        cells: by batch size and method, results in the order of requests.
    """

    summary: Mapping[str, Any]
    cells: Mapping[int, Mapping[str, Sequence[Result]]]

    @staticmethod
    def of(folder: Path) -> Run:
        """Reads a finished run. Raises InputError as `eval.evaluated.load`."""
        found = load(folder)
        cells: dict[int, dict[str, list[Result]]] = {}
        for ((batch, _), method), results in found.by.items():
            cells.setdefault(batch, {}).setdefault(method, []).extend(results.values())
        return Run(found.summary, cells)

    @property
    def batches(self) -> list[int]:
        """Ascending."""
        return sorted(self.cells)

    @property
    def valid(self) -> bool:
        """The correctness gate of all cells."""
        return bool(self.summary["valid"])

    @property
    def unreliable(self) -> bool:
        """Whether other work slowed a cell."""
        return any(cell["contention"]["unreliable"] for cell in self.summary["cells"])

    def methods(self) -> list[str]:
        """All but plain decoding."""
        return [name for name in self.summary["methods"] if name != PLAIN]

    def name(self, folder: str, policy: str = "fixed") -> str:
        """The method that a run folder's head is under a policy. Raises InputError when it was not scored."""
        wanted = {"viskip": "learned"}.get(policy, policy)
        for name, how in self.summary["settings"]["methods"].items():
            if how.get("checkpoint") == Path(folder).resolve().name and how["policy"] == wanted and "tree" not in how:
                return str(name)
        raise InputError(f"{discreet(folder)} was not scored with the policy {policy}")

    def figures(self, batch: int, method: str, topic: str = OVERALL) -> Mapping[str, Any]:
        """Those of the summary."""
        cell = next(one for one in self.summary["cells"] if one["batch_size"] == batch)
        mine: Mapping[str, Any] = cell["methods"][method]
        found: Mapping[str, Any] = mine["overall"] if topic == OVERALL else mine["topics"][topic]
        return found

    def topics(self) -> list[str]:
        """In the order of the data."""
        return list(self.summary["methods"][PLAIN]["topics"])

    def seconds(self, batch: int, slow: str, fast: str, topic: str = OVERALL) -> tuple[Rows, list[Hashable]]:
        """[N, 2] seconds of the units of time (`Units`), and their clusters."""
        a, b = self.paired(batch, slow, fast, topic)
        units = Units.of(b, a, batch)
        return _rows([units.plain_s, units.mine_s]), list(units.clusters)

    def rounds(self, batch: int, slow: str, fast: str, topic: str = OVERALL) -> tuple[Rows, list[Hashable]]:
        """[N, 2] forwards of the target that each request took after its prefill; needs no clock."""
        a, b = self.paired(batch, slow, fast, topic)
        return _rows([[len(one.output.rounds) for one in some] for some in (a, b)]), [one.image for one in a]

    def requests(self, batch: int, slow: str, fast: str) -> tuple[Rows, list[Hashable]]:
        """[N, 9] what each request took, by the columns above, and its cluster."""
        a, b = self.paired(batch, slow, fast)
        size: dict[int, int] = {}
        for one in a:
            size[one.group] = size.get(one.group, 0) + 1
        columns = [
            [one.output.latency_s for one in a], [one.output.latency_s for one in b],
            [one.group_s / size[one.group] for one in a], [one.group_s / size[one.group] for one in b],
            [one.output.ttft_s for one in a], [one.output.ttft_s for one in b],
            [one.group_s for one in a], [one.group_s for one in b],
            [float(len(one.output.tokens)) for one in a],
        ]  # fmt: skip
        return _rows(columns), [one.image if batch == 1 else one.group for one in a]

    def grown(self, batch: int, base: int, slow: str, fast: str) -> tuple[Rows, list[Hashable]]:
        """[C, 4] seconds of both at one batch size and at another, by the groups of the largest one.

        Groups are consecutive requests of one topic and turn, so that those of a size that divides the largest lie
        within its groups. One in which the two differ at either size is left out.
        """
        largest = {(one.id, one.turn): one.group for one in self.cells[max(self.batches)][slow]}
        sums: dict[int, list[float]] = {}
        differing: set[int] = set()
        for start, size in ((0, batch), (2, base)):
            pair = self.paired(size, slow, fast)
            alike = {(one.id, one.turn) for one in pair[0]}
            differing |= {group for request, group in largest.items() if request not in alike}
            for column, results in enumerate(pair, start):
                for one in {result.group: result for result in results}.values():
                    sums.setdefault(largest[one.id, one.turn], [0.0] * 4)[column] += one.group_s
        kept = [group for group in sums if group not in differing]
        return np.array([sums[group] for group in kept]).reshape(-1, 4), list(kept)

    def paired(self, batch: int, slow: str, fast: str, topic: str = OVERALL) -> tuple[list[Result], list[Result]]:
        """Results of both, request by request; what differs (at a tie) is left out with its group."""
        cell = self.cells[batch]
        other = {(one.id, one.turn): one for one in cell[fast]}
        pairs = [(one, other[one.id, one.turn]) for one in cell[slow] if topic in (OVERALL, one.topic)]
        differing = {a.group for a, b in pairs if a.output.tokens != b.output.tokens}
        kept = [(a, b) for a, b in pairs if a.group not in differing]
        return [a for a, _ in kept], [b for _, b in kept]


def speedup_table(run: Run, names: Mapping[str, str], batch: int) -> list[list[str]]:
    """Speedup over plain decoding and MAT, a line a method: overall, then by topic.

    Args:
        names: methods by what they are called in the table.
        batch: of the cell.
    """
    lines = [["", "MAT", "speedup [95%]", "exact_match", *run.topics()]]
    for label, method in names.items():
        whole = run.figures(batch, method)
        topics = [run.figures(batch, method, topic) for topic in run.topics()]
        cells = [f"{number(one['mat'])} / {number(one['speedup'])}" for one in topics]
        lines.append([label, number(whole["mat"]), interval(whole), number(whole["exact_match"], 3), *cells])
    return lines


def as_json(found: Found) -> dict[str, Any]:
    """All of it but charts, NaN as null."""
    value: dict[str, Any] = clean(
        {
            "finding": found.finding,
            "answer": found.claims[0].answer,
            "valid": found.run.valid,
            "unreliable": found.run.unreliable,
            "claims": [claim.as_dict() for claim in found.claims],
            "facts": found.facts,
        }
    )
    return value


def as_markdown(found: Found) -> str:
    """The finding, what it comes to, each claim with its tests, and the tables."""
    parts = [f"The paper: {found.finding} **On this target: {found.claims[0].answer}.**\n"]
    if not found.run.valid:
        parts.append("INVALID: answers differ from plain decoding's and not at ties, so nothing is decided.\n")
    if found.run.unreliable:
        parts.append("Other processes ran meanwhile: times are unreliable.\n")
    for claim in found.claims:
        parts.append(f"**{claim.says}: {claim.answer}.** {claim.measured}:\n")
        rows = [["", "ratio [95%]", "p (Holm)", "answer"]]
        for test in claim.tests:
            rows.append([test.what, span(test), shown(test.p_holm, 4), test.answer if claim.valid else claim.answer])
        parts.append(tables.markdown(rows[0], rows[1:]))
    for title, lines in found.tables.items():
        parts.append(f"**{title}**\n\n{tables.markdown(lines[0], lines[1:])}")
    return "\n".join(parts)


def span(test: Compared) -> str:
    """A ratio with its interval."""
    return f"{shown(test.value)} [{shown(test.lo)}, {shown(test.hi)}]"


def shown(value: float, digits: int = 3) -> str:
    """A figure in words; a dash for NaN."""
    return number(clean(float(value)), digits)


def _rows(columns: Sequence[Sequence[float]]) -> Rows:
    return np.array(columns, dtype=np.float64).T.reshape(-1, len(columns))
