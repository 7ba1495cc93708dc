"""From the results of a run to `summary.json`, and to the table on the terminal.

Invariant: every figure comes from `mmspec.metrics`; a figure that cannot be computed is null in JSON, never 0.
"""

from __future__ import annotations

import math
import os
import platform
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from eval.bench import PHASES, Result
from eval.claims import Units, claims, divergences
from eval.references import References
from eval.tasks import PLAIN
from mmspec import metrics
from mmspec.costs import cpu_model

SCHEMA = "mmspec-summary/2"
OVERALL = "overall"

DEFINITIONS = {
    "mat": "tau: tokens kept after the prefill token / forwards of the target after the prefill; bonus tokens and "
    "skipped steps count, tokens after a stop do not",
    "mat_without_bonus": "mat - 1",
    "mat_untruncated": "mat with the last round of each answer counted whole",
    "speedup": "total seconds of plain decoding / total seconds of the method: same prompts, target, dtype and batch "
    "size, first prefill to last token; at batch size 1 the requests' latencies, above it the makespan of fixed groups",
    "speedup_lo": "lower end of its 95% bootstrap interval (paired, over images; at batch size > 1 over groups)",
    "speedup_hi": "upper end of the same interval",
    "decode_speedup": "the same of the seconds after the first token alone; above batch size 1 of the loop's seconds, "
    "which leave out prefills",
    "decode_speedup_lo": "lower end of its 95% bootstrap interval",
    "decode_speedup_hi": "upper end of the same interval",
    "speedup_geomean": "geometric mean of the units' own ratios (requests; above batch size 1 groups)",
    "throughput_ratio": "tokens_per_s of the method / of plain decoding; the speedup where both give the same tokens",
    "latency_p50_s": "median over requests of the seconds from the start of its prefill to its last token",
    "latency_p90_s": "90th percentile of the same",
    "latency_p99_s": "99th percentile of the same",
    "ttft_p50_s": "median seconds from the start of the prefill to the first token",
    "ttft_p90_s": "90th percentile of the same",
    "tokens_per_s": "kept tokens of all requests / total seconds of all groups",
    "exact_match": "share of requests whose tokens equal plain decoding's, or differ first at a tie; null for the "
    "rejection rule, which gives another text of the same distribution",
    "ties": "requests that differ first where the target's two best logits are closer than settings.tie_gap",
    "diverged": "requests that differ and are no tie; exact_match is 1 exactly when this is 0",
    "skip_rate": "rounds that drafted nothing / rounds",
    "accept_by_depth": "share of the drafting rounds that accepted at least 1, 2, ... draft tokens",
    "draft_efficiency": "accepted draft tokens / drafted nodes",
    "n_drafted": "draft nodes that the target verified",
    "n_accepted": "draft tokens accepted, bonus tokens excluded",
    "energy_j": "joules of the timed groups by the device's own counter, of the whole device; null where there is none",
    "energy_per_token_j": "energy_j / n_tokens",
    "peak_bytes": "most memory that PyTorch held on the GPU while decoding; null on a CPU",
    "task_score": "mean score of the answers that have a reference (synth: share of stated facts; GQA: the answer is "
    "said; TextVQA: soft accuracy; MMMU-Pro: the letter); lossless methods have plain decoding's",
    "n_scored": "answers that have one",
    "n_requests": "requests (turns) decoded",
    "n_tokens": "tokens kept",
    "seconds": "where the seconds of the loop went: draft, verify (target forward), commit, control (policy)",
}

OF_THE_RUN = {
    "macro": "mean over topics of the topics' figures, each topic counting alike",
    "valid": "the correctness gate: no method's answer differs from plain decoding's but at a tie (diverged is 0 or "
    "null everywhere); a run that is not valid has no speedups to report",
    "claims": "ratios of times with paired bootstrap intervals and two-sided p; p_holm is adjusted within its family",
    "divergences": "first tokens that differ from plain decoding's: how many answers, where, and the top-2 gap there",
}
MACRO = ("mat", "speedup", "decode_speedup", "exact_match")

TOP_LEVEL = tuple(name for name in DEFINITIONS if name != "seconds")


def figures(
    results: Sequence[Result],
    plain: Sequence[Result],
    batch_size: int,
    seed: int,
    references: References | None = None,
) -> dict[str, Any]:
    """All figures of one method over one set of requests.

    Args:
        results: of the method.
        plain: plain decoding's of the same requests in the same order.
        batch_size: decides whether requests or groups are the units of time.
        seed: of the bootstrap.
        references: by which answers are scored.

    Returns:
        Plain numbers by the names of `DEFINITIONS` (without `seconds`); NaN became None.
    """
    outputs = [result.output for result in results]
    latencies = [output.latency_s for output in outputs]
    units = Units.of(results, plain, batch_size)
    gain = metrics.speedup(units.plain_s, units.mine_s, units.clusters, seed=seed)
    decode_gain = metrics.speedup(units.plain_decode_s, units.mine_decode_s, units.clusters, seed=seed)
    compared = [result.match for result in results if result.match is not None]
    matches = compared if len(compared) == len(results) else None
    n_tokens = sum(len(output.tokens) for output in outputs)
    n_plain = sum(len(result.output.tokens) for result in plain)
    total_s, plain_s = sum(units.mine_s), sum(units.plain_s)
    rate = n_tokens / total_s if total_s > 0 else math.nan
    mat = metrics.mat(outputs)
    drafted = [(nodes, accepted) for output in outputs for _, nodes, accepted, _ in output.rounds]
    graded = [references.grade(result.id, result.turn, result.text) for result in results] if references else []
    scores = [score for score in graded if score is not None]
    energies = [group.energy_j for group in units.groups]
    energy_j = math.nan if None in energies else sum(energy for energy in energies if energy is not None)
    peaks = [group.peak_bytes for group in units.groups if group.peak_bytes is not None]
    return clean(
        {
            "mat": mat,
            "mat_without_bonus": mat - 1,
            "mat_untruncated": metrics.mat_untruncated(outputs),
            "speedup": gain.value,
            "speedup_lo": gain.lo,
            "speedup_hi": gain.hi,
            "decode_speedup": decode_gain.value,
            "decode_speedup_lo": decode_gain.lo,
            "decode_speedup_hi": decode_gain.hi,
            "speedup_geomean": metrics.geometric_mean(
                [a / b for a, b in zip(units.plain_s, units.mine_s) if a > 0 and b > 0]
            ),
            "throughput_ratio": rate * plain_s / n_plain if n_plain and plain_s > 0 else math.nan,
            "latency_p50_s": metrics.percentile(latencies, 50),
            "latency_p90_s": metrics.percentile(latencies, 90),
            "latency_p99_s": metrics.percentile(latencies, 99),
            "ttft_p50_s": metrics.percentile([output.ttft_s for output in outputs], 50),
            "ttft_p90_s": metrics.percentile([output.ttft_s for output in outputs], 90),
            "tokens_per_s": rate,
            "exact_match": None if matches is None else metrics.exact_match(matches),
            "ties": None if matches is None else sum(match.tie for match in matches),
            "diverged": None if matches is None else sum(not match.lossless for match in matches),
            "skip_rate": metrics.skip_rate(outputs),
            "accept_by_depth": metrics.acceptance_by_depth(outputs),
            "draft_efficiency": metrics.draft_efficiency(outputs),
            "n_drafted": sum(nodes for nodes, _ in drafted),
            "n_accepted": sum(accepted for _, accepted in drafted),
            "energy_j": energy_j,
            "energy_per_token_j": energy_j / n_tokens if n_tokens else math.nan,
            "peak_bytes": max(peaks, default=None),
            "task_score": metrics.mean(scores),
            "n_scored": len(scores),
            "n_requests": len(results),
            "n_tokens": n_tokens,
        }
    )


def summarise(
    results: Sequence[Result],
    names: Sequence[str],
    primary: str,
    batch_size: int,
    seed: int,
    references: References | None = None,
) -> dict[str, Any]:
    """`primary`, `methods` and the primary's overall figures, as `python -m eval.mmspec --help` describes them.

    Args:
        results: of all methods.
        names: the methods, plain decoding first.
        primary: the one whose figures are the run's.
        batch_size, seed: see `figures`.
        references: by which answers are scored; None: there are none.
    """
    methods: dict[str, Any] = {}
    topics = list(dict.fromkeys(result.topic for result in results))
    plain = [result for result in results if result.method == PLAIN]
    for name in names:
        mine = [result for result in results if result.method == name]
        by_topic = {
            topic: figures(
                [result for result in mine if result.topic == topic],
                [result for result in plain if result.topic == topic],
                batch_size,
                seed,
                references,
            )
            for topic in topics
        }
        overall = figures(mine, plain, batch_size, seed, references) | {"seconds": _seconds(mine)}
        macro = {key: _macro([row[key] for row in by_topic.values()]) for key in MACRO}
        methods[name] = {"overall": overall, "macro": clean(macro), "topics": by_topic}
    overall = methods[primary]["overall"]
    return {
        "schema": SCHEMA,
        "primary": primary,
        **{key: overall[key] for key in TOP_LEVEL},
        "valid": all(not method["overall"]["diverged"] for method in methods.values()),
        "methods": methods,
        "claims": clean(claims(results, names, primary, batch_size, seed)),
        "divergences": clean({name: divergences([r for r in results if r.method == name]) for name in names}),
    }


def _seconds(results: Sequence[Result]) -> dict[str, float]:
    """Where the loop's seconds went, summed over groups."""
    sums: dict[str, float] = dict.fromkeys(PHASES, 0.0)
    for group in {result.group: result for result in results}.values():
        for phase, seconds in group.phases_s.items():
            sums[phase] += seconds
    return sums


def _macro(values: Sequence[float | None]) -> float:
    return math.nan if None in values else metrics.mean([value for value in values if value is not None])


def clean(value: Any, digits: int | None = None) -> Any:
    """NaN and infinities become None, all the way down: JSON has neither.

    Args:
        digits: significant digits of every float that is kept; None leaves them as they are.
    """
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if digits is None else float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {key: clean(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item, digits) for item in value]
    return value


class Contention:
    """How much of the machine other processes used between `start` and `cores`; knows nothing outside Linux."""

    def __init__(self) -> None:
        self._start = self._read()

    def busy(self) -> tuple[float, float] | None:
        """Mean cores that all processes, and that this one kept busy, or None where the system does not tell."""
        if self._start is None or (now := self._read()) is None:
            return None
        wall_s, all_s, own_s = (b - a for a, b in zip(self._start, now))
        return (all_s / wall_s, own_s / wall_s) if wall_s > 0 else (0.0, 0.0)

    def cores(self) -> float | None:
        """Mean cores that other processes kept busy, or None where the system does not tell."""
        return others([self.busy()])

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Seconds: wall clock, busy cores of the whole system, this process."""
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        except OSError:
            return None
        # cpu user nice system idle iowait irq softirq steal: all but idle and iowait are busy.
        ticks = [int(value) for value in fields[1:9]]
        own = os.times()
        return time.perf_counter(), (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK"), own.user + own.system


def others(busy: Sequence[tuple[float, float] | None]) -> float | None:
    """Mean cores kept busy by none of the processes that say what they saw and used (`Contention.busy`)."""
    known = [entry for entry in busy if entry is not None]
    return max(0.0, known[0][0] - sum(own for _, own in known)) if known else None


def busiest(rows: Iterable[Mapping[str, Any]], size: int) -> float | None:
    """Mean cores that other processes kept busy in the worst sitting of a cell; None where the system does not tell.

    Args:
        rows: lines of the cell, each with its `sitting` and what its process had seen of that by then (`busy`).
        size: processes, which have the groups in turn.
    """
    sittings: dict[Any, dict[int, Any]] = {}
    for row in sorted(rows, key=lambda row: int(row["group"])):
        sittings.setdefault(row["sitting"], {})[row["group"] % size] = row["busy"]
    # Of one that ended before everybody had finished a group nothing is known: who had not would pass for others.
    whole = max(map(len, sittings.values()), default=0)
    seen = [others(list(found.values())) for found in sittings.values() if len(found) == whole]
    return max((cores for cores in seen if cores is not None), default=None)


def unreliable(others: float | None, threads: int) -> bool:
    """Whether other work must have slowed the run: it and this process's threads wanted more cores than there are."""
    return others is not None and others > 0.25 and others + threads > (os.cpu_count() or 1) + 0.25


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine in words that say how fast it is but not whose it is."""
    words: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "machine": platform.machine(),
        "device": device.type,
    }
    words["gpu"] = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return words


def versions() -> dict[str, str | None]:
    """What was running."""
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for package in ("torch", "transformers", "mmspec-toolkit"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def table(summary: Mapping[str, Any]) -> Table:
    """MAT, speedup with its interval and exact match of every method, by topic; fits 80 columns."""
    methods = summary["methods"]
    names = [name for name in methods if name != PLAIN]
    caption = None if summary.get("valid", True) else "INVALID: answers differ from plain decoding's, not at ties"
    grid = Table(box=SIMPLE_HEAD, pad_edge=False, caption=caption, caption_style="bold red")
    # A narrow terminal folds names and never cuts a figure.
    for heading in ("topic", "method"):
        grid.add_column(heading, overflow="fold")
    for heading in ("n", "MAT", "speedup [95%]", "exact"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for topic in [*methods[PLAIN]["topics"], OVERALL]:
        for name in names:
            row = methods[name]["overall"] if topic == OVERALL else methods[name]["topics"][topic]
            cells = [number(row["mat"]), interval(row), number(row["exact_match"], 3)]
            label = topic if name == names[0] else ""
            grid.add_row(label, name, str(row["n_requests"]), *cells, style="bold" if topic == OVERALL else None)
    return grid


def show(summary: Mapping[str, Any], console: Console) -> None:
    """The table of every cell of a run on the terminal."""
    cells = summary.get("cells", [summary])
    for cell in cells:
        if len(cells) > 1:
            console.print(f"batch size {cell['batch_size']}, temperature {cell['temperature']:g}", style="bold")
        console.print(table(cell))


def number(value: float | None, digits: int = 2) -> str:
    """A figure in words; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def warmth(temperature: float) -> str:
    """A temperature in words: `greedy`, `T = 0.7`."""
    return "greedy" if temperature == 0 else f"T = {temperature:g}"


def interval(row: Mapping[str, Any]) -> str:
    """Speedup as `2.41x [2.30, 2.52]`."""
    if row["speedup"] is None:
        return "-"
    ends = "" if row["speedup_lo"] is None else f" [{row['speedup_lo']:.2f}, {row['speedup_hi']:.2f}]"
    return f"{row['speedup']:.2f}x{ends}"


def gained(cell: Mapping[str, Any]) -> str:
    """A gain in acceptance as `+0.031 [+0.010, +0.052]`; alone where it has no interval."""
    ends = "" if cell["gain_lo"] is None else f" [{cell['gain_lo']:+.3f}, {cell['gain_hi']:+.3f}]"
    return f"{cell['gain']:+.3f}{ends}"
