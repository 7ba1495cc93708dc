"""Phase 2: the draft head learns on the target's own answers; the frozen target runs beside the engine, not in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mmspec import checkpoint
from mmspec.recipe import Source
from mmspec.types import Features, InputError, Objective, Target
from train.corpus import locate
from train.fit import Fit, Plan, Trainee, find
from train.measure import held_out, measure
from train.regenerate import answer_counts
from train.session import Session
from train.sources import Loader, open_source
from train.stopping import Stopped

METRICS = {"tau_sim": "accept/tau_sim", "top1": "accept/top1"}
"""Names that the objective's sums are logged under; `pos_<k>` become `accept/pos_<k>`."""


def train_head(session: Session) -> nn.Module:
    """Trains, measures and saves the head; returns it in eval mode, complete on every rank. Every rank must call.

    Raises:
        Stopped: resumable state and the head so far are saved.
    """
    recipe, target = session.recipe, session.target
    config = recipe.head.config.resolve(target.shape)
    torch.manual_seed(recipe.run.seed)
    head = checkpoint.build_head(recipe.head.kind, config, recipe.loss)
    plan = _plan(session)
    found = find(plan, session.world, session.tracker.say) if recipe.run.resume else None
    if recipe.head.init_from is not None:
        _copy_weights(head, recipe.head.init_from, target)
    elif found is None:
        head.prepare(target, lambda: answer_counts(session.corpus, session.prepared, target, session.world))
    trainee = Trainee(head, _objective(target))
    fit = Fit(trainee, plan, session.world, session.stopper, session.tracker, lambda lost: loader.quarantine(lost))
    if recipe.run.resume and fit.restore(found):
        session.tracker.say(f"resumed at head step {fit.step} of {recipe.run.max_steps}")
    session.world.lead(lambda: str(locate(Source(recipe.run.eval_data, limit=recipe.run.eval_prompts))))
    validation = held_out(recipe, target, session.world)

    def snapshot() -> nn.Module:
        plain = checkpoint.build_head(recipe.head.kind, config, recipe.loss)
        plain.load_state_dict(fit.weights())
        return plain.to(target.device, target.dtype).eval().requires_grad_(False)

    def score(step: int) -> None:
        # Tokenizers are not made for two threads at once, and samples are decoded here.
        loader.settle()
        result = measure(snapshot(), recipe, target, validation, session.world, session.stopper)
        session.tracker.log(step, {"accept/tau": result.tau})
        columns = ("prompt", "answer", "tau")
        session.tracker.table(step, "samples", columns, result.samples)
        session.tracker.say(f"step {step}: tau {result.tau:.2f} on {recipe.run.eval_prompts} of {recipe.run.eval_data}")

    def evaluate(step: int) -> None:
        every = recipe.run.eval_every
        if every and step % every == 0 and step < recipe.run.max_steps:
            score(step)

    def save() -> None:
        weights = fit.weights()
        if session.world.first:
            checkpoint.save_head(session.folder, weights, config, target)
            policy = recipe.policy
            checkpoint.save_tree(session.folder, checkpoint.DraftTree(policy.depth, policy.width, policy.budget))
        session.world.barrier()

    with Loader(session, open_source(session, head.taps), fit.clock) as loader:  # type: ignore[arg-type]
        try:
            fit.run(loader.micro_batches, METRICS, evaluate, lambda metrics: _shown(metrics, session))
            fit.save()
            score(recipe.run.max_steps)
        except Stopped:
            save()
            raise
    save()
    return snapshot()


def load_head(session: Session) -> nn.Module:
    """The head that an earlier part of this run saved."""
    target = session.target
    head = checkpoint.load(session.folder).head(target.dtype)
    return head.to(target.device).eval().requires_grad_(False)


def _objective(target: Target) -> Callable[[nn.Module, Mapping[str, Any]], Objective]:
    def objective(head: nn.Module, batch: Mapping[str, Any]) -> Objective:
        features = Features(**batch)
        out: Objective = head.forward(features, target.unembed)
        # What a step has gone through, for its rates.
        tokens = {"tokens": features.valid.sum().float(), "answer_tokens": (features.answer > 0).sum().float()}
        return replace(out, sums={**out.sums, **tokens}, counts={**out.counts, **tokens})

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
        keep=recipe.run.keep,
    )


def _copy_weights(head: nn.Module, folder: str, target: Target) -> None:
    """Starts from another run's head for the same target; names and shapes must agree.

    Raises:
        InputError: they do not.
    """
    other = checkpoint.load(folder)
    other.check_target(target)
    state = other.head().state_dict()
    wanted = {name: tensor.shape for name, tensor in head.state_dict().items()}
    if wanted != {name: tensor.shape for name, tensor in state.items()}:
        raise InputError(f"head.init_from={folder} holds a {other.kind} head of another shape than this recipe's")
    head.load_state_dict(state)


def _shown(metrics: Mapping[str, float], session: Session) -> dict[str, Any]:
    return {
        "loss": f"{metrics['train/loss']:.3f}",
        "tau_sim": f"{metrics.get('accept/tau_sim', float('nan')):.2f}",
        "quarantined": session.quarantine.count,
    }
