"""Real runs of train/distill.py, launched and plain: one loss curve however the work is split, and clean ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from mmspec import checkpoint
from tests import families, tiny
from tests.training import (
    TIMEOUT_S,
    distill,
    end,
    environment,
    losses,
    record,
    save_data,
    save_recipe,
    save_target,
    start,
)

Launch = Callable[..., subprocess.Popen[str]]
STEPS = 12
LONG = 200
TOLERANCE = 1e-3
"""Sums in another order differ by 1e-6, a mean per rank instead of the global one by 1e-2."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with target, data, recipe, and the answers that all runs share."""
    folder = tmp_path_factory.mktemp("runs")
    save_target(folder / "target")
    records = [record(number, turns=1 + number % 2) for number in range(24)]
    data = save_data(folder, records)
    save_recipe(folder / "r.yaml", folder / "target", data, folder / "out", max_steps=STEPS)
    return folder


def words(base: Path, name: str, *more: str) -> list[str]:
    return [str(base / "r.yaml"), f"run.name={name}", f"data.answers_dir={base / 'answers'}", *more]


@pytest.fixture(scope="module")
def reference(base: Path) -> Path:
    """The whole command in one process, controller included: 1 x 4 at ZeRO 0."""
    done = distill(0, *words(base, "one", "policy.kind=learned", "optim.micro_batch=4"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "finished: " in done.stdout
    return base / "out" / "one"


def same_curve(a: Path, b: Path) -> None:
    first, second = losses(a), losses(b)
    assert list(first) == list(second) == list(range(1, len(first) + 1))
    for step in first:
        assert first[step] == pytest.approx(second[step], abs=TOLERANCE), step


def test_a_run_leaves_everything_that_is_promised(reference: Path):
    names = {path.name for path in reference.iterdir()}
    wanted = {"head.safetensors", "head.json", "viskip.safetensors", "viskip.json", "tree.json", "recipe.yaml"}
    assert wanted | {"provenance.json", "metrics.jsonl", "samples.jsonl"} <= names
    loaded = checkpoint.load(reference)
    loaded.check_target(tiny.llava(dtype="float32"))
    assert loaded.head() is not None
    assert loaded.controller() is not None
    for key in ("accept/tau_sim", "accept/pos_1", "accept/pos_2", "accept/tau", "accept/top1", "train/lr"):
        assert losses(reference, key), key
    assert losses(reference, "viskip/loss")
    assert max(losses(reference)) == STEPS


@pytest.mark.slow
def test_one_process_and_two_give_one_curve(base: Path, reference: Path):
    done = distill(2, *words(base, "two", "optim.micro_batch=2", "deepspeed.zero_stage=2"))
    assert done.returncode == 0, done.stderr[-3000:]
    same_curve(reference, base / "out" / "two")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("procs", "micro", "accumulate", "zero"),
    [(2, 2, 1, 0), (2, 2, 1, 1), (2, 2, 1, 3), (1, 4, 1, 3), (1, 2, 2, 0), (2, 1, 2, 1), (2, 1, 2, 2), (2, 1, 2, 3)],
)
def test_every_split_gives_one_curve(base: Path, reference: Path, procs: int, micro: int, accumulate: int, zero: int):
    name = f"p{procs}m{micro}a{accumulate}z{zero}"
    # Below its threshold ZeRO-3 leaves weights whole; this head would never be shared out.
    (base / "z3.json").write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    more = [f"optim.micro_batch={micro}", f"optim.accumulate={accumulate}", f"deepspeed.zero_stage={zero}"]
    # Recomputing needs gathered weights once more, in the backward pass.
    more += [f"deepspeed.config={base / 'z3.json'}", "loss.recompute=true"] if zero == 3 else []
    done = distill(procs, *words(base, name, *more))
    assert done.returncode == 0, done.stderr[-3000:]
    same_curve(reference, base / "out" / name)
    assert checkpoint.load(base / "out" / name).head() is not None


@pytest.mark.slow
@pytest.mark.parametrize(("procs", "micro", "pack"), [(0, 4, 1), (0, 4, 90), (2, 2, 1000)])
def test_packed_rows_give_the_curve_of_unpacked_ones(base: Path, reference: Path, procs: int, micro: int, pack: int):
    name = f"p{procs}m{micro}pack{pack}"
    done = distill(procs, *words(base, name, f"optim.micro_batch={micro}", f"data.pack={pack}"))
    assert done.returncode == 0, done.stderr[-3000:]
    same_curve(reference, base / "out" / name)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_head_has_the_curve_of_an_eager_one(base: Path, reference: Path):
    done = distill(0, *words(base, "compiled", "optim.micro_batch=4", "run.compile=true"))
    assert done.returncode == 0, done.stderr[-3000:]
    same_curve(reference, base / "out" / "compiled")


EAGLE3 = ("head.kind=eagle3", "head.draft_vocab_size=40", "loss.steps=4", "loss.chunk=8")
"""A vocabulary of its own, and more than one chunk of logits a step."""


@pytest.fixture(scope="module")
def eagle3(base: Path) -> Path:
    """A run of EAGLE-3's head in one process."""
    done = distill(0, *words(base, "eagle3", "optim.micro_batch=4", *EAGLE3))
    assert done.returncode == 0, done.stderr[-3000:]
    return base / "out" / "eagle3"


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_head_of_its_own_vocabulary_gives_one_curve_at_every_stage(base: Path, eagle3: Path, zero: int):
    """Its unembedding is trained, tapped states come from the teacher, and the ids are a buffer that no rank shards."""
    (base / "z3.json").write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    more = ["optim.micro_batch=2", f"deepspeed.zero_stage={zero}", *EAGLE3]
    name = f"eagle3z{zero}"
    done = distill(2, *words(base, name, *more, *([f"deepspeed.config={base / 'z3.json'}"] if zero == 3 else [])))
    assert done.returncode == 0, done.stderr[-3000:]
    same_curve(eagle3, base / "out" / name)
    first, second = (checkpoint.load(folder).head() for folder in (eagle3, base / "out" / name))
    assert torch.equal(first.get_buffer("draft_ids"), second.get_buffer("draft_ids"))
    assert losses(eagle3, "train/covered")


@pytest.fixture
def launch(base: Path) -> Iterator[Launch]:
    """Starts runs in the background, output in `<name>.log`; nothing of them outlives the test."""
    started: list[subprocess.Popen[str]] = []

    def run(procs: int, name: str, *more: str, **options: Any) -> subprocess.Popen[str]:
        with (base / f"{name}.log").open("a") as log:
            started.append(start(procs, *words(base, name, *more), stdout=log, stderr=log, **options))
        return started[-1]

    yield run
    for process in started:
        end(process)


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = TIMEOUT_S) -> None:
    """Until the file has content."""
    end = time.monotonic() + seconds
    while not (path.is_file() and path.stat().st_size):
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that train, two below the launcher's runner."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [p for p in children if any(word.startswith("--local_rank") for word in p.cmdline())]


@pytest.mark.slow
def test_sigterm_to_the_launcher_alone_saves_ends_all_and_resumes(base: Path, launch: Launch):
    more = (f"run.max_steps={LONG}", "optim.micro_batch=2", "deepspeed.zero_stage=1")
    process = launch(2, "stopped", *more)
    folder = base / "out" / "stopped"
    wait_for(folder / "metrics.jsonl", process)
    alive = [*workers(process), *psutil.Process(process.pid).children(recursive=True)]
    assert len(alive) >= 3
    process.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(alive, timeout=40)
    assert not left, f"still there: {left}"
    process.wait(timeout=10)
    said = (base / "stopped.log").read_text()
    assert said.count("the same command with run.resume=true goes on") == 1
    assert "Traceback" not in said
    reached = max(losses(folder))
    assert 0 < reached < LONG
    done = distill(2, *words(base, "stopped", *more, "run.resume=true"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resumed at head step {reached} of {LONG}" in done.stdout
    whole = distill(0, *words(base, "whole", f"run.max_steps={LONG}", "optim.micro_batch=4"))
    assert whole.returncode == 0, whole.stderr[-3000:]
    same_curve(base / "out" / "whole", folder)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_a_resumed_head_keeps_the_vocabulary_it_began_with(base: Path, launch: Launch, zero: int):
    name = f"kept{zero}"
    more = (f"run.max_steps={LONG}", "optim.micro_batch=2", f"deepspeed.zero_stage={zero}", *EAGLE3)
    folder = base / "out" / name
    process = launch(2, name, *more)
    wait_for(folder / "metrics.jsonl", process)
    alive = workers(process)
    process.send_signal(signal.SIGTERM)
    assert not psutil.wait_procs(alive, timeout=60)[1]
    process.wait(timeout=60)
    before = load_file(folder / "head.safetensors")["draft_ids"]
    assert before.tolist() != list(range(40))  # or chance could restore it
    done = distill(2, *words(base, name, *more, "run.resume=true"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed at head step" in done.stdout
    assert torch.equal(load_file(folder / "head.safetensors")["draft_ids"], before)
    assert list(losses(folder)) == list(range(1, LONG + 1))


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_ends_it_in_order(base: Path, launch: Launch, signum: signal.Signals):
    name = f"group{int(signum)}"
    more = ("run.max_steps=100000", "optim.micro_batch=2")
    process = launch(2, name, *more, env={**environment(), "WANDB_MODE": "offline"})
    wait_for(base / "out" / name / "metrics.jsonl", process)
    alive = workers(process)
    os.killpg(process.pid, signum)
    assert not psutil.wait_procs(alive, timeout=60)[1]
    said = (base / f"{name}.log").read_text()
    assert said.count("the same command with run.resume=true goes on") == 1
    assert list((base / "out" / name / "state" / "head").glob("step-*/manifest.json"))


@pytest.mark.slow
def test_a_stop_while_the_controller_trains_goes_on_there(base: Path, launch: Launch, reference: Path):
    more = ("policy.kind=learned", "optim.micro_batch=4", "policy.steps=1000", "policy.optim.schedule=constant")
    process = launch(0, "late", *more)
    folder = base / "out" / "late"
    while not (folder / "metrics.jsonl").is_file() or "viskip/loss" not in (folder / "metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert json.loads((folder / "state.json").read_text())["phase"] == "controller"
    done = distill(0, *words(base, "late", *more, "run.resume=true"))
    assert done.returncode == 0, done.stderr[-3000:]
    steps = list(losses(folder, "viskip/loss"))
    assert steps == list(range(STEPS + 1, STEPS + 1001))
    again = distill(0, *words(base, "late", *more, "run.resume=true"))
    assert again.returncode == 0
    assert "is finished" in again.stdout


@pytest.mark.slow
def test_wrong_input_through_the_launcher_is_one_line_and_code_2(base: Path):
    broken = save_data(base / "broken", [{"id": "a", "image": "0.png", "conversations": []}])
    done = distill(2, *words(base, "broken", f"data.train={broken}"))
    assert done.returncode == 2
    said = done.stdout + done.stderr
    assert said.count("distill: error: ") == 1
    assert "no usable record among the 1" in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in families.FAMILIES if f != "llava"])
def test_all_phases_run_on_every_target_family(family: str, tmp_path: Path):
    """Answers, head, rollout and controller of multi-turn records; nothing is quarantined, and what comes out loads."""
    target = families.build(family)
    (tmp_path / "target").mkdir()
    families.save(target, tmp_path / "target")
    data = save_data(tmp_path, [record(number, turns=1 + number % 2) for number in range(8)])
    recipe = save_recipe(tmp_path / "r.yaml", tmp_path / "target", data, tmp_path / "out")
    done = distill(0, recipe, "policy.kind=learned", "run.name=all")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "8 of 8 records used" in done.stdout
    assert list(losses(tmp_path / "out" / "all")) == [1, 2, 3, 4]
    loaded = checkpoint.load(str(tmp_path / "out" / "all"))
    assert loaded.target.fingerprint == target.fingerprint
