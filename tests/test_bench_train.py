"""The training benchmark runs, its two sides compute one loss, and it writes every figure it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_train.py"
SMALL = {"length": 256, "hidden": 64, "inner": 128, "heads": 2, "vocab": 4000, "steps": 3, "conversations": 3}


@pytest.mark.slow
def test_the_benchmark_writes_what_it_promises(tmp_path):
    out = tmp_path / "figures.json"
    words = [sys.executable, str(SCRIPT), "--json", str(out), "--threads", "1", "--repeats", "1"]
    words += [f"--{name}={value}" for name, value in SMALL.items()]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert figures["tokens_per_s_vs_reference"] > 0
    assert 0 < figures["peak_memory_vs_reference"] < 1  # a step that holds all logits and scores takes more
    assert figures["loss_vs_reference"] < 1e-4  # fp32, after two steps from the same weights
    detail = figures["against_reference"]
    assert len(detail["rows"]) == 3
    assert detail["ours"]["peak_gb"] / detail["reference"]["peak_gb"] == figures["peak_memory_vs_reference"]


@pytest.mark.slow
def test_wrong_numbers_are_refused_in_one_line():
    done = subprocess.run([sys.executable, str(SCRIPT), "--heads", "3"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "bench_train: error: --hidden must be a multiple of twice --heads=3, got 512"
