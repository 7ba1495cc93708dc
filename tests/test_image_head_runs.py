"""Real runs of MSD and ViSpec on data of which only a part has pictures: one loss curve, a resumed run, text first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmspec import checkpoint
from mmspec.types import InputError
from tests import tiny
from tests.training import distill, losses, record, save_data, save_recipe, save_target

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


def run(base: Path, kind: str, name: str, procs: int, *more: str) -> Path:
    words = [HEADS[kind], "loss.steps=3", "policy.kind=fixed", "run.trackers=[]", f"run.name={kind}_{name}"]
    words += [f"data.answers_dir={base / 'answers'}", *more]
    done = distill(procs, base / "r.yaml", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return base / "out" / f"{kind}_{name}"


def same_curve(a: Path, b: Path) -> None:
    first, second = losses(a), losses(b)
    assert list(first) == list(second) == list(range(1, STEPS + 1))
    for step in first:
        assert first[step] == pytest.approx(second[step], abs=1e-3), step


@both
def test_a_run_leaves_a_checkpoint_of_its_target_alone_and_can_be_split_and_resumed(base: Path, kind: str):
    whole = run(base, kind, "whole", 0, "optim.micro_batch=4")
    loaded = checkpoint.load(whole)
    assert loaded.kind == kind
    assert loaded.head().config == loaded.config
    with pytest.raises(InputError, match="use its own target"):
        loaded.check_target(tiny.llava(dtype="float32", seed=3))
    # Micro-batches of one sample: half of them see no picture.
    accumulated = ("optim.micro_batch=1", "optim.accumulate=4")
    same_curve(whole, run(base, kind, "split", 0, *accumulated))
    constant = ("optim.micro_batch=4", "optim.schedule=constant")
    half = run(base, kind, "resumed", 0, *constant, f"run.max_steps={STEPS // 2}")
    run(base, kind, "resumed", 0, *constant, "run.resume=true")
    straight = run(base, kind, "straight", 0, *constant)
    expected, found = (load_file(str(folder / "head.safetensors")) for folder in (straight, half))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


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
