"""Real runs that are killed, split otherwise, spread over nodes or fed bad samples: one curve, equal weights."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from tests.test_train_runs import same_curve
from tests.training import (
    PYTHON,
    ROOT,
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
from train.world import free_port

pytestmark = pytest.mark.slow
Launch = Callable[..., "subprocess.Popen[str]"]
STEPS = 200
N_RECORDS = 24


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Target, data and recipe; all runs share the answers, and average the weights (which the curve does not see)."""
    folder = tmp_path_factory.mktemp("resume")
    save_target(folder / "target")
    data = save_data(folder, [record(number, turns=1 + number % 2) for number in range(N_RECORDS)])
    save_recipe(folder / "r.yaml", folder / "target", data, folder / "out", max_steps=STEPS, save_every=7)
    # Below its threshold ZeRO-3 leaves weights whole; this head would never be shared out.
    (folder / "z3.json").write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    return folder


def words(base: Path, name: str, *more: str) -> list[str]:
    shared = [f"data.answers_dir={base / 'answers'}", "optim.ema=0.99"]
    return [str(base / "r.yaml"), f"run.name={name}", *shared, *more]


SPLIT = ("optim.micro_batch=2", "deepspeed.zero_stage=2")


@pytest.fixture(scope="module")
def whole(base: Path) -> Path:
    """A run that nobody disturbs, on two processes."""
    done = distill(2, *words(base, "whole", *SPLIT))
    assert done.returncode == 0, done.stderr[-3000:]
    return base / "out" / "whole"


@pytest.fixture
def launch(base: Path) -> Iterator[Launch]:
    """Starts runs in the background, output in `<name>.log`; nothing of them outlives the test."""
    started: list[subprocess.Popen[str]] = []

    def run(procs: int, name: str, *more: str) -> subprocess.Popen[str]:
        with (base / f"{name}.log").open("a") as log:
            started.append(start(procs, *words(base, name, *more), stdout=log, stderr=log))
        return started[-1]

    yield run
    for process in started:
        end(process)


def until(process: subprocess.Popen[str], reached: Callable[[], Any]) -> None:
    """Waits, closely: what is looked for may last a millisecond."""
    late = time.monotonic() + TIMEOUT_S
    while not reached():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < late
        time.sleep(0.0005)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to launcher and workers at once."""
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    end(process)
    process.wait()
    assert not psutil.wait_procs(everyone, timeout=30)[1]


def logged(folder: Path) -> int:
    """Lines of the curve so far."""
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def writing(folder: Path, since: float) -> bool:
    """Whether a checkpoint is being written that was begun after a time."""
    try:
        return any(path.stat().st_ctime > since for path in (folder / "state" / "head").glob("step-????????.tmp"))
    except FileNotFoundError:
        return False


def equal(a: Path, b: Path) -> bool:
    return (a / "head.safetensors").read_bytes() == (b / "head.safetensors").read_bytes()


def test_a_run_killed_ten_times_ends_as_if_nothing_had_happened(base: Path, launch: Launch, whole: Path):
    """Eight times at random steps, twice while a checkpoint is being written."""
    folder = base / "out" / "killed"
    moments: list[int | None] = sorted(random.Random(0).sample(range(3, STEPS - 20), 8))  # type: ignore[arg-type]
    moments.insert(3, None)
    moments.insert(7, None)
    for moment in moments:
        n_tries = 0
        while True:
            began, n_tries = time.time(), n_tries + 1
            process = launch(2, "killed", *SPLIT, "run.resume=true")
            if moment is not None:
                until(process, lambda: logged(folder) >= moment)  # noqa: B023
            else:
                until(process, lambda: writing(folder, began))  # noqa: B023
            kill(process)
            # The writer may have been quicker than the signal: then once more.
            if moment is not None or writing(folder, began):
                break
            assert n_tries < 10
    said = (base / "killed.log").read_text()
    assert "never finished: ignored" in said
    assert "resumed at head step" in said
    done = distill(2, *words(base, "killed", *SPLIT, "run.resume=true"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(folder) == losses(whole)
    assert equal(folder, whole)
    assert not (folder / "state").exists()


def test_a_killed_run_goes_on_in_one_process_instead_of_two(base: Path, launch: Launch, whole: Path):
    folder = base / "out" / "fewer"
    process = launch(2, "fewer", *SPLIT)
    until(process, lambda: logged(folder) >= STEPS // 3)
    kill(process)
    done = distill(0, *words(base, "fewer", "run.resume=true", "optim.micro_batch=4", "deepspeed.zero_stage=3"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed at head step" in done.stdout
    same_curve(whole, folder)
    ours, theirs = load_file(folder / "head.safetensors"), load_file(whole / "head.safetensors")
    assert all((ours[name] - theirs[name]).abs().max() < 1e-3 for name in theirs)


@pytest.mark.parametrize(
    ("zero", "param", "more"),
    [(1, False, ()), (2, False, ("data.pack=90",)), (3, False, ()), (3, True, ("data.pack=90",))],
)
def test_offloaded_state_gives_the_same_curve(base: Path, whole: Path, zero: int, param: bool, more: tuple[str, ...]):
    name = f"offload{zero}{param}"
    zeros = [f"deepspeed.config={base / 'z3.json'}"] if zero == 3 else []
    engine = [f"deepspeed.zero_stage={zero}", "deepspeed.offload_optimizer=true", f"deepspeed.offload_param={param}"]
    done = distill(2, *words(base, name, "optim.micro_batch=1", "optim.accumulate=2", *engine, *zeros, *more))
    assert done.returncode == 0, done.stderr[-3000:]
    same_curve(whole, base / "out" / name)


@pytest.mark.parametrize("zero", [0, 3])
def test_bf16_learns_what_fp32_does(base: Path, whole: Path, zero: int):
    """Its rounding is 1e-3 of a weight; masters in fp32 keep the small updates that bf16 alone would lose."""
    name = f"bf16z{zero}"
    done = distill(2, *words(base, name, "optim.micro_batch=2", f"deepspeed.zero_stage={zero}", "deepspeed.bf16=true"))
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = losses(base / "out" / name), losses(whole)
    assert max(abs(ours[step] - theirs[step]) for step in theirs) < 1e-2


def test_two_launches_on_one_machine_train_together(base: Path, whole: Path, tmp_path: Path):
    """As two nodes would, each told its number instead of being reached by ssh."""
    (tmp_path / "hostfile").write_text("first slots=1\nsecond slots=1\n")
    port = free_port()
    nodes = []
    for rank in (0, 1):
        launcher = [str(Path(PYTHON).parent / "deepspeed"), "--no_ssh", "--node_rank", str(rank)]
        there = ["--hostfile", str(tmp_path / "hostfile"), "--master_addr", "127.0.0.1", "--master_port", str(port)]
        command = [*launcher, *there, str(ROOT / "train" / "distill.py"), *words(base, "nodes", *SPLIT)]
        pipe = subprocess.PIPE
        nodes.append(
            subprocess.Popen(
                command, cwd=ROOT, text=True, stdout=pipe, stderr=pipe, env=environment(), start_new_session=True
            )
        )
    try:
        for node in nodes:
            _, error = node.communicate(timeout=TIMEOUT_S)
            assert node.returncode == 0, error[-3000:]
    finally:
        for node in nodes:
            end(node)
    assert losses(base / "out" / "nodes") == losses(whole)
    assert equal(base / "out" / "nodes", whole)


@pytest.mark.parametrize("engine", [(), ("deepspeed.zero_stage=1", "deepspeed.bf16=true")])
def test_numbers_that_explode_stop_all_ranks_with_one_line(base: Path, engine: tuple[str, ...]):
    done = distill(2, *words(base, "nan", "optim.micro_batch=2", "optim.lr=1e36", *engine))
    assert done.returncode == 2
    said = done.stdout + done.stderr
    assert said.count("distill: error: ") == 1
    assert "is not finite" in said
    assert "data.json:" in said
    assert "Traceback" not in said


def test_a_sample_that_went_bad_is_dropped_by_all_ranks_together(base: Path, whole: Path, tmp_path: Path):
    """Its answers were made when it was whole; one conversation a pass, so that a pass may lose all it has."""
    shutil.copytree(base / "images", tmp_path / "images")
    shutil.copy(base / "data.json", tmp_path / "data.json")
    picture = tmp_path / "images" / "5.png"
    picture.write_bytes(b"?" * picture.stat().st_size)  # as long as it was: the data are still known by their size
    told = [f"data.train={tmp_path / 'data.json'}", "run.max_steps=24", f"deepspeed.config={base / 'z3.json'}"]
    zero = "deepspeed.zero_stage=3"
    for name, procs, *split in (("lost1", 0, "optim.micro_batch=4"), ("lost2", 2, "optim.micro_batch=1")):
        done = distill(procs, *words(base, name, *told, zero, f"optim.accumulate={max(procs, 1)}", *split))
        assert done.returncode == 0, done.stderr[-3000:]
        entries = [json.loads(line) for line in (base / "out" / name / "quarantine.jsonl").read_text().splitlines()]
        assert [entry["id"] for entry in entries] == ["r5"]
        assert f"{os.fspath(tmp_path / 'data.json')}" == entries[0]["source"]
        assert "lost since it was answered" in entries[0]["reason"]
    same_curve(base / "out" / "lost1", base / "out" / "lost2")
    done = distill(2, *words(base, "toomany", *told, zero, "optim.micro_batch=2", "data.max_bad_share=0.01"))
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("1 of 24 records are unusable") == 1
