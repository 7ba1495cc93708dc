"""The phases of a run in their order, from a joined process group to the last file."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mmspec import checkpoint
from mmspec.arguments import launched_as
from mmspec.recipe import Recipe
from mmspec.records import Quarantine
from mmspec.types import InputError
from train import placement, regenerate
from train.answers import DEGENERATE, Prepared
from train.asking import instructed
from train.controller import rollout, train_controller
from train.corpus import Corpus
from train.decontaminate import read_clean
from train.extract import head_taps, origin
from train.features import open_store
from train.head import adopt_head, check_beginning, load_head, train_head
from train.session import Session, State, begin, finished
from train.sources import LOST
from train.stopping import Stopped, Stopper
from train.tracking import Tracker
from train.world import World, join


def run(recipe: Recipe, stopper: Stopper, instead: Callable[[Session], None] | None = None, answer: bool = True) -> int:
    """Runs the phases on this rank; returns the exit code.

    Args:
        instead: what to do once every question has its answer, instead of training; it needs no run folder of its own.
        answer: False where `instead` needs no answers either.

    Raises:
        InputError: the input is wrong.
        Stopped: asked to stop; what was reached is saved, and rank 0 has said how to go on.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed's ZeRO calls collectives by the names that torch is about to rename; nobody here can change that.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    training = instead is None
    if training and finished(recipe):
        if launched_as()[0] == 0:
            print(f"{recipe.folder} is finished; to train on, start a new run with head.init_from={recipe.folder}")
        return 0
    world = join(recipe.target.device)
    stopper.listen(world)
    tracker: Tracker | None = None
    try:
        session = _open(recipe, world, stopper, training)
        tracker = session.tracker
        # Until here there was nothing to save, and a signal ended the process at once.
        stopper.install()
        try:
            if answer:
                _answer(session)
            if instead is None:
                _train(session)
            else:
                instead(session)
        except RuntimeError as error:
            # A peer that ended on the same request breaks a collective of those who had not got to their next check.
            if stopper.asked():
                raise Stopped(stopper.asked()) from error
            raise
    except Stopped as stop:
        if world.first:
            how = " with run.resume=true" if training else ""
            kept = f"{recipe.folder} is saved: the same command{how} goes on" if answer else "nothing of it is kept"
            print(f"stopped by {stop}; {kept}", flush=True)
        raise
    finally:
        if tracker is not None:
            tracker.close()
        _leave(world)
    return 0


def _answer(session: Session) -> None:
    tracker = session.tracker
    session.prepared = regenerate.prepare(
        session.recipe, session.corpus, session.target, session.world, session.stopper, tracker, session.quarantine
    )
    tracker.say(_data_summary(session))


def _train(session: Session) -> None:
    recipe, tracker = session.recipe, session.tracker
    if not recipe.run.max_steps:
        head = adopt_head(session)
    else:
        head = train_head(session) if session.state.phase == "head" else load_head(session)
    if recipe.policy.kind == "learned":
        if session.state.phase == "head":
            session.enter("rollout")
        if session.state.phase == "rollout":
            rollout(session, head)
            session.enter("controller")
        train_controller(session)
    session.enter("done")
    if session.world.first:
        shutil.rmtree(session.folder / "state", ignore_errors=True)
    tracker.say(f"finished: {session.folder}")


def _open(recipe: Recipe, world: World, stopper: Stopper, training: bool) -> Session:
    """Run folder, tracker, data and target of this rank."""
    state, resumed = _begin(recipe, world, training)
    active = world.first
    tracker = Tracker(
        recipe.folder, recipe.run.name, recipe.as_dict(), active, training, state.wandb_id, recipe.run.trackers
    )
    if recipe.run.resume and training and not resumed:
        tracker.say(f"nothing to resume in {recipe.folder}: starting from the beginning")
    if resumed:
        tracker.say(f"resuming {recipe.folder} in phase {state.phase}")
    lost = world.lead(lambda: _lost_before(recipe.folder) if resumed else [])
    # That of a trained run is its own: it lists what training lost, which a resumed one reads.
    listed = active and (training or not (recipe.folder / "state.json").exists())
    quarantine = Quarantine(recipe.folder / "quarantine.jsonl" if listed else None, fresh=True)
    corpus = _read_together(recipe, quarantine, world)
    tracker.say(f"read: {len(corpus)} of {corpus.n_read} records{_left_out(recipe, corpus)}{_quarantined(quarantine)}")
    for entry in lost:
        quarantine.add(**entry)
    if state.data not in (None, corpus.digest):
        raise InputError(
            f"run.resume: the data of {recipe.folder} has changed since{corpus.gone}; start over without "
            "run.resume=true"
        )
    target = placement.load(recipe.target, world, tracker)
    state.data, state.wandb_id = corpus.digest, tracker.wandb_id or state.wandb_id
    if active and training:
        state.save(recipe.folder)
        checkpoint.save_provenance(recipe.folder, recipe, target, corpus.digest, sys.argv)
    if training:
        check_beginning(recipe, target)
    # Before any question is answered: those of a store made from something else would be answered for nothing.
    store = None
    if recipe.data.features:
        wanted, taps = origin(recipe, corpus, target), head_taps(recipe, target)
        tracker.say(f"verifying {recipe.data.features}")
        store = open_store(Path(recipe.data.features), wanted, taps, world)
    known = frozenset((entry["source"], entry["line"]) for entry in lost)
    return Session(recipe, world, stopper, tracker, state, target, corpus, Prepared(), quarantine, store, known)


def _lost_before(folder: Path) -> list[dict[str, Any]]:
    """What the quarantine lists of samples that an earlier part of the run lost in training."""
    path = folder / "quarantine.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    entries = [json.loads(line) for line in lines if line.endswith("}")]
    return [entry for entry in entries if entry["reason"].startswith(LOST)]


def _begin(recipe: Recipe, world: World, training: bool) -> tuple[State, bool]:
    """Rank 0 prepares the run folder and tells the others where the run stands."""
    if not training:
        return State("head", world.size, None, None, recipe.as_dict()), False
    return world.lead(lambda: begin(recipe, world.size))


def _read_together(recipe: Recipe, quarantine: Quarantine, world: World) -> Corpus:
    """Rank 0 reads first, so that a synthetic corpus is made once and a fault is found once. With the instructions.

    Raises:
        InputError: on every rank. The data are wrong, or a rank has read others than rank 0: its indices would be those
            of other samples.
    """
    corpus: list[Corpus] = []
    world.lead(lambda: corpus.append(read_clean(recipe.data, quarantine)))
    fault = ""
    if not world.first:
        try:
            corpus.append(read_clean(recipe.data, quarantine))
        except InputError as error:
            fault = str(error)
    found = world.gather((corpus[0].digest if corpus else "", fault))
    for rank, (digest, said) in enumerate(found):
        if digest != found[0][0]:
            raise InputError(
                f"rank {rank} has not read the data that rank 0 has ({said or 'records or pictures differ'}); see "
                "that every machine can read the same files, and start again"
            )
    return instructed(corpus[0], recipe.data)


def _data_summary(session: Session) -> str:
    """One line: what became of all records."""
    n_used = len(session.prepared.dialogues)
    said = f"data: {n_used} of {session.corpus.n_read} records used{_left_out(session.recipe, session.corpus)}"
    if dropped := session.prepared.reasons(DEGENERATE):
        said += f", {sum(dropped.values())} dropped{_reasons(dropped)}"
    return said + _quarantined(session.quarantine)


def _left_out(recipe: Recipe, corpus: Corpus) -> str:
    listed = recipe.data.decontaminated
    return f", {sum(corpus.removed.values())} left out by {listed}{_reasons(corpus.removed)}" if listed else ""


def _quarantined(quarantine: Quarantine) -> str:
    if not quarantine.count:
        return ", none quarantined"
    listed = f", listed in {quarantine.path}" if quarantine.path is not None else ""
    return f", {quarantine.count} quarantined{_reasons(quarantine.reasons())}{listed}"


def _reasons(counts: Mapping[str, int]) -> str:
    """All of them, the most frequent first."""
    return f" ({'; '.join(f'{times}x {reason}' for reason, times in counts.items())})" if counts else ""


def _leave(world: World) -> None:
    """Everybody ends together: the launcher kills whoever is left when the first one ends with an error."""
    failing = sys.exc_info()[0]
    if failing is None or failing is Stopped:
        # A peer that is gone already is nobody to wait for.
        with contextlib.suppress(RuntimeError):
            world.barrier()
    dist.destroy_process_group()
