"""A new head is one file and a recipe: the test writes both, and the common contract holds without another change."""

from __future__ import annotations

import importlib
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import mmspec.heads
from mmspec import checkpoint
from mmspec.api import Speculator, drafter_and_policy
from mmspec.loop import generate
from mmspec.policy import FixedPolicy
from mmspec.recipe import head_kinds, load
from mmspec.targets import load_target
from mmspec.types import InputError
from tests import families, tiny
from tests.contract import test_heads
from tests.contract.test_loop import SAMPLERS, plain
from tests.drafters import ALL_HEADS, Erratic
from tests.training import ROOT, TIMEOUT_S, environment, record, save_data, save_recipe, save_target
from train.estimate import report

TOY = '''
"""Toy: guesses one token from the target's state and the newest token, by one hidden layer."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from mmspec.heads._objective import SteppedHead
from mmspec.heads._packed import pack
from mmspec.losses import LossConfig
from mmspec.tree import from_parents, root_only


@dataclass(frozen=True)
class Config:
    hidden_size: int = 0
    vocab_size: int = 0
    inner: int = 16

    def resolve(self, shape):
        return replace(self, hidden_size=shape.hidden_size, vocab_size=shape.vocab_size)


class Head(SteppedHead):
    def __init__(self, config, loss=None):
        super().__init__()
        self.config, self.loss = config, loss or LossConfig(steps=1)
        self.up = nn.Linear(2 * config.hidden_size, config.inner)
        self.down = nn.Linear(config.inner, config.hidden_size)

    def guess(self, states, embeds):
        return states + self.down(F.silu(self.up(torch.cat([states, embeds], -1))))

    def unroll(self, features, steps):
        packed = pack(features)
        at, dtype = packed.tokens[packed.drafts], self.up.weight.dtype
        states, embeds = features.last_hidden.flatten(0, 1)[at], features.embeds.flatten(0, 1)[at + 1]
        return packed, [self.guess(states.to(dtype), embeds.to(dtype))]

    def step_logits(self, step, states, unembed):
        return unembed(states)

    def drafter(self, target, width, sampler=None, widths=(), shape=None):
        return ToyDrafter(self, target)


class ToyDrafter:
    taps = ()

    def __init__(self, head, target):
        self.head, self.target = head, target

    def open(self, max_batch, max_tokens):
        size = (max_batch, self.target.shape.hidden_size)
        self.states = torch.zeros(size, dtype=self.target.dtype, device=self.target.device)

    def admit(self, row, request, forward, root):
        self.states[row] = forward.last_hidden[0, -1]

    def evict(self, row):
        pass

    def observe(self, round):
        last = round.accepted.path.gather(1, round.accepted.n_kept.unsqueeze(1) - 1)
        index = last.unsqueeze(-1).expand(-1, -1, self.states.shape[-1])
        self.states = round.forward.last_hidden.gather(1, index).squeeze(1)

    def propose(self, roots, plan):
        if plan.depth < 1 or max(plan.budget) < 1:
            return root_only(roots)
        logits = self.target.unembed(self.head.guess(self.states, self.target.embed(roots)))
        best = logits.topk(max(plan.budget), -1).indices
        parents = torch.tensor([[-1] + [0 if i < n else -1 for i in range(max(plan.budget))] for n in plan.budget])
        return from_parents(torch.cat([roots[:, None], best], 1), parents.to(roots.device), 1)
'''
COMMAND = """
import runpy, sys, mmspec.heads
mmspec.heads.__path__.append(sys.argv.pop(1))
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script with one more folder of heads."""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The one file, in a folder of its own that `mmspec.heads` looks into."""
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "toy.py").write_text(TOY)
    with monkeypatch.context() as patch:
        patch.setattr(mmspec.heads, "__path__", [*mmspec.heads.__path__, str(tmp_path / "heads")])
        yield importlib.import_module("mmspec.heads.toy")
    sys.modules.pop("mmspec.heads.toy")
    del mmspec.heads.toy  # type: ignore[attr-defined]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The one recipe, and data."""
    save_target(tmp_path / "target")
    data = save_data(tmp_path, [record(number, turns=1 + number % 2) for number in range(12)])
    path = save_recipe(tmp_path / "toy.yaml", tmp_path / "target", data, tmp_path / "runs", max_steps=6)
    settings = yaml.safe_load(path.read_text())
    settings |= {"head": {"kind": "toy", "inner": 24}, "loss": {"steps": 1}}
    settings["policy"] |= {"kind": "learned", "depth": 1}
    path.write_text(yaml.safe_dump(settings))
    return path


def test_it_trains_saves_loads_and_decodes_losslessly(toy: ModuleType, recipe: Path, tmp_path: Path):
    """By the command itself, controller included; then every sampler, with the fixed and an erratic policy."""
    assert "toy" in head_kinds()
    assert load(recipe).head.config == toy.Config(inner=24)
    assert "counted as if it were of EAGLE's family" in report(load(recipe), 1)
    words = [sys.executable, "-c", COMMAND, str(tmp_path / "heads"), str(ROOT / "train" / "distill.py"), str(recipe)]
    done = subprocess.run(
        [*words, "run.trackers=[]"], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "runs" / "t"
    curve = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum("train/loss" in entry for entry in curve) == 6
    assert any("accept/tau" in entry for entry in curve)
    loaded = checkpoint.load(folder)
    assert (loaded.kind, loaded.config.inner) == ("toy", 24)
    target = load_target(str(tmp_path / "target"), "float64", "cpu")
    loaded.check_target(target)
    wanted = families.requests(target, 6, 12)
    for sampler in SAMPLERS.values():
        truth = plain(target, wanted, sampler)
        for policy in (FixedPolicy(1, 3), Erratic(1, 3)):
            drafter, _ = drafter_and_policy(loaded, target, "fixed", sampler=sampler)
            got = generate(target, wanted, drafter, policy, sampler, max_batch=3)
            assert all(output.error is None for output in got)
            assert [o.tokens for o in got] == [o.tokens for o in truth]
    model = Speculator.from_pretrained(folder, str(tmp_path / "target"), device="cpu")  # policy: its controller
    assert model.generate("w1 w2", max_new_tokens=5)[0].error is None
    with pytest.raises(InputError, match="fingerprint"):
        loaded.check_target(tiny.llava(dtype="float32", seed=5))


def test_it_meets_the_contract_of_all_heads(toy: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """The very tests that every head of the repository is put to, whatever its family."""
    monkeypatch.setitem(ALL_HEADS, "toy", lambda target, loss=None: toy.Head(toy.Config().resolve(target.shape), loss))
    met = 0
    for test in vars(test_heads).values():
        marks = [mark.args for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
        if not any(values is ALL_HEADS for _, values in marks):
            continue
        others = [(name, values) for name, values in marks if values is not ALL_HEADS]
        for chosen in itertools.product(*(values for _, values in others)):
            test("toy", **dict(zip((name for name, _ in others), chosen)))
            met += 1
    assert met >= 9
