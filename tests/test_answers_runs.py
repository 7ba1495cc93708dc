"""Real runs of scripts/regenerate.py that are killed and go on: the file is the one of an unbroken run."""

from __future__ import annotations

import json
import random
import subprocess
import time
from pathlib import Path

import pytest

from tests import tiny
from tests.training import (
    ROOT,
    TIMEOUT_S,
    end,
    environment,
    launched,
    record,
    save_data,
    save_recipe,
    save_target,
)
from train.answers import FINAL, MANIFEST

SCRIPT = ROOT / "scripts" / "regenerate.py"
N = 400
SETTINGS = ("data.sampled_share=0.3", "data.drop=[empty,loop]", "data.max_new_tokens=48", "data.max_degenerate_share=1")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Target, data and recipe; some questions have a picture that cannot be read."""
    folder = tmp_path_factory.mktemp("answers")
    save_target(folder / "target")
    data = save_data(folder, [record(number, turns=1 + number % 3) for number in range(N)])
    for number in (3, 200):
        (folder / "images" / f"{number}.png").write_text("no picture")
    save_recipe(folder / "r.yaml", folder / "target", data, folder / "out")
    return folder


def command(base: Path, procs: int, name: str, *more: str) -> list[str]:
    return launched(procs, SCRIPT, base / "r.yaml", f"run.name={name}", *SETTINGS, *more)


def finish(base: Path, procs: int, name: str, *more: str) -> Path:
    """Runs to the end; returns the folder of the answers."""
    done = subprocess.run(
        command(base, procs, name, *more),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return next((base / "out" / name).glob("answers/*"))


def kill_after(base: Path, procs: int, name: str, n_lines: int, *more: str) -> None:
    """Kills a run and all of its processes when it has added so many lines."""
    folder = base / "out" / name

    def lines() -> int:
        return sum(path.read_bytes().count(b"\n") for path in folder.glob("answers/*/part-*.jsonl"))

    before, began = lines(), time.monotonic()
    with (base / f"{name}.log").open("a") as log:
        process = subprocess.Popen(
            command(base, procs, name, *more),
            cwd=ROOT, env=environment(), stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        while lines() < before + n_lines and process.poll() is None and time.monotonic() - began < TIMEOUT_S:
            time.sleep(0.001)
        assert process.poll() is None, (base / f"{name}.log").read_text()[-3000:]
    finally:
        end(process)
        process.wait()


@pytest.fixture(scope="module")
def unbroken(base: Path) -> bytes:
    folder = finish(base, 0, "unbroken")
    assert {path.name for path in folder.iterdir()} == {FINAL, MANIFEST}
    return (folder / FINAL).read_bytes()


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_gives_the_file_of_an_unbroken_one(base: Path, unbroken: bytes):
    """On one process, then two, then one; the last part is torn on top."""
    rng = random.Random(0)
    for procs in (0, 2, 0, 2):
        kill_after(base, procs, "killed", rng.randint(1, 60))
    folder = next((base / "out" / "killed").glob("answers/*"))
    assert not (folder / FINAL).exists()
    assert not json.loads((folder / MANIFEST).read_text())["complete"]
    part = folder / "part-0.jsonl"
    part.write_bytes(part.read_bytes()[:-7])
    finish(base, 0, "killed")
    assert (folder / FINAL).read_bytes() == unbroken
    assert {path.name for path in folder.iterdir()} == {FINAL, MANIFEST}
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["complete"]
    assert manifest["counts"]["kept"] + sum(manifest["counts"]["dropped"].values()) == N
    assert manifest["counts"]["dropped"]["image is not in a readable format"] == 2
    assert str(base) not in json.dumps(manifest)


@pytest.mark.slow
def test_two_processes_and_a_drafter_give_the_same_file(base: Path, unbroken: bytes):
    assert (finish(base, 2, "two") / FINAL).read_bytes() == unbroken
    folder = finish(base, 2, "drafted", "--method", "pld")
    assert (folder / FINAL).read_bytes() == unbroken
    assert json.loads((folder / MANIFEST).read_text())["work"][0]["drafted_by"] == {"method": "pld"}


@pytest.mark.slow
def test_the_script_compares(base: Path):
    done = subprocess.run(
        command(base, 0, "compared", "--method", "sam", "--compare", "24"),
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "24 conversations" in done.stdout
    assert "ratio " in done.stdout
    for words, said in (
        (("--compare", "24"), "needs somebody to draft"),
        (("--compare", "24", "--method", "sam", "--procs", "2"), "times one process, not 2"),
        (("--procs", "0"), "--procs must be at least 1, got 0"),
        (("--method", "plod"), "method 'plod' is unknown"),
        (("--ckpt", str(base / "nothing")), "does not exist"),
    ):
        done = subprocess.run(
            command(base, 0, "wrong", *words), cwd=ROOT, env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 2
        assert said in done.stderr
        assert done.stderr.count("error:") == 1


@pytest.mark.slow
def test_the_quarantine_of_a_trained_run_is_left_alone(base: Path):
    """It lists what training lost, which a resumed run reads."""
    folder, entry = base / "out" / "trained", {"source": "x", "line": 1, "id": "", "reason": "lost"}
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    (folder / "quarantine.jsonl").write_text(json.dumps(entry) + "\n")
    finish(base, 0, "trained")
    assert (folder / "quarantine.jsonl").read_text() == json.dumps(entry) + "\n"


@pytest.mark.slow
def test_a_head_of_another_target_is_refused(base: Path):
    from mmspec.checkpoint import DraftTree

    folder = tiny.run_folder(base / "head", tiny.llava(dtype="float32", seed=5), DraftTree(2, 2, 3))
    done = subprocess.run(
        command(base, 0, "other", "--ckpt", str(folder)), cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "data.answer_head: checkpoint" in done.stderr
