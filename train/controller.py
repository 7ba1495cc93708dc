"""Phases 3 and 4: decode training prompts with the trained head, and train the ViSkip controller on what happened.

Invariant: a rollout chunk belongs to its prompts, not to a process: which rank computes it does not change it, and a
chunk that is on disk is complete. All ranks read the same rounds, so they train on the same data.
"""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mmspec import checkpoint
from mmspec.files import replacing
from mmspec.heads.viskip import NO_COUNTERFACTUAL
from mmspec.loop import all_complete, generate
from mmspec.methods import make_method
from mmspec.policy import RecordingPolicy
from mmspec.recipe import DeepSpeedNode
from mmspec.records import RecordError
from mmspec.sampling import make_sampler
from mmspec.types import InputError, Objective, Prompt, Request, Target
from train.calibrate import VALIDATION, Best, calibrate, flat_reliability, reliability, remember
from train.dependence import blurred_sample, image_mean
from train.encode import length_limit
from train.fit import Fit, MicroBatch, Plan, Trainee, find
from train.order import Order
from train.placement import uneven
from train.session import FREE_TO_CHANGE, Session, flat, read_state
from train.stopping import Stopped
from train.visual import Labels, agreement, mass_layers

CHUNK_BATCHES = 2
"""Requests per chunk, in decoding batches: what a stop may have to compute again."""
OF_CONTROLLER = ("run.name", "run.out", "policy.kind", "policy.steps", "policy.optim.", "policy.controller.")
"""How keys begin that say nothing of the drafter, nor of what it offers."""
OFFERED = "policy.controller.depth"
"""The exception: rounds are drafted as deep as the controller is asked about."""
STATISTICS = ("scalars", "accepted", "reach", "temperature")
"""Columns that a controller's statistics are of; the states, which fill gigabytes, are none of them."""
LABELS = {"policy.controller.n_mass": 0, "policy.controller.counterfactual": NO_COUNTERFACTUAL}
"""Keys of labels, and what they are where a controller needs none."""
SAMPLED = 1.0
"""Temperature of sampled rollouts."""
HELD_OUT_SHARE = 0.15
"""Of the images, for choosing, and again for judging."""
EVALUATIONS = 40
"""Looks at the held-out rounds: a small network knows a small rollout by heart long before its steps are over."""


@dataclass(frozen=True)
class Turn:
    """One user turn of a training conversation, with the target's answers to the turns before it as history."""

    index: int
    turn: int


def rollout(session: Session, head: nn.Module | None) -> None:
    """Writes what is missing of the rollout's chunks, this rank its share. Every rank must call.

    Args:
        head: None where the drafter is a training-free method.

    Raises:
        InputError: the method is unknown, or the rounds to take are of another rollout.
        Stopped: finished chunks are kept.
    """
    recipe, world = session.recipe, session.world
    folder = session.folder / "rollout"
    folder.mkdir(exist_ok=True)
    chunks = _chunks(session)
    if recipe.policy.rollouts_from is not None:
        world.lead(lambda: _take_rounds(session, Path(str(recipe.policy.rollouts_from)), len(chunks)))
    missing = [number for number in range(len(chunks)) if not _path(folder, number).is_file()]
    world.barrier()
    mine = missing[world.rank :: world.size]
    drafter, labels = _drafter(session, head), _labels(session, bool(missing))
    session.tracker.progress("rollout", sum(len(chunks[number]) for number in mine), 0, "prompt")
    try:
        with uneven(session.target):
            for number in mine:
                session.stopper.check()
                rounds = _roll(session, drafter, labels, chunks[number], number)
                checkpoint.write_tensors(_path(folder, number), rounds)
                session.tracker.advance(len(chunks[number]), rounds=len(rounds["accepted"]))
    except Stopped:
        pass
    session.tracker.end_progress()
    session.stopper.check_together()


def train_controller(session: Session) -> None:
    """Trains and saves the controller on the rollout. Every rank must call.

    Raises:
        Stopped: resumable state is saved.
    """
    recipe, target, policy = session.recipe, session.target, session.recipe.policy
    rounds = _gather(session)
    keys = rounds["key"].tolist()
    image: dict[int, str] = {}
    ids: dict[int, str] = {}
    for key in set(keys):
        # Decoded once, here: steps name their samples thousands of times.
        sample = session.corpus.samples[key]
        image[key], ids[key] = sample.image_name() or f"text {key}", sample.id
    training, validation, judging = _split([image[key] for key in keys], recipe.run.seed)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(image.values()))}
    rounds["image"] = torch.tensor([numbers[image[key]] for key in keys])
    config = policy.controller.resolve(target.shape)
    torch.manual_seed(recipe.run.seed)
    controller = checkpoint.build_controller(config)
    controller.fit_statistics({name: rounds[name][training] for name in STATISTICS})  # type: ignore[operator]
    plan = Plan(
        phase="controller",
        steps=policy.steps,
        optim=policy.optim,
        engine=DeepSpeedNode(),  # fp32 and unsharded: it has a fraction of a head's parameters
        folder=session.folder / "state",
        save_every=0,
        seed=recipe.run.seed,
        log_offset=recipe.run.max_steps,
    )
    fit = Fit(Trainee(controller, _objective), plan, session.world, session.stopper, session.tracker)
    best = Best(session.folder / "rollout" / "best.safetensors")
    if recipe.run.resume and fit.restore(find(plan, session.world, session.tracker.say)):
        session.tracker.say(f"resumed at controller step {fit.step} of {policy.steps}")
    session.world.lead(lambda: best.forget(fit.step))
    if not fit.step:
        # As of the first step: a run that was killed before it saved one takes this back with it.
        session.tracker.log(plan.log_offset + 1, {f"viskip/{name}": value for name, value in agreement(rounds).items()})
    order = Order([1.0] * len(training), recipe.run.seed)

    def names(rows: Tensor) -> tuple[str, ...]:
        return tuple(dict.fromkeys(ids[key] for key in rounds["key"][rows].tolist()))

    def batches(step: int) -> Sequence[MicroBatch]:
        world, optim = session.world, policy.optim
        each = optim.micro_batch * optim.accumulate
        rows = order.batch(step, each * world.size)[world.rank * each : (world.rank + 1) * each]
        picked = training[torch.tensor(rows)]
        parts = picked.split(optim.micro_batch)
        return [MicroBatch(partial(_batch, rounds, part, target), len(part), names(part)) for part in parts]

    def evaluate(step: int) -> None:
        if step % max(policy.steps // EVALUATIONS, 1) == 0 or step == policy.steps:
            metrics, weights = _validate(fit.engine.module.head, rounds, validation, target), fit.weights()
            session.tracker.log(plan.log_offset + step, metrics)
            if session.world.first:
                best.offer(step, metrics.get(VALIDATION, math.inf), weights)

    fit.run(batches, {}, evaluate, lambda metrics: {"loss": f"{metrics['viskip/loss']:.3f}"})
    if session.world.first:
        chosen = checkpoint.build_controller(config)
        chosen.load_state_dict(best.weights())
        chosen.to(target.device)
        greedy, drawn = calibrate(chosen, _batch(rounds, validation, target)["rounds"])
        session.tracker.say(f"the controller of step {best.step}, its logits by {greedy:g}, sampled {drawn:g}")
        judges = _batch(rounds, judging, target)["rounds"]
        if len({image[keys[row]] for row in judging.tolist()}) < 2:
            said = "never ask it" if len(judging) else "ask it every round"
            session.tracker.say(f"{len(numbers)} images are too few to judge it by: policies will {said}")
        remember(chosen, judges)
        found = reliability(chosen, judges)
        session.tracker.log(plan.log_offset + policy.steps, flat_reliability(found))
        checkpoint.save_controller(session.folder, chosen.cpu().state_dict(), config, target, found)
    session.world.barrier()


def _drafter(session: Session, head: nn.Module | None) -> Any:
    """What the rollout drafts with: the head, or the method of the recipe with its default settings."""
    if head is None:
        return make_method(str(session.recipe.policy.method), session.target)[0]
    return head.drafter(session.target, session.recipe.policy.width)  # type: ignore[operator]


def _labels(session: Session, wanted: bool) -> Labels:
    """What makes the labels of the rounds. Every rank must call.

    Args:
        wanted: whether there are any to make.
    """
    config, target = session.recipe.policy.controller, session.target
    way, instead = config.counterfactual, None
    if way == "mean" and wanted:
        instead = image_mean(session)
        way = way if instead is not None else NO_COUNTERFACTUAL  # no image: nothing depends on one
    return Labels(target, mass_layers(target.shape.n_layers, config.n_mass), way, instead)


def _take_rounds(session: Session, other: Path, n_chunks: int) -> None:
    """Copies the chunks of another run's rollout.

    Raises:
        InputError: it is not of the same data, seed, drafter and draft, or does not have the labels that are wanted.
    """
    found, recipe = read_state(other), session.recipe.as_dict()
    if found is None or found.data != session.state.data:
        raise InputError(f"policy.rollouts_from={other} is no run of the same data; leave it out")
    theirs, mine = _drafted_by(found.recipe, found.world_size), _drafted_by(recipe, session.world.size)
    for key in sorted(set(theirs) | set(mine)):
        if theirs.get(key) != mine.get(key):
            raise InputError(
                f"policy.rollouts_from={other} was made with {key}={theirs.get(key)}, not {mine.get(key)}; set it so, "
                "or leave policy.rollouts_from out"
            )
    for key, none in LABELS.items():
        wanted, there = flat(recipe)[key], flat(found.recipe).get(key, none)
        if wanted not in (none, there):
            raise InputError(f"policy.rollouts_from={other} has labels of {key}={there}; set it so, or to {none}")
    for number in range(n_chunks):
        source = _path(other / "rollout", number)
        if not source.is_file():
            raise InputError(f"policy.rollouts_from={other} has no complete rollout: {source.name} is missing")
        # A chunk that is there counts as complete, and a later start may take no rounds, but decode what is missing.
        with replacing(_path(session.folder / "rollout", number)) as scratch:
            shutil.copy(source, scratch)


def _drafted_by(recipe: dict[str, Any], n_processes: int) -> dict[str, Any]:
    """What a rollout depends on beside its data, by key: the settings of target, drafter and draft, and the batch of a
    head that is trained, however it is split.

    Args:
        n_processes: that the run was started with.
    """
    every = flat(recipe)
    found = {key: value for key, value in every.items() if not key.startswith(OF_CONTROLLER) or key == OFFERED}
    if every.get("run.max_steps"):
        batch = n_processes * every["optim.micro_batch"] * every["optim.accumulate"]
        found["processes x optim.micro_batch x optim.accumulate"] = batch
    return {key: value for key, value in found.items() if key not in FREE_TO_CHANGE}


def _chunks(session: Session) -> list[list[Turn]]:
    """The rollout's turns in chunks; depends on seed and corpus only."""
    turns = [
        Turn(index, turn)
        for index, dialogue in session.prepared.dialogues.items()
        for turn in range(len(dialogue.answers))
    ]
    random.Random(f"rollout/{session.recipe.run.seed}").shuffle(turns)
    turns = turns[: session.recipe.policy.rollouts]
    size = _chunk_size(session)
    return [turns[start : start + size] for start in range(0, len(turns), size)]


def _chunk_size(session: Session) -> int:
    """Turns of a chunk; the last one may have less."""
    return session.recipe.policy.rollout_batch * CHUNK_BATCHES


def _path(folder: Path, number: int) -> Path:
    return folder / f"chunk-{number:05d}.safetensors"


def _temperature(session: Session, number: int) -> float:
    """Of a chunk: those that are sampled are spread evenly, whatever their share."""
    share = session.recipe.policy.sampled_share
    return SAMPLED if int((number + 1) * share) > int(number * share) else 0.0


def _roll(session: Session, drafter: Any, labels: Labels, chunk: Sequence[Turn], number: int) -> dict[str, Tensor]:
    """Decodes chunk `number` with the largest tree and labels its rounds."""
    recipe, target, temperature = session.recipe, session.target, _temperature(session, number)
    # Keys are places in the whole rollout: noise is drawn by key, and no two sampled turns may share theirs.
    asked = dict(enumerate(chunk, start=number * _chunk_size(session)))
    requests: list[Request] = []
    for key, turn in asked.items():
        prompt = _prompt(session, turn)
        if prompt is not None:
            room = length_limit(recipe.data, target) - len(prompt)
            requests.append(Request(str(key), prompt, min(recipe.data.max_new_tokens, room), key))
    depth = max(recipe.policy.depth, recipe.policy.controller.depth)
    seed = f"depths/{recipe.run.seed}/{number}"
    recorder = RecordingPolicy(depth, recipe.policy.budget, target.embed, recipe.policy.explore, seed)
    outputs = generate(
        target,
        requests,
        drafter,
        recorder,
        make_sampler(temperature, seed=recipe.run.seed),
        max_batch=recipe.policy.rollout_batch,
        on_output=lambda _: session.stopper.check(),
    )
    all_complete(outputs)
    rounds = recorder.rounds()
    if not rounds:
        return {"accepted": torch.zeros(0, dtype=torch.long)}
    rounds["temperature"] = torch.full((len(rounds["accepted"]),), temperature)
    labels.begin(rounds)
    for request, output in zip(requests, outputs):
        rows = (rounds["key"] == request.key).nonzero().flatten()
        blurred = _prompt(session, asked[request.key], blur=True) if labels.way == "blur" else None
        whole = _continued(request.prompt, output.tokens)
        unseen = _continued(blurred, output.tokens) if blurred is not None else None
        labels.fill(rounds, rows, whole, len(request.prompt), unseen)
    # Seen again as the key of the whole rollout: all rounds of one conversation fall on one side of a split.
    rounds["key"] = torch.tensor([asked[int(key)].index for key in rounds["key"]])
    # The root's embedding is looked up when it is needed; states are kept in the precision they were computed in.
    del rounds["root_embed"]
    return {**rounds, "last_hidden": rounds["last_hidden"].to(target.dtype)}


def _continued(prompt: Prompt, tokens: Sequence[int]) -> Prompt:
    ids = torch.cat([prompt.input_ids, torch.tensor(list(tokens), dtype=torch.long)])
    visual = torch.cat([prompt.visual, torch.zeros(len(tokens), dtype=torch.bool)])
    return Prompt(ids, visual, prompt.pixels)


def _prompt(session: Session, turn: Turn, blur: bool = False) -> Prompt | None:
    sample, dialogue = session.corpus.samples[turn.index], session.prepared.dialogues[turn.index]
    sample = blurred_sample(sample) if blur else sample
    try:
        prompt = session.target.encode(sample.messages(dialogue.answers[: turn.turn], turn.turn + 1), sample.images())
    except (RecordError, ValueError):
        # It was fine when answers were regenerated; a file that vanished since costs one label.
        return None
    return prompt if len(prompt) < length_limit(session.recipe.data, session.target) else None


def _gather(session: Session) -> dict[str, Tensor]:
    """All rounds of all chunks, in order of the chunks. One chunk at a time is held beside what is joined."""
    paths = [_path(session.folder / "rollout", number) for number in range(len(_chunks(session)))]
    counts = {path: n for path in paths if (n := _n_rounds(path))}
    if not counts:
        raise InputError("the rollout has no drafted round to train the controller on; set policy.kind=fixed")
    rounds: dict[str, Tensor] = {}
    start = 0
    for path, n in counts.items():
        for name, column in load_file(str(path)).items():
            if name not in rounds:
                rounds[name] = column.new_zeros(sum(counts.values()), *column.shape[1:])
            rounds[name][start : start + n] = column
        start += n
    return rounds


def _n_rounds(path: Path) -> int:
    """Of a chunk, by the header of its file."""
    with safe_open(str(path), framework="pt") as file:
        return int(file.get_slice("accepted").get_shape()[0])


def _split(images: Sequence[str], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers for training, choosing and judging, by image; a rollout of a few images has no rounds for the latter.

    Args:
        images: of each round.
    """
    names = sorted(set(images))
    random.Random(f"split/{seed}").shuffle(names)
    n = int(len(names) * HELD_OUT_SHARE)
    part = dict.fromkeys(names[:n], 1) | dict.fromkeys(names[n : 2 * n], 2)
    parts = torch.tensor([part.get(name, 0) for name in images])
    training, choosing, judging = ((parts == k).nonzero().flatten() for k in range(3))
    return training, choosing, judging


def _batch(rounds: Mapping[str, Tensor], rows: Tensor, target: Target) -> dict[str, Any]:
    """Some rounds as the controller takes them, on the target's device."""
    batch = {name: table[rows].to(target.device) for name, table in rounds.items()}
    batch["root_embed"] = target.embed(batch["root"]).detach().float()
    batch["last_hidden"] = batch["last_hidden"].float()
    return {"rounds": batch}


def _objective(controller: nn.Module, batch: Mapping[str, Any]) -> Objective:
    out: Objective = controller.forward(batch["rounds"])
    return out


@torch.no_grad()
def _validate(controller: nn.Module, rounds: Mapping[str, Tensor], rows: Tensor, target: Target) -> dict[str, float]:
    """Held-out loss and calibration; the engine is unsharded, so its module can be called on one rank alone."""
    if not len(rows):
        return {}
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    for part in rows.split(1024):
        out = _objective(controller, _batch(rounds, part, target))
        for name in out.sums:
            sums[name] = sums.get(name, 0.0) + float(out.sums[name])
            counts[name] = counts.get(name, 0.0) + float(out.counts[name])
    return {f"viskip/val_{name}": sums[name] / counts[name] for name in sums if counts[name]}
