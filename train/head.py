"""Phase 2: the draft head learns on the target's own answers; the frozen target runs beside the engine, not in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from mmspec import checkpoint
from mmspec.recipe import Source
from mmspec.types import Features, InputError, Objective, Prompt, Target
from train.corpus import Order, deal, locate
from train.fit import Fit, Plan, Trainee
from train.measure import held_out, measure
from train.regenerate import answer_counts, encode, length_limit
from train.session import Session
from train.stopping import Stopped

METRICS = {"tau_sim": "accept/tau_sim", "top1": "accept/top1"}
"""Names that the objective's sums are logged under; `pos_<k>` become `accept/pos_<k>`."""

Encoded = list[list[tuple[Prompt, Tensor]]]


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
    if recipe.head.init_from is not None:
        _copy_weights(head, recipe.head.init_from, target)
    elif not (recipe.run.resume and plan.resumable):
        head.prepare(target, lambda: answer_counts(session.corpus, session.prepared, target, session.world))
    fit = Fit(Trainee(head, _objective(target)), plan, session.world, session.stopper, session.tracker)
    if recipe.run.resume and fit.restore():
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

    with _Loader(session, head.taps) as loader:
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


class _Loader:
    """Encodes this rank's conversations one step ahead, in a thread.

    Args:
        taps: hidden states of the target that the head wants.
    """

    def __init__(self, session: Session, taps: Sequence[int]) -> None:
        self.session, self.taps = session, taps
        self.usable = sorted(session.prepared.dialogues)
        if not self.usable:
            raise InputError("no record is left to train on after quarantine")
        corpus = session.corpus
        self.order = Order([corpus.weights[index] for index in self.usable], session.recipe.run.seed)
        self.lengths = [session.prepared.dialogues[index].length for index in self.usable]
        self.limit = length_limit(session.recipe.data, session.target)
        self._pool = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[Encoded]] | None = None

    def __enter__(self) -> _Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def micro_batches(self, step: int) -> Sequence[Callable[[], Mapping[str, Any]]]:
        """This rank's micro-batches of a step; the target's states are computed when one is asked for."""
        if self._next is not None and self._next[0] == step:
            encoded = self._next[1].result()
        else:
            encoded = self._encode(step)
        if step + 1 < self.session.recipe.run.max_steps:
            self._next = (step + 1, self._pool.submit(self._encode, step + 1))
        return [lambda micro=micro: self._features(micro) for micro in encoded]  # type: ignore[misc]

    def settle(self) -> None:
        """Waits for the thread."""
        if self._next is not None:
            self._next[1].result()

    def _encode(self, step: int) -> Encoded:
        world, optim = self.session.world, self.session.recipe.optim
        batch = self.order.batch(step, world.size * optim.micro_batch * optim.accumulate)
        mine = deal(batch, self.lengths, world.rank, world.size, optim.accumulate)
        return [[self._one(self.usable[position]) for position in micro] for micro in mine]

    def _one(self, index: int) -> tuple[Prompt, Tensor]:
        session = self.session
        return encode(session.corpus.samples[index], session.prepared.dialogues[index], session.target, self.limit)

    def _features(self, micro: Sequence[tuple[Prompt, Tensor]]) -> dict[str, Any]:
        prompts, answers = [prompt for prompt, _ in micro], [answer for _, answer in micro]
        features = self.session.target.teacher(prompts, answers, self.taps, pack=self.session.recipe.data.pack)
        return {item.name: getattr(features, item.name) for item in fields(features)}


def _objective(target: Target) -> Callable[[nn.Module, Mapping[str, Any]], Objective]:
    def objective(head: nn.Module, batch: Mapping[str, Any]) -> Objective:
        out: Objective = head.forward(Features(**batch), target.unembed)
        return out

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
