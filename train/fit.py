"""One optimisation loop for everything that is trained here, around a DeepSpeed engine or, without it, a plain one.

Invariant: the gradient of a step is that of (sum of the loss over valid positions of all ranks and micro-batches) /
(their global number). So 1 process x batch 8, 2 x 4 and 1 x 4 x 2 accumulated are one and the same step, at any ZeRO
stage; means per rank or per micro-batch would weigh short answers more.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from mmspec.recipe import DeepSpeedNode, Optim
from mmspec.types import InputError, Objective
from train import saved
from train.clock import StepClock
from train.engine import adamw, engine_settings, learning_rate
from train.plain import INSTALLED, PlainEngine, check_plain, deepspeed
from train.saved import Reader, Saved
from train.shares import fixed, shares, take, trained
from train.stopping import Stopped, Stopper
from train.tracking import RATES, Tracker
from train.usage import memory_gb
from train.world import World

NAMED = 16
"""Samples that a message lists."""


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
        keep: resumable checkpoints that are kept.
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
    keep: int = 2

    @property
    def state_folder(self) -> Path:
        """Where the phase's resumable checkpoints are."""
        return self.folder / self.phase


class Lost(NamedTuple):
    """A sample that could be read when it was answered, and cannot be any more."""

    record: int
    reason: str


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of a rank is about, known before it is made.

    Args:
        make: the batch, as keyword arguments of the trainee; called once, when it is needed.
        count: its valid positions. 0: it only keeps this rank in step with the others and weighs nothing.
        names: of its samples, for messages.
        lost: samples that should have been in it.
    """

    make: Callable[[], Mapping[str, Any]]
    count: int
    names: tuple[str, ...] = ()
    lost: tuple[Lost, ...] = ()


Batches = Callable[[int], Sequence[MicroBatch]]
"""step -> this rank's micro-batches, as many on every rank."""


class Fit:
    """An engine, and the loop that drives it.

    Args:
        on_lost: told, on every rank in the same step, of all samples that any rank could not read.
    """

    def __init__(
        self,
        trainee: Trainee,
        plan: Plan,
        world: World,
        stopper: Stopper,
        tracker: Tracker,
        on_lost: Callable[[Sequence[Lost]], None] = lambda lost: None,
    ) -> None:
        self.plan, self.world, self.stopper, self.tracker = plan, world, stopper, tracker
        self._on_lost = on_lost
        self.engine: Any = self._sharing(trainee) if INSTALLED else self._plain(trainee)
        self._shares = shares(self.engine, world)
        self._averages = [share.tensors["weight"].clone() for share in self._shares] if plan.optim.ema else []
        self._saved_at: int | None = None
        self._health = torch.zeros((), device=world.device)
        for _, parameter in trained(self.engine):
            parameter.register_hook(self._watch)
        self.clock = StepClock(world.device)
        self.step = 0
        self._owes = False
        """Whether the step that was made last has not been evaluated."""

    def _sharing(self, trainee: Trainee) -> Any:
        """DeepSpeed's engine."""
        n_trained = sum(p.numel() for p in trainee.parameters() if p.requires_grad)
        settings = engine_settings(self.plan.engine, self.plan.optim, self.world.size, n_trained)
        if self.world.device.type == "cpu":
            # DeepSpeed would compile shared-memory collectives at the first use (half a minute, and a C++ compiler that
            # a fresh machine may lack), whose waiting ranks spin where gloo's can be told to stop.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        engine, *_ = deepspeed.initialize(
            model=trainee.to(self.world.device),
            model_parameters=[p for p in trainee.parameters() if p.requires_grad],
            optimizer=adamw(trainee, self.plan.optim, self.plan.engine.offload_optimizer),
            config=settings,
            dist_init_required=False,
        )
        return engine

    def _plain(self, trainee: Trainee) -> Any:
        """The engine of a machine without DeepSpeed.

        Raises:
            InputError: the plan needs it.
        """
        check_plain(self.plan.engine, self.world.size)
        self.tracker.say("DeepSpeed is not installed: this process trains alone, with plain torch")
        return PlainEngine(trainee.to(self.world.device), self.plan.engine, self.plan.optim)

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
            InputError: on every rank. A loss or gradient is not finite; or too many samples are lost.
        """
        self.tracker.progress(self.plan.phase, self.plan.steps, self.step, "step")
        if self._owes:
            self._evaluate(evaluate)
        while self.step < self.plan.steps:
            metrics = self._step(batches(self.step), names)
            self.step += 1
            self.tracker.log(self.plan.log_offset + self.step, metrics)
            self.tracker.advance(1, **shown(metrics))
            signum = self.stopper.agreed()
            self._owes = True
            if signum:
                self.save()
                raise Stopped(signum)
            self._evaluate(evaluate)
            # After the evaluation, so that a run killed in it evaluates again.
            if self.plan.save_every and self.step % self.plan.save_every == 0 and self.step < self.plan.steps:
                self.save()
        self.tracker.end_progress()

    def _evaluate(self, evaluate: Callable[[int], None]) -> None:
        """Raises Stopped when that was asked for meanwhile; a resumed run then evaluates this step first."""
        try:
            evaluate(self.step)
        except Stopped:
            self.save()
            raise
        self._owes = False

    def _step(self, micro: Sequence[MicroBatch], names: Mapping[str, str]) -> dict[str, float]:
        """One optimizer step; returns what to log."""
        engine, trainee = self.engine, self.engine.module
        rate = learning_rate(self.step, self.plan.steps, self.plan.optim)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        engine.train()
        phase = self.plan.phase
        self.clock.enter(phase)
        total = self._agree(micro)
        facts: list[Tensor] = []
        for index, part in enumerate(micro):
            self._seed(index)
            batch = part.make()
            self.clock.enter(phase)
            self._health.zero_()
            loss, local = engine(**batch)
            # The engine averages over ranks; undone here. It is told not to average over micro-batches.
            engine.backward(loss * (self.world.size / total if part.count else 0.0), scale_wrt_gas=False)
            healthy = torch.isfinite(loss.detach()) & torch.isfinite(self._health)
            facts.append(torch.cat([local * bool(part.count), (~healthy).double().view(1)]))
            if index + 1 < len(micro):
                engine.step()
        whole = self._checked(torch.stack(facts), micro)
        self.clock.enter("optimizer")
        engine.step()
        if not engine.was_step_applied() or not math.isfinite(self._norm() or 0.0):
            self._blame("gradient of the step", micro, [True] * len(micro))
        if self._averages:
            self._average()
        self.clock.enter(phase)
        return self._metrics(whole, trainee.sum_names, names, rate, self.clock.stop())

    def _agree(self, micro: Sequence[MicroBatch]) -> float:
        """The global number of valid positions of a step, after all ranks have heard of samples that were lost.

        The marks of the answers give it, so it is known before any forward pass.
        """
        count, n_lost = self.world.sum([sum(part.count for part in micro), sum(len(part.lost) for part in micro)])
        if n_lost:
            every = self.world.gather([lost for part in micro for lost in part.lost])
            self._on_lost([lost for rank in every for lost in rank])
        return max(float(count), 1.0)

    def _checked(self, facts: Tensor, micro: Sequence[MicroBatch]) -> Tensor:
        """The sum of a step's facts over ranks and micro-batches.

        Args:
            facts: [micro-batches, 2 + 2n + 1], the last column 1 where loss or gradient is not finite.

        Raises:
            InputError: on every rank, where any is not.
        """
        everywhere = self.world.sum(facts.sum(0))
        if everywhere[-1]:
            self._blame("loss or gradient", micro, facts[:, -1].bool().tolist())
        return everywhere[:-1]

    def _blame(self, what: str, micro: Sequence[MicroBatch], guilty: Sequence[bool]) -> NoReturn:
        """Ends the run on every rank, naming samples. Every rank must call."""
        mine = [name for part, bad in zip(micro, guilty) if bad for name in part.names]
        named = [name for rank in self.world.gather(mine) for name in rank]
        more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
        raise InputError(
            f"{self.plan.phase} step {self.step + 1}: {what} is not finite (NaN or infinite) with the samples "
            f"{', '.join(named[:NAMED]) or 'unnamed'}{more}; look at these, or lower the learning rate"
        )

    def _watch(self, grad: Tensor) -> None:
        """Notes whether a parameter's gradient is finite, before ranks or micro-batches are mixed."""
        self._health += grad.detach().sum(dtype=torch.float32) * 0.0

    def _norm(self) -> float | None:
        norm = self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

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
        norm = self._norm()
        if norm is not None:
            metrics[f"{_PREFIX[self.plan.phase]}/grad_norm"] = norm
        return metrics

    # ---- weights and resumable state ----

    def weights(self) -> dict[str, Tensor]:
        """The head's state dict on the CPU, complete on every rank whatever the ZeRO stage; with `optim.ema` of the
        averaged weights. Every rank must call."""
        head = self.engine.module.head
        parameters = list(head.parameters()) if self.engine.zero_optimization_stage() == 3 else []
        with deepspeed.zero.GatheredParameters(parameters) if parameters else contextlib.nullcontext():
            state = {name: tensor.detach().cpu().clone() for name, tensor in head.state_dict().items()}
        if self._averages:
            mine = {share.name: (share, average) for share, average in zip(self._shares, self._averages)}
            for name, _ in trained(self.engine):
                whole = torch.zeros(state[name].numel(), dtype=torch.float32, device=self.world.device)
                if name in mine:
                    share, average = mine[name]
                    start = share.start + share.written.start
                    part = average[share.written]
                    whole[start : start + len(part)] = part.to(whole.device)
                state[name] = self.world.add_up(whole).cpu().view(state[name].shape).to(state[name].dtype)
        return state

    def save(self) -> None:
        """Writes what `restore` reads, unless it is there already. Every rank must call.

        Raises:
            InputError: on every rank, where any could not write.
        """
        if self._saved_at == self.step:
            return
        tensors: dict[str, Tensor] = {}
        averages = self._averages or [None] * len(self._shares)
        for share, average in zip(self._shares, averages):
            kinds = share.tensors if average is None else {**share.tensors, "average": average}
            for kind, tensor in kinds.items():
                tensors[saved.key(kind, share.name, share.start + share.written.start)] = tensor[share.written]
        for name, start, tensor in fixed(self.engine, self.world):
            tensors[saved.key("fixed", name, start)] = tensor
        self.tracker.settle()
        saved.write(
            self.plan.state_folder, self.step, tensors, self._facts() | {"owes": self._owes}, self.plan.keep, self.world
        )
        self._saved_at = self.step

    def restore(self, found: Saved | None) -> bool:
        """Goes on from what `find` found; False when that is nothing. Every rank must call.

        What was logged of later steps, by a process that was killed without saving, is taken back.

        Raises:
            InputError: the state is of another batch or seed.
        """
        if found is None:
            self.tracker.rewind(self.plan.log_offset)
            return False
        for name, value in self._facts().items():
            if found.facts.get(name) != value:
                raise InputError(f"{found.folder} was saved with {name}={found.facts.get(name)}, not {value}")
        reader = Reader(found)
        take(self.engine, self.world, self._shares, found.step, reader.fill)
        for share, average in zip(self._shares, self._averages):
            reader.fill("average", share.name, share.start, average)
        self.step = self._saved_at = found.step
        self._owes = bool(found.facts.get("owes"))
        self.tracker.rewind(self.plan.log_offset + self.step)
        self.world.barrier()
        return True

    def _facts(self) -> dict[str, Any]:
        """What a step depends on beside its number: all draws are keyed by the seed, and the data by batch and step."""
        optim = self.plan.optim
        batch = optim.micro_batch * optim.accumulate * self.world.size
        return {"seed": self.plan.seed, "batch": batch, "ema": optim.ema}

    def _average(self) -> None:
        """Moves the averaged weights; early on by more, so that the weights of the start are soon forgotten."""
        decay = min(self.plan.optim.ema, (1 + self.step) / (10 + self.step))
        for share, average in zip(self._shares, self._averages):
            average.lerp_(share.tensors["weight"], 1 - decay)


def find(plan: Plan, world: World, warn: Callable[[str], None]) -> Saved | None:
    """The state that a phase can go on from: the newest whole checkpoint, or None. Every rank must call.

    Args:
        warn: told, in one line each, of checkpoints that are half-written or damaged.
    """
    return saved.newest(plan.state_folder, world, warn)


_PREFIX = {"head": "train", "controller": "viskip"}
