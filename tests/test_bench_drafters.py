"""The drafters' benchmark runs every method and writes every figure it promises; times are not tested."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from mmspec.methods import method_names

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_drafters.py"


def call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_benchmark_writes_what_it_promises(tmp_path):
    out = tmp_path / "figures.json"
    done = call("--json", str(out), "--rounds", "3", "--repeats", "1", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    for name in ("share_of_step", "growth_512_8192"):
        assert set(figures[name]) == set(method_names())
        assert all(isinstance(value, float) and 0 < value < math.inf for value in figures[name].values())
    for name in ("microseconds", "nodes", "accepted"):
        assert set(figures[name]) == set(method_names())
        assert all(set(by_length) == {"512", "4096", "8192"} for by_length in figures[name].values())
    assert figures["settings"]["rounds"] == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--rounds", "0"), "--rounds must be at least 1, got 0"),
        (("--method", "pdl"), "method 'pdl' is unknown; there are: "),
    ],
)
@pytest.mark.slow
def test_wrong_input_is_refused_in_one_line(words, said):
    done = call(*words)
    assert done.returncode == 2
    assert done.stderr.startswith("bench_drafters: error: " + said)
    assert done.stderr.count("\n") == 1
