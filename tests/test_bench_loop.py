"""The loop's benchmark runs, compares equal outputs only, and writes every figure it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmspec.types import Output

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_loop.py"
sys.path.append(str(SCRIPT.parent))  # as for a script that is run by its path

import bench_loop  # noqa: E402


class Paced(bench_loop.Bench):
    """Passes of made-up seconds, the first of each kind far too slow; they are noted."""

    def __init__(self) -> None:
        self.args = SimpleNamespace(repeats=3)
        self.requests = [SimpleNamespace(prompt=None, max_new_tokens=4)]
        self.tree, self.head = bench_loop.TREE, object()
        self.bar = SimpleNamespace(update=lambda: None)
        self.order: list[tuple[int, str]] = []

    def run(self, drafter: Any, policy: Any, batch: int = 1, *_: Any, **__: Any) -> tuple[float, list[Output]]:
        kind = batch, "head" if drafter is self.head else "plain"
        self.order.append(kind)
        seconds = 100.0 if self.order.count(kind) == 1 else {"plain": 2.0, "head": 0.5}[kind[1]]
        return seconds, [Output("0", [1, 2, 3, 4], "length", 0.1, seconds, [])]


def test_batch_sizes_are_compared_by_repeats_that_take_turns():
    bench = Paced()
    rows = bench.by_batch()
    assert list(rows) == ["1", "2", "4", "8", "16"]
    for row in rows.values():
        assert row["plain"] == {"tokens_per_s": 2.0, "latency_p50_s": 2.0}
        assert row["head"] == {"tokens_per_s": 8.0, "latency_p50_s": 0.5}
        assert row["speedup"] == 4.0
    turns = [name for batch, name in bench.order if batch == 8]
    assert turns == ["plain", "head", "plain", "head", "head", "plain", "plain", "head"]


@pytest.mark.slow
def test_the_benchmark_writes_what_it_promises(tmp_path):
    out = tmp_path / "figures.json"
    words = ["--json", str(out), "--prompts", "3", "--max-new-tokens", "12", "--repeats", "1", "--device", "cpu"]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    for name in ("null_vs_generate", "ngram_vs_prompt_lookup", "loop_efficiency_b1", "loop_efficiency_b8"):
        assert 0 < figures[name] < 100
    assert figures["same_tokens_as_generate"] == figures["same_tokens_as_prompt_lookup"] == 1.0
    assert set(figures["oracle"]) == {"0.5", "0.7", "0.9", "1.0"}
    assert figures["measured_vs_model"] == min(r["measured"] / r["predicted"] for r in figures["oracle"].values())
    assert set(figures["by_batch"]) == {"1", "2", "4", "8", "16"}
    assert figures["by_batch"]["4"]["head"]["tokens_per_s"] > 0


@pytest.mark.slow
def test_wrong_numbers_are_refused_in_one_line():
    done = subprocess.run([sys.executable, str(SCRIPT), "--repeats", "0"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "bench_loop: error: --repeats must be at least 1, got 0"
