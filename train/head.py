"""Phase 2: the draft head learns on the target's own answers; the frozen target runs beside the engine, not in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from mmspec import checkpoint
from mmspec.heads._blind import BlindHead, image_means
from mmspec.nn import SwiGLU
from mmspec.recipe import Recipe, Source
from mmspec.types import Features, InputError, Objective, Target
from train.corpus import locate
from train.fit import Fit, Plan, Trainee, find
from train.flops import Cost, counted, head_cost, is_counted, target_cost
from train.lora import adapt, adapted_layers, merged, save_adapters
from train.measure import held_out, measure
from train.placement import lend
from train.regenerate import answer_counts
from train.session import Session
from train.sources import FeatureSource, Loader, open_source
from train.stopping import Stopped
from train.tracking import METRICS
from train.usage import peak_tflops

LOOKED_AT = 64
"""Conversations with an image, from which a vision-blind twin's means are taken."""


def train_head(session: Session) -> nn.Module:
    """Trains, measures and saves the head; returns it in eval mode, complete on every rank. Every rank must call.

    Raises:
        Stopped: resumable state and the head so far are saved.
    """
    recipe, target = session.recipe, session.target
    config = recipe.head.config.resolve(target.shape)
    torch.manual_seed(recipe.run.seed)

    def plain() -> nn.Module:
        return checkpoint.build_head(recipe.head.kind, config, recipe.loss, recipe.head.blind)

    head = plain()
    source = open_source(session, head.taps)  # type: ignore[arg-type]
    plan = _plan(session)
    found = find(plan, session.world, session.tracker.say) if recipe.run.resume else None
    if recipe.head.init_from is not None:
        head.load_state_dict(_base(recipe, target).head().state_dict())
    elif found is None:
        head.prepare(target, lambda: answer_counts(session.corpus, session.prepared, target, session.world))
        if recipe.head.init_layer is not None:
            _take_layer(head, target, recipe.head.init_layer)
        if isinstance(head, BlindHead):
            head.means.copy_(_image_means(session, source, head))
    if recipe.head.lora.rank:
        adapt(head, recipe.head)
    for module in head.modules() if recipe.run.compile else ():
        if isinstance(module, SwiGLU):
            module.compile(dynamic=True)
    trainee = Trainee(head, _objective(target, _cost(session, head), recipe.loss.steps))
    fit = Fit(trainee, plan, session.world, session.stopper, session.tracker, lambda lost: loader.quarantine(lost))
    if recipe.run.resume and fit.restore(found):
        session.tracker.say(f"resumed at head step {fit.step} of {recipe.run.max_steps}")
    session.world.lead(lambda: str(locate(Source(recipe.run.eval_data, limit=recipe.run.eval_prompts))))
    validation = held_out(recipe, target, session.world)

    def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return merged(state, plain(), recipe.head) if recipe.head.lora.rank else state

    def snapshot() -> nn.Module:
        head = plain()
        head.load_state_dict(whole(fit.weights()))
        return head.to(target.device, target.dtype).eval().requires_grad_(False)

    def score(step: int) -> None:
        # Tokenizers are not made for two threads at once, and samples are decoded here.
        loader.settle()
        result = measure(snapshot(), recipe, target, validation, session.world, session.stopper)
        topics = {f"accept/tau/{topic}": tau for topic, tau in result.by_topic.items()}
        session.tracker.log(step, {"accept/tau": result.tau, **topics})
        columns = ("prompt", "answer", "tau")
        session.tracker.table(step, "samples", columns, result.samples)
        session.tracker.say(f"step {step}: tau {result.tau:.2f} on {validation.described} of {recipe.run.eval_data}")

    def evaluate(step: int) -> None:
        every = recipe.run.eval_every
        if every and step % every == 0 and step < recipe.run.max_steps:
            score(step)

    def save() -> None:
        state = fit.weights()
        if session.world.first:
            policy = recipe.policy
            checkpoint.save_head(session.folder, whole(state), config, target, recipe.head.blind)
            if recipe.head.lora.rank and recipe.head.init_from is not None:
                save_adapters(session.folder, state, plain(), recipe.head, target.fingerprint)
            checkpoint.save_tree(session.folder, checkpoint.DraftTree(policy.depth, policy.width, policy.budget))
        session.world.barrier()

    with Loader(session, source, fit.clock) as loader:
        try:
            fit.run(loader.micro_batches, METRICS, evaluate, lambda metrics: _shown(metrics, session))
            fit.save()
            # A run that was killed after this measurement comes by once more, and has it already.
            if not session.world.lead(lambda: session.tracker.logged(recipe.run.max_steps, "accept/tau")):
                score(recipe.run.max_steps)
        except Stopped:
            save()
            raise
    save()
    return snapshot()


def _image_means(session: Session, source: FeatureSource, head: BlindHead) -> Tensor:
    """What a vision-blind twin reads at image positions; the same on every rank. Every rank must call."""
    pictured = session.corpus.samples.pictured
    shown = (k for k in sorted(session.prepared.dialogues) if pictured[k])
    total, n = torch.zeros(head.means.shape, dtype=torch.float64), 0
    for record in islice(shown, LOOKED_AT):
        sums, more = image_means(source.batch([record]).features(), head.taps)
        total, n = total + sums.cpu(), n + more
    return total / max(n, 1)


def adopt_head(session: Session) -> nn.Module | None:
    """Where no step of the head is trained: the head of `head.init_from`, copied into the run folder, or None for a
    controller of a training-free method. Every rank must call."""
    recipe, target = session.recipe, session.target
    if recipe.policy.method is not None:
        return None
    base, policy = _base(recipe, target), recipe.policy
    head = base.head(target.dtype).to(target.device).eval().requires_grad_(False)
    if session.world.first:
        checkpoint.save_head(session.folder, base.head().state_dict(), base.config, target, base.blind)
        checkpoint.save_tree(session.folder, checkpoint.DraftTree(policy.depth, policy.width, policy.budget))
    session.world.barrier()
    return head


def load_head(session: Session) -> nn.Module:
    """The head that an earlier part of this run saved."""
    target = session.target
    head = checkpoint.load(session.folder).head(target.dtype)
    return head.to(target.device).eval().requires_grad_(False)


def _cost(session: Session, head: nn.Module) -> Cost | None:
    """Operations of a step: the head's, and the target's where it runs; None for heads that nobody counts for."""
    shape, steps = session.target.shape, session.recipe.loss.steps
    if not is_counted(head):
        return None
    cost = head_cost(head, shape, steps)
    return cost if session.features is not None else cost + target_cost(shape)


def _objective(target: Target, cost: Cost | None, steps: int) -> Callable[[nn.Module, Mapping[str, Any]], Objective]:
    def objective(head: nn.Module, batch: Mapping[str, Any]) -> Objective:
        features = Features(**batch)
        out: Objective = head.forward(features, target.unembed)
        # What a step has gone through, for its rates.
        work = counted(features.valid, features.answer, features.segment, steps, features.visual)
        done = {"tokens": work.tokens, "answer_tokens": (features.answer > 0).sum()}
        if cost is not None:
            done["tflop"] = cost.of(work) / 1e12
        return replace(out, sums={**out.sums, **done}, counts={**out.counts, **done})

    return objective


def _plan(session: Session) -> Plan:
    recipe = session.recipe
    return Plan(
        phase="head",
        steps=recipe.run.max_steps,
        optim=recipe.optim,
        engine=recipe.deepspeed,
        folder=session.folder / "state",
        save_every=recipe.run.save_every,
        seed=recipe.run.seed,
        peak_tflops=peak_tflops(session.world.device, recipe.target.dtype, recipe.run.peak_tflops),
        keep=recipe.run.keep,
    )


def check_beginning(recipe: Recipe, target: Target) -> None:
    """Whether the head can start where the recipe says, asked before any work is done for it. Every rank must call.

    Raises:
        InputError: it cannot.
    """
    node = recipe.head
    if node.init_from is not None:
        _base(recipe, target)
    config = node.config.resolve(target.shape)
    with torch.device("meta" if node.init_layer is None else "cpu"):
        head = checkpoint.build_head(node.kind, config, recipe.loss, node.blind)
    if node.init_layer is not None:
        _take_layer(head, target, node.init_layer)
    if node.lora.rank:
        adapted_layers(head, node)


def _take_layer(head: Any, target: Any, index: int) -> None:
    """Starts the head's block as a layer of the target, wherever its weights live. Every rank must call."""
    with lend(target, index % target.shape.n_layers):
        head.take_layer(target, index)


def _base(recipe: Recipe, target: Target) -> checkpoint.Checkpoint:
    """The run folder of `head.init_from`: another run's head for the same target, of the recipe's kind and config.

    Raises:
        InputError: it is not.
    """
    node = recipe.head
    other = checkpoint.load(str(node.init_from))
    other.check_target(target)
    if other.kind != node.kind:
        raise InputError(f"head.init_from={node.init_from} holds a {other.kind} head, not head.kind={node.kind}")
    if other.blind != node.blind:
        raise InputError(
            f"head.init_from={node.init_from} was trained with head.blind={str(other.blind).lower()}, not "
            f"{str(node.blind).lower()}; set head.blind={str(other.blind).lower()}"
        )
    mine, its = asdict(node.config.resolve(target.shape)), asdict(other.config)
    for key in (key for key in mine if mine[key] != its[key]):
        raise InputError(
            f"head.init_from={node.init_from} holds a head with {key}={its[key]}, not {mine[key]}; "
            f"set head.{key}={its[key]}"
        )
    return other


def _shown(metrics: Mapping[str, float], session: Session) -> dict[str, Any]:
    return {
        "loss": f"{metrics['train/loss']:.3f}",
        "tau_sim": f"{metrics.get('accept/tau_sim', float('nan')):.2f}",
        "quarantined": session.quarantine.count,
    }
