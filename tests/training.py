"""Shared by the training tests: a tiny random target as a folder, a small data set, recipes, and real runs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from mmspec.recipe import load
from mmspec.records import Quarantine
from tests import tiny
from train import regenerate
from train.answers import Prepared
from train.asking import instructed
from train.corpus import read
from train.session import Session, State
from train.stopping import Stopper
from train.tracking import Tracker
from train.world import World, free_port

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
ALONE = World(0, 1, torch.device("cpu"), None)
TIMEOUT_S = 600
"""Half a minute is enough on an idle machine; it may be shared."""


def save_target(folder: Path) -> Path:
    """The random LLaVA of `tests.tiny` as a folder in Hugging Face layout."""
    target = tiny.llava(dtype="float32")
    target.model.save_pretrained(folder)
    target.processor.save_pretrained(folder)
    return folder


def words(seed: int, n: int) -> str:
    return " ".join(f"w{(seed * 7 + i * (seed % 5 + 1)) % 50}" for i in range(n))


def record(number: int, turns: int = 1) -> dict[str, Any]:
    """A good record; questions differ in length, so that batches are ragged."""
    said: list[dict[str, str]] = []
    for turn in range(turns):
        mark = "<image>\n" if turn == 0 else ""
        said.append({"from": "human", "value": mark + words(number + turn, 3 + number % 5)})
        said.append({"from": "gpt", "value": words(number + 11 + turn, 4 + number % 7)})
    return {"id": f"r{number}", "image": f"{number}.png", "conversations": said}


def save_data(folder: Path, records: list[Any]) -> Path:
    """LLaVA JSON with a picture for every record that names `<number>.png`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(len(records)):
        tiny.image(number).save(folder / "images" / f"{number}.png")
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


def save_recipe(path: Path, target: Path | str, data: Path | str, out: Path, **run: Any) -> Path:
    """A recipe small enough to run in seconds; whatever the random target says is kept."""
    recipe = {
        "target": {"name": str(target), "dtype": "float32"},
        "head": {"kind": "eagle"},
        "data": {"sources": [{"path": str(data)}], "max_new_tokens": 8, "answer_batch": 4, "drop": []},
        "loss": {"steps": 2},
        "optim": {"lr": 1e-3, "micro_batch": 4},
        "policy": {
            "kind": "fixed", "depth": 2, "width": 2, "budget": 4, "rollouts": 6, "rollout_batch": 2, "steps": 4,
            "controller": {"depth": 2, "width": 16, "n_mass": 1}, "optim": {"lr": 1e-3, "micro_batch": 8},
        },
        "run": {
            "name": "t", "seed": 0, "max_steps": 4, "out": str(out), "eval_every": 0, "eval_data": str(data),
            "eval_prompts": 2, "eval_max_new_tokens": 6, **run,
        },
    }  # fmt: skip
    path.write_text(yaml.safe_dump(recipe))
    return path


def session(tmp_path: Path, records: list[Any], **changes: str) -> Session:
    """A session of one process on the random target, up to the answers."""
    data = save_data(tmp_path, records)
    path = save_recipe(tmp_path / "r.yaml", "tiny_llava", data, tmp_path / "runs")
    recipe = load(path, [f"{key.replace('__', '.')}={value}" for key, value in changes.items()])
    recipe.folder.mkdir(parents=True, exist_ok=True)
    quarantine = Quarantine(recipe.folder / "quarantine.jsonl", fresh=True)
    corpus = instructed(read(recipe.data.sources, quarantine), recipe.data)
    tracker = Tracker(recipe.folder, "t", {}, active=False, record=False, resume_id=None)
    state = State("head", 1, None, None, {})
    target = tiny.llava(dtype="float32")
    return Session(recipe, ALONE, Stopper(), tracker, state, target, corpus, Prepared(), quarantine)


def prepare(s: Session) -> Prepared:
    """The answers of a session, made now."""
    return regenerate.prepare(s.recipe, s.corpus, s.target, s.world, s.stopper, s.tracker, s.quarantine)


def environment() -> dict[str, str]:
    """For subprocesses: no network, no W&B service, one thread per process."""
    return {**os.environ, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(procs: int, *words: str | Path) -> list[str]:
    """distill.py as one plain process (procs 0) or through the real launcher."""
    return launched(procs, ROOT / "train" / "distill.py", *words)


def launched(procs: int, script: Path, *words: str | Path) -> list[str]:
    """A script as one plain process (procs 0) or through the real launcher."""
    if not procs:
        return [PYTHON, str(script), *map(str, words)]
    launcher = str(Path(PYTHON).parent / "deepspeed")
    # Test runs at the same time must not share the launcher's default port.
    return [launcher, "--num_gpus", str(procs), "--master_port", str(free_port()), str(script), *map(str, words)]


def distill(procs: int, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs distill.py to its end, in at most TIMEOUT_S."""
    pipe = subprocess.PIPE
    process = start(procs, *words, stdout=pipe, stderr=pipe)
    try:
        out, error = process.communicate(timeout=TIMEOUT_S)
    finally:
        end(process)
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def start(procs: int, *words: str | Path, **options: Any) -> subprocess.Popen[str]:
    """A run in the background, in a process group of its own; `end` it whatever happens."""
    options = {"env": environment(), **options}
    return subprocess.Popen(command(procs, *words), cwd=ROOT, text=True, start_new_session=True, **options)


def end(process: subprocess.Popen[str]) -> None:
    """Kills what is left of a run's process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def losses(folder: Path, key: str = "train/loss") -> dict[int, float]:
    """The curve in metrics.jsonl: step -> value."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {entry["step"]: entry[key] for entry in map(json.loads, lines) if key in entry}
