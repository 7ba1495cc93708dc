"""Real runs of Medusa through train/distill.py: one loss curve however the work is split, and a stop that goes on."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmspec import checkpoint
from tests.training import distill, end, losses, record, save_data, save_recipe, save_target, start

STEPS = 8


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with target, data and recipe."""
    folder = tmp_path_factory.mktemp("medusa")
    save_target(folder / "target")
    data = save_data(folder, [record(number, turns=1 + number % 2) for number in range(16)])
    save_recipe(folder / "r.yaml", folder / "target", data, folder / "out", max_steps=STEPS)
    return folder


def words(base: Path, name: str, *more: str) -> list[str]:
    head = ["head={kind: medusa, n_ahead: 3, own_head: true}", "loss.steps=3", "run.trackers=[]"]
    return [str(base / "r.yaml"), *head, f"run.name={name}", f"data.answers_dir={base / 'answers'}", *more]


def run(base: Path, name: str, procs: int, *more: str) -> Path:
    done = distill(procs, *words(base, name, *more))
    assert done.returncode == 0, done.stderr[-3000:]
    return base / "out" / name


@pytest.fixture(scope="module")
def reference(base: Path, train_here: Callable[..., None]) -> Path:
    """One process, micro-batches of 4, controller included."""
    train_here(*words(base, "one", "optim.micro_batch=4", "policy.kind=learned"))
    return base / "out" / "one"


def same_curve(a: Path, b: Path) -> None:
    first, second = losses(a), losses(b)
    assert list(first) == list(second) == list(range(1, STEPS + 1))
    for step in first:
        assert first[step] == pytest.approx(second[step], abs=1e-3), step


def test_a_run_leaves_a_checkpoint(reference: Path):
    loaded = checkpoint.load(reference)
    assert (loaded.kind, loaded.config.n_ahead) == ("medusa", 3)
    assert loaded.controller() is not None
    assert losses(reference, "perf/tflops")


@pytest.mark.slow
def test_accumulated_micro_batches_give_the_curve_of_whole_ones(base: Path, reference: Path):
    same_curve(reference, run(base, "accumulated", 0, "optim.micro_batch=1", "optim.accumulate=4"))


@pytest.mark.slow
def test_a_stopped_run_ends_with_the_weights_of_a_whole_one(base: Path):
    more = ("run.max_steps=200", "optim.micro_batch=4")
    whole, folder = run(base, "whole", 0, *more), base / "out" / "stopped"
    process = start(0, *words(base, "stopped", *more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not ((folder / "metrics.jsonl").is_file() and losses(folder)):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    finally:
        end(process)
    assert 0 < max(losses(folder)) < 200
    run(base, "stopped", 0, *more, "run.resume=true")
    expected, found = (load_file(str(f / "head.safetensors")) for f in (whole, folder))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    curve = losses(whole)
    assert sum(curve[step] for step in range(191, 201)) < 0.97 * sum(curve[step] for step in range(1, 11))


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_every_stage_on_two_processes_gives_one_curve(base: Path, reference: Path, zero: int):
    """Unembeddings whose weights the loss asks for, and blocks that are called by themselves."""
    (base / "z3.json").write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    more = [f"deepspeed.config={base / 'z3.json'}"] if zero == 3 else []
    same_curve(reference, run(base, f"zero{zero}", 2, "optim.micro_batch=2", f"deepspeed.zero_stage={zero}", *more))
