"""Going on exactly: checkpoints whole or not there, engines that continue bit for bit, faults that are named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmspec.recipe import DeepSpeedNode, Optim, load
from mmspec.types import InputError, Objective
from tests.training import ALONE, prepare, record, save_data, save_recipe, save_target, session
from train import saved
from train.clock import StepClock
from train.corpus import Part
from train.fit import Fit, Lost, MicroBatch, Plan, Trainee, find
from train.saved import Reader
from train.session import begin
from train.sources import Live, Loader
from train.stopping import Stopper
from train.tracking import Tracker
from train.world import World

# Of collectives that DeepSpeed calls by their old names.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torch.distributed")

# ---- folders ----


def put(parent: Path, step: int, keep: int = 2, **tensors: Tensor) -> None:
    named = {saved.key("weight", name, 0): tensor for name, tensor in tensors.items()}
    saved.write(parent, step, named, {"seed": 3}, keep, ALONE)


def test_any_stretch_of_what_was_saved_is_read_back_bit_for_bit(tmp_path: Path):
    """Whoever reads asks for other stretches than were written; -0 is not 0."""
    whole = torch.randn(20)
    whole[7] = -0.0
    parts = {saved.key("weight", "a.b", start): whole[start : start + 5] for start in (0, 5, 10, 15)}
    saved.write(tmp_path, 4, parts, {}, 2, ALONE)
    found = saved.newest(tmp_path, ALONE, pytest.fail)
    assert found is not None
    assert found.step == 4
    out = torch.empty(9)
    Reader(found).fill("weight", "a.b", 3, out)
    assert out.numpy().tobytes() == whole[3:12].numpy().tobytes()
    with pytest.raises(InputError, match=r"weight of a\.b"):
        Reader(found).fill("weight", "a.b", 15, out)


def test_the_newest_few_are_kept(tmp_path: Path):
    for step in (1, 2, 9, 10):
        put(tmp_path, step, keep=3, a=torch.ones(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000009", "step-00000010"]


@pytest.mark.parametrize("keep", [1, 2])
def test_what_a_run_fell_back_from_does_not_push_out_what_it_writes(tmp_path: Path, keep: int):
    for step in (1, 2, 8, 9):
        put(tmp_path, step, keep=4, a=torch.ones(2))
    for step in (8, 9):
        flip(tmp_path / f"step-{step:08d}" / "rank-00000.safetensors")
    found = saved.newest(tmp_path, ALONE, lambda line: None)
    assert found is not None
    assert found.step == 2
    put(tmp_path, 3, keep=keep, a=torch.ones(2))
    kept = [path.name for path in sorted(tmp_path.iterdir())]
    assert kept == ["step-00000002", "step-00000003"][-keep:]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a bit is wrong": lambda folder: flip(folder / "rank-00000.safetensors"),
    "a file is cut off": lambda folder: os.truncate(folder / "rank-00000.safetensors", 50),
    "a file is missing": lambda folder: (folder / "rank-00000.safetensors").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "half a manifest": lambda folder: os.truncate(folder / "manifest.json", 30),
    "another kind of manifest": lambda folder: (folder / "manifest.json").write_text("[1]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_one_line(tmp_path: Path, damage: str):
    for step in (3, 6):
        put(tmp_path, step, a=torch.full((9,), float(step)))
    DAMAGE[damage](tmp_path / "step-00000006")
    said: list[str] = []
    found = saved.newest(tmp_path, ALONE, said.append)
    assert found is not None
    assert found.step == 3
    assert len(said) == 1
    assert "step-00000006 is damaged" in said[0]
    put(tmp_path, 6, a=torch.zeros(9))  # the run comes by there again
    assert saved.newest(tmp_path, ALONE, pytest.fail).step == 6  # type: ignore[union-attr]


class Killed(BaseException):
    """What SIGKILL does to a process, as far as the disk can tell."""


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_checkpoint_that_was_never_finished_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int):
    """Killed while the tensors or the manifest are written, or before the folder gets its name."""
    put(tmp_path, 3, a=torch.ones(4))
    write = saved._write_bytes
    calls: list[Path] = []

    def until(path: Path, content: bytes = b"") -> None:
        calls.append(path)
        if len(calls) > after:
            if path.suffix in (".safetensors", ".json"):
                path.write_bytes(content[: len(content) // 2])
            raise Killed
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(saved, "_write_bytes", until)
        patch.setattr(saved, "_flush", until)
        with pytest.raises(Killed):
            put(tmp_path, 6, a=torch.zeros(4))
    said: list[str] = []
    assert saved.newest(tmp_path, ALONE, said.append).step == 3  # type: ignore[union-attr]
    assert len(said) == 1
    assert "step-00000006.tmp was never finished" in said[0]
    put(tmp_path, 6, a=torch.zeros(4))
    assert saved.newest(tmp_path, ALONE, pytest.fail).step == 6  # type: ignore[union-attr]


def test_a_disk_that_refuses_is_one_line(tmp_path: Path):
    (tmp_path / "state").write_text("a file where the folder should be")
    with pytest.raises(InputError, match="cannot be written") as error:
        put(tmp_path / "state", 1, a=torch.ones(1))
    assert "\n" not in str(error.value)


def test_nothing_saved_is_nothing_found(tmp_path: Path):
    assert saved.newest(tmp_path / "nowhere", ALONE, pytest.fail) is None


# ---- the engine ----


@pytest.fixture(scope="module")
def world(group: World) -> Iterator[World]:
    """The process group, without W&B."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        patch.setenv("LOCAL_RANK", "0")
        yield group


class Line(nn.Module):
    """Fits y = a x + b on top of a frozen layer; a buffer counts what it is told."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base, self.top = nn.Linear(3, 5), nn.Linear(5, 2)
        self.base.weight.requires_grad_(False)
        self.register_buffer("ids", torch.full((4,), seed))

    def forward(self, x: Tensor, y: Tensor) -> Objective:
        out = self.top(self.base(x.to(self.top.weight.dtype)).tanh())
        loss = (out - y.to(out.dtype)).square().sum().float()
        return Objective(loss, torch.tensor(float(len(x))))


def rows(step: int, number: int, poison: float = 0.0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(100 * step + number)
    return {"x": torch.randn(4, 3, generator=draw), "y": torch.randn(4, 2, generator=draw) + poison}


def batches(step: int) -> list[MicroBatch]:
    return [MicroBatch(partial(rows, step, number), 4, (f"s{step}/{number}",)) for number in (0, 1)]


Make = Callable[..., Fit]


@pytest.fixture
def make(tmp_path: Path, world: World) -> Make:
    """Engines of one run folder, as a killed and a resumed process would have them."""

    def fit(
        seed: int = 0, steps: int = 6, on_lost: Callable[[Sequence[Lost]], None] = pytest.fail, **engine: Any
    ) -> Fit:
        ema = engine.pop("ema", 0.0)
        if "config" in engine:
            (tmp_path / "ds.json").write_text(json.dumps(engine["config"]))
            engine["config"] = str(tmp_path / "ds.json")
        optim = Optim(lr=0.05, micro_batch=4, accumulate=2, warmup=2, weight_decay=0.1, ema=ema, clip=1.0)
        node = DeepSpeedNode(**engine)
        plan = Plan("head", steps, optim, node, tmp_path / "state", save_every=0, seed=1)
        trainee = Trainee(Line(seed), lambda head, batch: head.forward(**batch))
        return Fit(trainee, plan, world, Stopper(), Tracker(tmp_path, "t", {}, True, True, None), on_lost)

    return fit


def run(fit: Fit, until: int, given: Callable[[int], list[MicroBatch]] = batches) -> dict[str, Tensor]:
    plan, fit.plan = fit.plan, replace(fit.plan, steps=until)
    rate = fit.plan.optim.schedule
    assert rate == "cosine"
    fit.run(given, {}, lambda step: None, lambda metrics: {})
    fit.plan = plan
    return fit.weights()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


ENGINES = [
    *({"zero_stage": stage} for stage in (0, 1, 2, 3)),
    *({"zero_stage": stage, "bf16": True} for stage in (0, 1, 2, 3)),
    {"zero_stage": 1, "offload_optimizer": True},
    {"zero_stage": 2, "offload_optimizer": True, "bf16": True},
    {"zero_stage": 3, "offload_optimizer": True, "offload_param": True},
    {"zero_stage": 1, "bf16": True, "config": {"data_types": {"grad_accum_dtype": "fp32"}}},
    {"zero_stage": 3, "config": {"zero_optimization": {"stage3_param_persistence_threshold": 0, "sub_group_size": 5}}},
]


def named(engine: dict[str, Any]) -> str:
    return "-".join(f"{key}{int(value)}" if key != "config" else key for key, value in engine.items())


@pytest.mark.parametrize("engine", ENGINES, ids=named)
def test_an_engine_goes_on_bit_for_bit(make: Make, engine: dict[str, Any]):
    """Weights, both moments, the step count, averages, frozen weights and buffers: what starts otherwise ends equal."""
    whole = run(first := make(**engine, ema=0.9), 3)
    first.save()
    wanted = run(first, 6)
    other = make(seed=5, **engine, ema=0.9)
    assert not same(other.weights(), whole)
    assert other.restore(find(other.plan, other.world, pytest.fail))
    assert other.step == 3
    assert same(other.weights(), whole)
    assert same(run(other, 6), wanted)
    for a, b in zip(first._shares, other._shares):
        assert float(a.count) == float(b.count) == 6.0
        assert all(torch.equal(a.tensors[kind], b.tensors[kind]) for kind in a.tensors)


@pytest.mark.parametrize(("before", "after"), [(0, 3), (3, 1), (2, 0)])
def test_another_zero_stage_goes_on_with_the_same_curve(make: Make, tmp_path: Path, before: int, after: int):
    run(first := make(zero_stage=before), 3)
    first.save()
    wanted = run(first, 6)
    curve = (tmp_path / "metrics.jsonl").read_text().splitlines()
    other = make(seed=5, zero_stage=after)
    other.restore(find(other.plan, other.world, pytest.fail))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3, "later steps are taken back"
    for name, tensor in run(other, 6).items():
        assert torch.allclose(tensor, wanted[name], atol=1e-6), name
    again = (tmp_path / "metrics.jsonl").read_text().splitlines()
    for a, b in zip(curve, again, strict=True):
        assert json.loads(a)["train/loss"] == pytest.approx(json.loads(b)["train/loss"], abs=1e-6)


def test_state_of_another_batch_is_refused(make: Make):
    run(first := make(), 2)
    first.save()
    other = make()
    other.plan = replace(other.plan, optim=replace(other.plan.optim, accumulate=4))
    with pytest.raises(InputError, match="batch=8, not 16"):
        other.restore(find(other.plan, other.world, pytest.fail))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_average_is_that_of_the_weights_after_each_step(make: Make, stage: int):
    plain, averaged = make(zero_stage=stage), make(zero_stage=stage, ema=0.5)
    mean = {name: tensor.double() for name, tensor in plain.weights().items()}
    for step in range(4):
        decay = min(0.5, (1 + step) / (10 + step))
        for name, tensor in run(plain, step + 1).items():
            mean[name] = decay * mean[name] + (1 - decay) * tensor.double()
        found = run(averaged, step + 1)
        for name, tensor in found.items():
            assert torch.allclose(tensor.double(), mean[name], atol=1e-6), name


# ---- faults ----


def root(head: nn.Module, batch: Any) -> Objective:
    """A finite loss whose gradient is not where all y are 0."""
    out = head.top(head.base(batch["x"]))
    loss = out.square().sum() if batch["y"].any() else (out - out.detach()).abs().sum().sqrt()
    return Objective(loss, torch.tensor(4.0))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_and_is_named(make: Make, tmp_path: Path, stage: int, where: str):
    """Before the optimizer sees it, with the samples of the micro-batch at fault and no others."""
    fit = make(zero_stage=stage)
    if where == "gradient":
        fit.engine.module._objective = root
    before = run(fit, 1)

    def poisoned(step: int) -> list[MicroBatch]:
        bad = rows(step, 1, float("nan"))
        if where == "gradient":
            bad["y"] = torch.zeros(4, 2)
        return [*batches(step)[:1], MicroBatch(lambda: bad, 4, ("r7 (data.json:8)", "r9 (data.json:10)"))]

    with pytest.raises(InputError, match=r"head step 2: .* r7 \(data\.json:8\), r9 \(data\.json:10\); look") as error:
        run(fit, 2, poisoned)
    assert "s1/0" not in str(error.value)
    assert "\n" not in str(error.value)
    assert same(fit.weights(), before)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_stand_in_weighs_nothing_and_losses_are_told(make: Make):
    told: list[Sequence[Lost]] = []
    plain = run(make(), 3, lambda step: [*batches(step)[:1], replace(batches(step)[0], count=0)])
    lost = Lost(4, "gone")

    def given(step: int) -> list[MicroBatch]:
        stand_in = MicroBatch(partial(rows, step, 77), 0, lost=(lost,) if step == 1 else ())
        return [batches(step)[0], stand_in]

    assert same(run(make(on_lost=told.append), 3, given), plain)
    assert told == [[lost]]


# ---- samples that vanish ----


def test_a_sample_that_vanished_is_left_out_and_quarantined(tmp_path: Path):
    s = session(tmp_path, [record(number) for number in range(6)], data__max_bad_share="0.4", optim__micro_batch="6")
    s.prepared = prepare(s)
    (tmp_path / "images" / "3.png").unlink()
    (tmp_path / "images" / "4.png").write_text("no picture")
    with Loader(s, Live(s, ()), StepClock(s.world.device)) as loader:
        (micro,) = loader.micro_batches(0)
        batch = micro.make()
        assert sorted(lost.record for lost in micro.lost) == [3, 4]
        assert len(batch["valid"]) == 4
        loader.quarantine(micro.lost)
        loader.quarantine(micro.lost)  # in the next epoch: nothing new
        (tmp_path / "images" / "5.png").unlink()
        loader.micro_batches(1)  # prepared before
        (micro,) = loader.micro_batches(2)
        with pytest.raises(InputError, match="3 of 6 records are unusable"):
            loader.quarantine(micro.lost)
    entries = [json.loads(line) for line in (s.folder / "quarantine.jsonl").read_text().splitlines()]
    assert [(entry["id"], entry["line"]) for entry in entries] == [("r3", 4), ("r4", 5), ("r5", 6)]
    assert all("lost since it was answered" in entry["reason"] for entry in entries)


def test_a_micro_batch_that_lost_everything_still_runs(tmp_path: Path):
    s = session(tmp_path, [record(number) for number in range(4)], optim__micro_batch="2", optim__accumulate="2")
    s.prepared = prepare(s)
    shutil.rmtree(tmp_path / "images")
    with Loader(s, Live(s, ()), StepClock(s.world.device)) as loader:
        for micro in loader.micro_batches(0):
            assert micro.count == 0
            assert len(micro.lost) == 2
            assert int((micro.make()["answer"] > 0).sum()) == 3


# ---- between phases ----


def test_a_run_killed_between_its_phases_says_nothing_twice(
    tmp_path: Path, train_here: Callable[..., None], monkeypatch: pytest.MonkeyPatch
):
    """First behind the last measurement of the head, then before the controller has saved a step."""
    data = save_data(tmp_path, [record(number) for number in range(6)])
    target, folder = save_target(tmp_path / "target"), tmp_path / "out" / "t"
    path = save_recipe(tmp_path / "r.yaml", target, data, tmp_path / "out", trackers=[])
    words = (path, "policy.kind=learned", "policy.controller.counterfactual=mean", "run.resume=true")

    def killed(*_: Any) -> None:
        raise Killed

    for place in ("train.head.checkpoint.save_head", "train.controller.Order"):
        with monkeypatch.context() as patch:
            patch.setattr(place, killed)
            with pytest.raises(Killed):
                train_here(*words)
    sample, decoded = Part.sample, []

    def counted(part: Part, number: int) -> object:
        decoded.append(number)
        return sample(part, number)

    monkeypatch.setattr(Part, "sample", counted)
    train_here(*words)
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for name in ("accept/tau", "viskip/rank_correlation_0"):
        assert sum(name in entry for entry in entries) == 1, name
    assert [entry["step"] for entry in entries if "viskip/loss" in entry] == [5, 6, 7, 8]
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 2
    assert len(decoded) <= 6, "steps name their samples without decoding them"


# ---- the same run, split otherwise ----


def test_a_run_may_be_resumed_with_its_batch_split_otherwise(tmp_path: Path):
    path = save_recipe(tmp_path / "r.yaml", "tiny_llava", tmp_path / "data.json", tmp_path / "runs")
    learned = "policy.kind=learned"
    begin(load(path, [learned]), 2)  # 2 x 4 conversations a step, 2 x 8 rounds

    def again(size: int, *words: str) -> bool:
        return begin(load(path, [learned, "run.resume=true", *words]), size)[1]

    assert again(1, "optim.micro_batch=8", "policy.optim.micro_batch=16", "deepspeed.zero_stage=3")
    assert again(1, "optim.accumulate=2", "policy.optim.accumulate=2")
    assert again(4, "optim.micro_batch=2", "policy.optim.micro_batch=4")
    with pytest.raises(InputError, match=r"2 processes x micro_batch 4 x accumulate 1 = 8 of optim, not 1 processes"):
        again(1)
    with pytest.raises(InputError, match=r"= 16 of policy\.optim"):
        again(1, "optim.micro_batch=8")
