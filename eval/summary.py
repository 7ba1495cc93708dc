"""From the results of a run to `summary.json`, and to the table on the terminal.

Invariant: every figure comes from `mmspec.metrics`; a figure that cannot be computed is null in JSON, never 0.
"""

from __future__ import annotations

import math
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from eval.bench import PLAIN, Result
from mmspec import metrics

SCHEMA = "mmspec-summary/1"
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
    "latency_p50_s": "median over requests of the seconds from the start of its prefill to its last token",
    "latency_p90_s": "90th percentile of the same",
    "latency_p99_s": "99th percentile of the same",
    "ttft_p50_s": "median seconds from the start of the prefill to the first token",
    "tokens_per_s": "kept tokens of all requests / total seconds of all groups",
    "exact_match": "share of requests whose tokens equal plain decoding's, or differ first at a tie; null for the "
    "rejection rule, which gives another text of the same distribution",
    "ties": "requests that differ first where the target's two best logits are closer than settings.tie_gap",
    "diverged": "requests that differ and are no tie; exact_match is 1 exactly when this is 0",
    "skip_rate": "rounds that drafted nothing / rounds",
    "accept_by_depth": "share of the drafting rounds that accepted at least 1, 2, ... draft tokens",
    "draft_efficiency": "accepted draft tokens / drafted nodes",
    "n_requests": "requests (turns) decoded",
    "n_tokens": "tokens kept",
    "seconds": "where the seconds of the loop went: draft, verify (target forward), commit, control (policy)",
}

TOP_LEVEL = tuple(name for name in DEFINITIONS if name != "seconds")


def figures(results: Sequence[Result], plain: Sequence[Result], batch_size: int, seed: int) -> dict[str, Any]:
    """All figures of one method over one set of requests.

    Args:
        results: of the method.
        plain: plain decoding's of the same requests in the same order.
        batch_size: decides whether requests or groups are the units of time.
        seed: of the bootstrap.

    Returns:
        Plain numbers by the names of `DEFINITIONS` (without `seconds`); NaN became None.
    """
    outputs = [result.output for result in results]
    latencies = [output.latency_s for output in outputs]
    group_s = {result.group: result.group_s for result in results}
    plain_s = {result.group: result.group_s for result in plain}
    if batch_size == 1:
        images = {result.group: result.image for result in results}
        clusters: list[Any] = [images[group] for group in group_s]
    else:
        clusters = list(group_s)
    gain = metrics.speedup([plain_s[group] for group in group_s], list(group_s.values()), clusters, seed=seed)
    compared = [result.match for result in results if result.match is not None]
    matches = compared if len(compared) == len(results) else None
    n_tokens = sum(len(output.tokens) for output in outputs)
    total_s = sum(group_s.values())
    mat = metrics.mat(outputs)
    return clean(
        {
            "mat": mat,
            "mat_without_bonus": mat - 1,
            "mat_untruncated": metrics.mat_untruncated(outputs),
            "speedup": gain.value,
            "speedup_lo": gain.lo,
            "speedup_hi": gain.hi,
            "latency_p50_s": metrics.percentile(latencies, 50),
            "latency_p90_s": metrics.percentile(latencies, 90),
            "latency_p99_s": metrics.percentile(latencies, 99),
            "ttft_p50_s": metrics.percentile([output.ttft_s for output in outputs], 50),
            "tokens_per_s": n_tokens / total_s if total_s > 0 else math.nan,
            "exact_match": None if matches is None else metrics.exact_match(matches),
            "ties": None if matches is None else sum(match.tie for match in matches),
            "diverged": None if matches is None else sum(not match.lossless for match in matches),
            "skip_rate": metrics.skip_rate(outputs),
            "accept_by_depth": metrics.acceptance_by_depth(outputs),
            "draft_efficiency": metrics.draft_efficiency(outputs),
            "n_requests": len(results),
            "n_tokens": n_tokens,
        }
    )


def summarise(
    results: Sequence[Result], names: Sequence[str], primary: str, batch_size: int, seed: int
) -> dict[str, Any]:
    """`primary`, `methods` and the primary's overall figures, as `python -m eval.mmspec --help` describes them.

    Args:
        results: of all methods.
        names: the methods, plain decoding first.
        primary: the one whose figures are the run's.
        batch_size, seed: see `figures`.
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
            )
            for topic in topics
        }
        methods[name] = {"overall": figures(mine, plain, batch_size, seed), "topics": by_topic}
    overall = methods[primary]["overall"]
    return {"schema": SCHEMA, "primary": primary, **{key: overall[key] for key in TOP_LEVEL}, "methods": methods}


def clean(value: Any) -> Any:
    """NaN and infinities become None, all the way down: JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return value


class Contention:
    """How much of the machine other processes used between `start` and `cores`; knows nothing outside Linux."""

    def __init__(self) -> None:
        self._start = self._read()

    def cores(self) -> float | None:
        """Mean cores that other processes kept busy, or None where the system does not tell."""
        if self._start is None or (now := self._read()) is None:
            return None
        wall_s, all_s, own_s = (b - a for a, b in zip(self._start, now))
        return max(0.0, all_s - own_s) / wall_s if wall_s > 0 else 0.0

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


def unreliable(others: float | None, threads: int) -> bool:
    """Whether other work must have slowed the run: it and this process's threads wanted more cores than there are."""
    return others is not None and others > 0.25 and others + threads > (os.cpu_count() or 1) + 0.25


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine in words that say how fast it is but not whose it is."""
    words: dict[str, Any] = {
        "cpu": _cpu_model(),
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
    grid = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("topic", "method", "n", "MAT", "speedup [95%]", "exact"):
        grid.add_column(heading, justify="left" if heading in ("topic", "method") else "right", no_wrap=True)
    for topic in [*methods[PLAIN]["topics"], OVERALL]:
        for name in names:
            row = methods[name]["overall"] if topic == OVERALL else methods[name]["topics"][topic]
            cells = [number(row["mat"]), interval(row), number(row["exact_match"], 3)]
            label = topic if name == names[0] else ""
            grid.add_row(label, name, str(row["n_requests"]), *cells, style="bold" if topic == OVERALL else None)
    return grid


def number(value: float | None, digits: int = 2) -> str:
    """A figure in words; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def interval(row: Mapping[str, Any]) -> str:
    """Speedup as `2.41x [2.30, 2.52]`."""
    if row["speedup"] is None:
        return "-"
    ends = "" if row["speedup_lo"] is None else f" [{row['speedup_lo']:.2f}, {row['speedup_hi']:.2f}]"
    return f"{row['speedup']:.2f}x{ends}"


def _cpu_model() -> str:
    """The processor's marketing name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
