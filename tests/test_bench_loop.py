"""The loop's benchmark runs, compares equal outputs only, and writes every figure it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_loop.py"


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
