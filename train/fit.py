"""One optimisation loop for everything that is trained here, around a DeepSpeed engine.

Invariant: the gradient of a step is that of (sum of the loss over valid positions of all ranks and micro-batches) /
(their global number). So 1 process x batch 8, 2 x 4 and 1 x 4 x 2 accumulated are one and the same step, at any ZeRO
stage; means per rank or per micro-batch would weigh short answers more.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from mmspec.recipe import DeepSpeedNode, Optim
from mmspec.types import InputError, Objective
from train.clock import StepClock
from train.stopping import Stopped, Stopper
from train.tracking import Tracker
from train.usage import memory_gb
from train.world import World

OWNED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
OWNED_OBJECTS = ("optimizer", "scheduler")

RATES = {"tokens": "perf/tokens_per_s", "answer_tokens": "perf/answer_tokens_per_s", "tflop": "perf/tflops"}
"""Sums of an objective that are logged per second of a step, not per position."""


class Trainee(nn.Module):
    """What the engine wraps: tensors in, tensors out, the objective inside.

    ZeRO-3 gathers weights when a module is called and hooks its backward pass on the tensors it returns; it does not
    look into dataclasses. So parameters that a head owns itself (not through a submodule) are registered here as well,
    and the head's forward is called as a function.

    Args:
        head: any module.
        objective: (head, batch) -> Objective, calling `head.forward`.
    """

    def __init__(self, head: nn.Module, objective: Callable[[nn.Module, Mapping[str, Any]], Objective]) -> None:
        super().__init__()
        self.head = head
        for name, parameter in head.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self._objective = objective
        self.sum_names: tuple[str, ...] = ()

    def forward(self, **batch: Any) -> tuple[Tensor, Tensor]:
        """Scalar loss sum, and [2 + 2n] float64: loss, count, n sums and n counts, without gradient."""
        out = self._objective(self.head, batch)
        self.sum_names = tuple(sorted(out.sums))
        facts = [out.loss, out.count, *(out.sums[n] for n in self.sum_names), *(out.counts[n] for n in self.sum_names)]
        return out.loss, torch.stack([fact.detach().double().reshape(()) for fact in facts])


@dataclass(frozen=True)
class Plan:
    """What a fit is asked to do.

    Args:
        phase: "head" or "controller"; names its state folder and its metrics.
        steps: optimizer steps.
        optim: optimizer and batch.
        engine: ZeRO stage and so on.
        folder: for resumable state.
        save_every: steps between resumable checkpoints, 0: only when stopped.
        seed: of whatever the objective draws.
        log_offset: added to the step in logs.
    """

    phase: str
    steps: int
    optim: Optim
    engine: DeepSpeedNode
    folder: Path
    save_every: int
    seed: int
    log_offset: int = 0
    peak_tflops: float | None = None
    """Peak rate of a rank's device, where it is known."""

    @property
    def resumable(self) -> bool:
        """Whether the phase has saved state to go on from."""
        return (self.folder / self.phase / "latest.json").is_file()


Batches = Callable[[int], Sequence[Callable[[], Mapping[str, Any]]]]
"""step -> this rank's micro-batches, each made when it is needed."""


class Fit:
    """An engine, and the loop that drives it."""

    def __init__(self, trainee: Trainee, plan: Plan, world: World, stopper: Stopper, tracker: Tracker) -> None:
        self.plan, self.world, self.stopper, self.tracker = plan, world, stopper, tracker
        settings = engine_settings(plan.engine, plan.optim, world.size)
        if world.device.type == "cpu":
            # DeepSpeed would compile shared-memory collectives at the first use (half a minute, and a C++ compiler that
            # a fresh machine may lack), whose waiting ranks spin where gloo's can be told to stop.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.engine, *_ = deepspeed.initialize(
            model=trainee.to(world.device),
            model_parameters=[p for p in trainee.parameters() if p.requires_grad],
            optimizer=None if "optimizer" in settings else _adamw(trainee, plan.optim),
            config=settings,
            dist_init_required=False,
        )
        self.clock = StepClock(world.device)
        self.step = 0

    def run(
        self,
        batches: Batches,
        names: Mapping[str, str],
        evaluate: Callable[[int], None],
        shown: Callable[[Mapping[str, float]], Mapping[str, Any]],
    ) -> None:
        """Trains up to `plan.steps`.

        Args:
            batches: this rank's micro-batches of a step.
            names: how the objective's sums are logged, `{sum: metric}`; others are logged as `train/<sum>`.
            evaluate: called after every step with the number of finished steps; decides itself whether it is time.
            shown: metrics of a step -> what the progress bar shows.

        Raises:
            Stopped: a resumable checkpoint of the last finished step is saved.
        """
        self.tracker.progress(self.plan.phase, self.plan.steps, self.step, "step")
        while self.step < self.plan.steps:
            metrics = self._step(batches(self.step), names)
            self.step += 1
            self.tracker.log(self.plan.log_offset + self.step, metrics)
            self.tracker.advance(1, **shown(metrics))
            signum = self.stopper.agreed()
            due = self.plan.save_every and self.step % self.plan.save_every == 0
            if signum or (due and self.step < self.plan.steps):
                self.save()
            if signum:
                raise Stopped(signum)
            try:
                evaluate(self.step)
            except Stopped:
                self.save()
                raise
        self.tracker.end_progress()

    def _step(self, micro: Sequence[Callable[[], Mapping[str, Any]]], names: Mapping[str, str]) -> dict[str, float]:
        """One optimizer step; returns what to log."""
        engine, trainee = self.engine, self.engine.module
        rate = learning_rate(self.step, self.plan.steps, self.plan.optim)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        engine.train()
        phase = self.plan.phase
        self.clock.enter(phase)
        total_count = self._count_ahead(micro) if len(micro) > 1 else None
        facts = torch.zeros(0, dtype=torch.float64)
        for index, make in enumerate(micro):
            self._seed(index)
            batch = make()
            self.clock.enter(phase)
            loss, local = engine(**batch)
            if total_count is None:
                facts = self.world.sum(local)
                total_count = float(facts[1])
            else:
                facts = local.cpu() if index == 0 else facts + local.cpu()
            # The engine averages over ranks; undone here. It is told not to average over micro-batches.
            engine.backward(loss * (self.world.size / max(total_count, 1.0)), scale_wrt_gas=False)
            self.clock.enter("optimizer")
            engine.step()
            self.clock.enter(phase)
        if len(micro) > 1:
            facts = self.world.sum(facts)
        return self._metrics(facts, trainee.sum_names, names, rate, self.clock.stop())

    def _count_ahead(self, micro: Sequence[Callable[[], Mapping[str, Any]]]) -> float:
        """Global number of valid positions of a step. It must be known before the first backward pass, so accumulated
        micro-batches are run once without gradient (cheap beside the target's own pass over them)."""
        counts = []
        with torch.no_grad():
            for make in micro:
                batch = make()
                self.clock.enter(self.plan.phase)
                counts.append(self.engine.module(**batch)[1][1].cpu())
        return float(self.world.sum(torch.stack(counts).sum().reshape(1))[0])

    def _seed(self, micro: int) -> None:
        """Whatever an objective draws depends on step, micro-batch and rank only, so a resumed run draws the same."""
        torch.manual_seed(hash((self.plan.seed, self.step, micro, self.world.rank)) % 2**31)

    def _metrics(
        self, facts: Tensor, sums: Sequence[str], names: Mapping[str, str], rate: float, seconds: Mapping[str, float]
    ) -> dict[str, float]:
        n, step_s = len(sums), sum(seconds.values())
        loss, count = float(facts[0]), max(float(facts[1]), 1.0)
        metrics = {f"{_PREFIX[self.plan.phase]}/loss": loss / count, f"{_PREFIX[self.plan.phase]}/lr": rate}
        for index, name in enumerate(sums):
            if name in RATES:
                metrics[RATES[name]] = float(facts[2 + index]) / step_s
                continue
            many = float(facts[2 + n + index])
            key = names.get(name) or (
                f"accept/{name}" if name.startswith("pos_") else f"{_PREFIX[self.plan.phase]}/{name}"
            )
            if many > 0 and key not in metrics:
                metrics[key] = float(facts[2 + index]) / many
        if "perf/tflops" in metrics and self.plan.peak_tflops:
            metrics["perf/mfu"] = metrics["perf/tflops"] / (self.world.size * self.plan.peak_tflops)
        metrics["perf/memory_gb"] = round(memory_gb(self.world.device), 6)
        metrics |= {f"time/{phase}_s": round(spent, 6) for phase, spent in seconds.items()}
        norm = self.engine.get_global_grad_norm()
        if norm is not None:
            metrics[f"{_PREFIX[self.plan.phase]}/grad_norm"] = float(norm)
        if not math.isfinite(metrics[f"{_PREFIX[self.plan.phase]}/loss"]):
            raise InputError(
                f"{self.plan.phase} loss is {loss / count} at step {self.step + 1}; lower its learning rate or its clip"
            )
        return metrics

    # ---- weights and resumable state ----

    def weights(self) -> dict[str, Tensor]:
        """The head's state dict on the CPU, complete on every rank whatever the ZeRO stage. Every rank must call."""
        head = self.engine.module.head
        parameters = list(head.parameters())
        if self.plan.engine.zero_stage < 3:
            return {name: tensor.detach().cpu().clone() for name, tensor in head.state_dict().items()}
        with deepspeed.zero.GatheredParameters(parameters):
            return {name: tensor.detach().cpu().clone() for name, tensor in head.state_dict().items()}

    def save(self) -> None:
        """Writes what `restore` reads; older state of the phase is removed after. Every rank must call."""
        folder, tag = self.plan.folder / self.plan.phase, f"step{self.step}"
        self.engine.save_checkpoint(str(folder), tag=tag, client_state={"step": self.step}, save_latest=False)
        self.world.barrier()
        if self.world.first:
            latest = folder / "latest.json.tmp"
            latest.write_text(json.dumps({"tag": tag, "step": self.step}), encoding="utf-8")
            latest.replace(folder / "latest.json")
            for old in folder.iterdir():
                if old.is_dir() and old.name != tag:
                    shutil.rmtree(old)

    def restore(self) -> bool:
        """Goes on from the phase's saved state; False when there is none. Every rank must call.

        What was logged of later steps, by a process that was killed without saving, is taken back.
        """
        folder = self.plan.folder / self.plan.phase
        if not self.plan.resumable:
            self.tracker.rewind(self.plan.log_offset)
            return False
        latest = json.loads((folder / "latest.json").read_text(encoding="utf-8"))
        path, _ = self.engine.load_checkpoint(str(folder), tag=latest["tag"])
        if path is None:
            raise InputError(f"{folder}/{latest['tag']} cannot be read; start over without run.resume=true")
        self.step = int(latest["step"])
        self.tracker.rewind(self.plan.log_offset + self.step)
        return True


_PREFIX = {"head": "train", "controller": "viskip"}


def learning_rate(step: int, steps: int, optim: Optim) -> float:
    """The rate of a step counted from 0: linear warm-up, then the schedule down to 0 at the end."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    if optim.schedule == "constant":
        return optim.lr
    done = (step - optim.warmup) / max(steps - optim.warmup, 1)
    return optim.lr * (1 - done if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def engine_settings(node: DeepSpeedNode, optim: Optim, world_size: int) -> dict[str, Any]:
    """The engine's JSON configuration: the recipe's values over those of `deepspeed.config`.

    Raises:
        InputError: the file sets what the recipe owns.
    """
    settings: dict[str, Any] = {}
    if node.config is not None:
        settings = _read_settings(node.config)
    zero: dict[str, Any] = {"stage": node.zero_stage, **settings.pop("zero_optimization", {})}
    if int(zero["stage"]) != node.zero_stage:
        raise InputError(
            f"deepspeed.config={node.config} says ZeRO stage {zero['stage']}, deepspeed.zero_stage={node.zero_stage}"
        )
    if node.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
        settings["optimizer"] = {"type": "AdamW", "params": _adamw_arguments(optim)}
    if node.offload_param:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        **settings,
        "train_micro_batch_size_per_gpu": optim.micro_batch,
        "gradient_accumulation_steps": optim.accumulate,
        "train_batch_size": optim.micro_batch * optim.accumulate * world_size,
        "gradient_clipping": optim.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": node.bf16},
    }


def _read_settings(path: str) -> dict[str, Any]:
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"deepspeed.config={path} is no JSON: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise InputError(f"deepspeed.config={path} must be a JSON object")
    for key in (*OWNED, *OWNED_OBJECTS):
        if key in settings:
            raise InputError(
                f"deepspeed.config={path} sets {key!r}, which the recipe's optim node says; remove it there"
            )
    return settings


def _adamw_arguments(optim: Optim) -> dict[str, Any]:
    return {"lr": optim.lr, "betas": list(optim.betas), "weight_decay": optim.weight_decay}


def _adamw(module: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    trained = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)
