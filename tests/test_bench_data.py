"""The data benchmark runs, writes every figure it promises, and memory does not follow the number of records."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_data.py"


def run(tmp_path: Path, **options: int) -> dict[str, float]:
    out = tmp_path / "figures.json"
    words = [sys.executable, str(SCRIPT), "--json", str(out), *(f"--{key}={value}" for key, value in options.items())]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures: dict[str, float] = json.loads(out.read_text())
    return figures


@pytest.mark.slow
def test_every_figure_is_written_and_the_loader_is_ahead(tmp_path: Path):
    figures = run(tmp_path, records=3000, fewer=1000, pictures=20, batches=5, batch=4, repeats=1)
    for name in ("read_records_per_s", "reread_records_per_s", "loader_records_per_s", "training_records_per_s"):
        assert figures[name] > 0
    assert figures["loader_vs_training"] > 5
    assert {"memory_growth_mb", "bytes_per_record", "mapped_growth_mb"} <= set(figures)


@pytest.mark.slow
def test_memory_is_flat_from_ten_to_a_hundred_thousand_records(tmp_path: Path):
    """Rows, weights, order and places of answers are less than 100 bytes; the records here have 600, decoded 3,000."""
    figures = run(tmp_path, records=100_000, fewer=10_000, pictures=100, batches=50, batch=8, repeats=1)
    assert figures["bytes_per_record"] < 150
    assert figures["loader_vs_training"] > 5


@pytest.mark.slow
def test_wrong_numbers_are_refused_in_one_line():
    words = [sys.executable, str(SCRIPT), "--fewer", "9", "--records", "9"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == "bench_data: error: --fewer must be less than --records=9, got 9"
