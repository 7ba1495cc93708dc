"""Real runs of MSD and ViSpec on data of which only a part has pictures: one loss curve, a resumed run, text first."""

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
from mmspec.types import InputError
from tests import tiny
from tests.training import distill, end, losses, record, save_data, save_recipe, save_target, start

STEPS = 6
HEADS = {"msd": "head={kind: msd}", "vispec": "head={kind: vispec, n_queries: 3}"}
both = pytest.mark.parametrize("kind", HEADS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with target, data and recipe: every other record is text alone."""
    folder = tmp_path_factory.mktemp("image-heads")
    save_target(folder / "target")
    records = [record(number, turns=1 + number % 2) for number in range(16)]
    for text in records[1::2]:
        del text["image"]
        text["conversations"][0]["value"] = text["conversations"][0]["value"].removeprefix("<image>\n")
    data = save_data(folder, records)
    save_recipe(folder / "r.yaml", folder / "target", data, folder / "out", max_steps=STEPS)
    return folder


def words(base: Path, kind: str, name: str, *more: str) -> list[str]:
    said = [HEADS[kind], "loss.steps=3", "policy.kind=fixed", "run.trackers=[]", f"run.name={kind}_{name}"]
    return [str(base / "r.yaml"), *said, f"data.answers_dir={base / 'answers'}", *more]


def run(base: Path, kind: str, name: str, procs: int, *more: str) -> Path:
    done = distill(procs, *words(base, kind, name, *more))
    assert done.returncode == 0, done.stderr[-3000:]
    return base / "out" / f"{kind}_{name}"


def same_curve(a: Path, b: Path) -> None:
    first, second = losses(a), losses(b)
    assert list(first) == list(second) == list(range(1, STEPS + 1))
    for step in first:
        assert first[step] == pytest.approx(second[step], abs=1e-3), step


@pytest.mark.parametrize("kind", ["msd", pytest.param("vispec", marks=pytest.mark.slow)])
def test_a_run_leaves_a_checkpoint_of_its_target_alone_and_can_be_split(
    base: Path, kind: str, train_here: Callable[..., None]
):
    train_here(*words(base, kind, "whole", "optim.micro_batch=4"))
    whole = base / "out" / f"{kind}_whole"
    loaded = checkpoint.load(whole)
    assert loaded.kind == kind
    assert loaded.head().config == loaded.config
    with pytest.raises(InputError, match="use its own target"):
        loaded.check_target(tiny.llava(dtype="float32", seed=3))
    # Micro-batches of one sample: half of them see no picture.
    train_here(*words(base, kind, "split", "optim.micro_batch=1", "optim.accumulate=4"))
    same_curve(whole, base / "out" / f"{kind}_split")


@both
@pytest.mark.slow
def test_a_stopped_run_ends_with_the_weights_of_a_whole_one(base: Path, kind: str):
    more = ("run.max_steps=200", "optim.micro_batch=4")
    whole, folder = run(base, kind, "unbroken", 0, *more), base / "out" / f"{kind}_stopped"
    process = start(0, *words(base, kind, "stopped", *more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not ((folder / "metrics.jsonl").is_file() and losses(folder)):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    finally:
        end(process)
    assert 0 < max(losses(folder)) < 200
    run(base, kind, "stopped", 0, *more, "run.resume=true")
    expected, found = (load_file(str(f / "head.safetensors")) for f in (whole, folder))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


@pytest.mark.slow
def test_text_comes_first_and_pictures_last(base: Path):
    """The image adaptor is what it was at the start until a step has a picture; the last step has nothing else."""
    more = ("optim.micro_batch=4", "data.text_first=0.8", f"run.max_steps={STEPS}", "run.save_every=1", "run.keep=9")
    folder = run(base, "vispec", "text_first", 0, *more)
    moved = load_file(str(folder / "head.safetensors"))["inject_image.weight"]
    assert moved.any()  # it starts as zeros
    short = run(base, "vispec", "text_alone", 0, *more[:1], "data.text_first=0.99", "run.max_steps=1")
    assert not load_file(str(short / "head.safetensors"))["inject_image.weight"].any()


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
@both
def test_every_stage_on_two_processes_gives_one_curve(base: Path, kind: str, zero: int):
    """With a rank whose micro-batch has no picture beside one whose micro-batch has one."""
    (base / "z3.json").write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    more = [f"deepspeed.config={base / 'z3.json'}"] if zero == 3 else []
    alone = run(base, kind, "one", 0, "optim.micro_batch=1", "optim.accumulate=4")
    split = ("optim.micro_batch=1", "optim.accumulate=2", f"deepspeed.zero_stage={zero}")
    same_curve(alone, run(base, kind, f"zero{zero}", 2, *split, *more))
