"""Without DeepSpeed a single process makes the same steps, goes on from the same files, and says what it cannot do."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmspec.recipe import DeepSpeedNode, Optim
from mmspec.types import InputError, Objective
from tests.training import ALONE
from train import fit as fits
from train.fit import Fit, MicroBatch, Plan, Trainee, find
from train.plain import check_plain
from train.stopping import Stopper
from train.tracking import Tracker
from train.world import World

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torch.distributed")


class Line(nn.Module):
    """Two layers towards a target; one weight is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner, self.outer = nn.Linear(8, 16), nn.Linear(16, 4)
        self.outer.bias.requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Objective:
        out = self.outer(torch.tanh(self.inner(x.to(self.outer.weight.dtype))))
        loss = (out.float() - y).square().sum()
        return Objective(loss, torch.tensor(float(len(x))), {}, {})


def micro(step: int) -> list[MicroBatch]:
    """Two of different sizes: a mean of means would be another step."""

    def make(seed: int, n: int) -> dict[str, Tensor]:
        rng = torch.Generator().manual_seed(seed)
        return {"x": torch.randn(n, 8, generator=rng), "y": 3 * torch.randn(n, 4, generator=rng)}

    return [MicroBatch(partial(make, 10 * step + n, n), n) for n in (4, 2)]


@pytest.fixture
def world(group: World, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("LOCAL_RANK", "0")
    return group


def fitted(
    folder: Path, world: World, node: DeepSpeedNode, steps: int, resume: bool = False
) -> tuple[Fit, dict[str, Any]]:
    optim = Optim(lr=0.05, micro_batch=4, accumulate=2, warmup=2, weight_decay=0.1, clip=1.0, schedule="constant")
    plan = Plan("head", steps, optim, node, folder / "state", save_every=0, seed=1)
    trainee = Trainee(Line(), lambda head, batch: head.forward(**batch))
    tracker = Tracker(folder, "t", {}, True, True, None)
    fit = Fit(trainee, plan, world, Stopper(), tracker, pytest.fail)
    if resume:
        assert fit.restore(find(plan, world, pytest.fail))
    fit.run(micro, {}, lambda step: None, lambda metrics: {})
    fit.save()
    return fit, {name: weight.float() for name, weight in fit.weights().items()}


@pytest.mark.parametrize("bf16", [False, True])
def test_the_same_steps_as_deepspeed(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch, bf16: bool):
    """Clipped, accumulated, decayed; in bf16 the weights round alike, though DeepSpeed adds gradients up in bf16."""
    node = DeepSpeedNode(zero_stage=0, bf16=bf16)
    theirs = fitted(tmp_path / "theirs", world, node, 6)[1]
    monkeypatch.setattr(fits, "INSTALLED", False)
    ours = fitted(tmp_path / "ours", world, node, 6)[1]
    start = {name: weight.float() for name, weight in Line().state_dict().items()}
    for name, weight in theirs.items():
        moved = float((weight - start[name]).abs().max())
        assert (moved > 0.05) == (name != "outer.bias")
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=0.1 * moved if bf16 else 1e-6)


@pytest.mark.parametrize("bf16", [False, True])
def test_it_goes_on_exactly_and_from_deepspeeds_files(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch, bf16: bool
):
    node = DeepSpeedNode(zero_stage=0, bf16=bf16)
    fitted(tmp_path / "theirs", world, node, 3)
    monkeypatch.setattr(fits, "INSTALLED", False)
    whole = fitted(tmp_path / "whole", world, node, 6)[1]
    fitted(tmp_path / "parts", world, node, 3)
    parts = fitted(tmp_path / "parts", world, node, 6, resume=True)[1]
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    mixed = fitted(tmp_path / "theirs", world, node, 6, resume=True)[1]
    for name, weight in whole.items():
        torch.testing.assert_close(mixed[name], weight, rtol=0, atol=0.05 if bf16 else 1e-6)


def test_what_needs_deepspeed_is_named():
    check_plain(DeepSpeedNode(zero_stage=2), 1)
    with pytest.raises(InputError, match="2 processes needs DeepSpeed"):
        check_plain(DeepSpeedNode(), 2)
    with pytest.raises(InputError, match="offload_optimizer=true needs DeepSpeed"):
        check_plain(DeepSpeedNode(zero_stage=1, offload_optimizer=True), ALONE.size)
