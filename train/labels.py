"""Visual dependence on disk: measured once, in shards, for the loss weights of any number of runs.

Invariant: a shard depends on records, target and settings only, not on the process that wrote it, and one with a note
beside it is complete; the manifest is written last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmspec import checkpoint
from mmspec.dependence import Dependence, answer_places
from mmspec.recipe import build_config
from mmspec.types import COUNTERFACTUALS, InputError
from train.dependence import Scale, image_mean, measured
from train.extract import in_shares, new_folder, origin
from train.features import Origin, checksum
from train.session import Session

SCHEMA = 1
COMMAND = "scripts/measure_dependence.py"
SHARD_RECORDS = 256
UNKNOWN = Scale(0.0, 0.0)


@dataclass(frozen=True)
class Part:
    """One shard: its file, records, answer tokens and checksum."""

    file: str
    records: int
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a store of dependence holds.

    Args:
        origin: target, tokenizer and data it was measured for.
        answers: hash of the conversations, replies included.
        counterfactual: one of COUNTERFACTUALS.
        scale: see Scale.
        parts: the shards; empty until all are there.
    """

    origin: Origin
    answers: str
    counterfactual: str
    scale: Scale = UNKNOWN
    parts: tuple[Part, ...] = ()

    def save(self, folder: Path) -> None:
        checkpoint.write_json(folder / "manifest.json", {"schema": SCHEMA, **asdict(self)})


def read_manifest(folder: Path) -> Manifest:
    """Reads `manifest.json`. Raises InputError where there is none, or it is damaged."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise InputError(f"data.dependence={folder} holds no manifest.json; write it with {COMMAND} RECIPE --out DIR")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("schema") != SCHEMA:
            raise ValueError("of another version")
        values["origin"] = build_config(str(path), Origin, values["origin"])
        values["scale"] = build_config(str(path), Scale, values["scale"])
        values["parts"] = tuple(build_config(str(path), Part, entry) for entry in values["parts"])
        manifest: Manifest = build_config(str(path), Manifest, values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is damaged ({type(error).__name__}: {error}); measure again with {COMMAND}"
        ) from error
    return manifest


class Store:
    """A finished store, all of it in memory: some bytes per answer token.

    Args:
        folder, manifest: of it.

    Raises:
        InputError: it is not finished, or a shard is missing or damaged.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        if not manifest.parts:
            raise InputError(f"data.dependence={folder} is not finished; the same {COMMAND} command goes on with it")
        self.found: dict[int, Dependence] = {}
        for part in manifest.parts:
            self.found |= _read_shard(folder, part)

    def kl(self, record: int) -> Tensor:
        """[n] fp32 of a record's answer tokens."""
        if record not in self.found:
            raise InputError(f"data.dependence={self.folder} lacks record {record}; measure again with {COMMAND}")
        return self.found[record].kl


class Labels:
    """Loss weights from a finished store.

    Args:
        store: where the dependence is.
        w: `loss.dependence`.
    """

    def __init__(self, store: Store, w: float) -> None:
        self._store, self._w = store, w

    def of(self, record: int, answer: Tensor) -> Tensor:
        """[L] fp32 for a conversation with these reply numbers [L]; 1 outside answers.

        Raises:
            InputError: the store has another number of answer tokens.
        """
        weights, places = torch.ones(len(answer)), answer_places(answer.unsqueeze(0))[0]
        kl = self._store.kl(record)
        if int(places.sum()) != len(kl):
            raise InputError(
                f"data.dependence={self._store.folder}: record {record} has {len(kl)} answer tokens there and "
                f"{int(places.sum())} here; measure it again with {COMMAND}"
            )
        weights[places] = self._store.manifest.scale.weights(kl, self._w)
        return weights


def open_labels(session: Session, folder: Path) -> Labels:
    """The labels of a folder for a session's data.

    Raises:
        InputError: they were measured for another target, tokenizer, data or answers, or are damaged.
    """
    manifest, recipe = read_manifest(folder), session.recipe
    wanted = origin(recipe, session.corpus, session.target)
    pairs: list[tuple[str, Any, Any]] = [
        ("target", (manifest.origin.target, manifest.origin.fingerprint), (wanted.target, wanted.fingerprint)),
        ("target dtype", manifest.origin.dtype, wanted.dtype),
        ("tokenizer", manifest.origin.vocabulary, wanted.vocabulary),
        ("data and answer settings", manifest.origin.data, wanted.data),
        ("answers", manifest.answers, session.prepared.digest),
    ]
    for what, mine, its in pairs:
        if mine[-1] != its[-1] if isinstance(mine, tuple) else mine != its:
            raise InputError(
                f"data.dependence={folder} was measured with {what} {mine}, but the recipe has {its}; "
                f"measure again with {COMMAND}"
            )
    return Labels(Store(folder, manifest), recipe.loss.dependence)


def write_store(session: Session, out: Path, counterfactual: str = "mean", batch: int = 8) -> Manifest:
    """Measures what is missing of a store. Every rank must call, and gets the manifest.

    Raises:
        InputError: on every rank. The folder holds something else, or a record cannot be read.
        Stopped: finished shards are kept.
    """
    world = session.world
    if counterfactual not in COUNTERFACTUALS:
        raise InputError(f"--counterfactual {counterfactual}; use one of {', '.join(COUNTERFACTUALS)}")
    manifest = world.lead(lambda: _begin(session, out, counterfactual))
    records = sorted(session.prepared.dialogues)
    shards = [records[at : at + SHARD_RECORDS] for at in range(0, len(records), SHARD_RECORDS)]
    if not shards:
        raise InputError("no record is left to measure after quarantine")
    missing = world.lead(lambda: [number for number in range(len(shards)) if _note(out, number) is None])
    instead = image_mean(session) if counterfactual == "mean" and missing else None
    if missing and counterfactual == "mean" and instead is None:
        raise InputError("no record has an image: nothing depends on one")

    def write(number: int) -> None:
        _write_shard(session, out, number, shards[number], batch, counterfactual, instead)

    in_shares(session, "dependence", missing, lambda number: len(shards[number]), write)
    return world.lead(lambda: _finish(out, manifest, len(shards)))


def _begin(session: Session, out: Path, counterfactual: str) -> Manifest:
    """The manifest to go on with; the folder's own must be of the same data."""
    made_from = origin(session.recipe, session.corpus, session.target)
    wanted = Manifest(made_from, session.prepared.digest, counterfactual)
    if (out / "manifest.json").is_file():
        found = read_manifest(out)
        if replace(found, scale=wanted.scale, parts=()) != wanted:
            raise InputError(f"--out {out} holds the dependence of other data, target or way; name another folder")
        return found
    new_folder(out, "labels")
    wanted.save(out)
    return wanted


def _write_shard(
    session: Session, out: Path, number: int, records: Sequence[int], batch: int, way: str, instead: Tensor | None
) -> None:
    by_record: dict[int, Dependence] = {}
    lengths = session.prepared.lengths
    for some, found in measured(session, sorted(records, key=lambda k: (int(lengths[k]), k)), batch, way, instead):
        session.stopper.check()
        by_record |= dict(zip(some, found))
        session.tracker.advance(len(some))
    rows = [by_record[record] for record in records]
    path = out / f"shard-{number:05d}.safetensors"
    _note_path(out, number).unlink(missing_ok=True)
    tensors = {
        "record": torch.tensor(records),
        "count": torch.tensor([len(row.kl) for row in rows]),
        "kl": torch.cat([row.kl for row in rows]).half(),
        "js": torch.cat([row.js for row in rows]).half(),
        "changed": torch.cat([row.changed for row in rows]),
    }
    checkpoint.write_tensors(path, tensors)
    part = Part(path.name, len(records), len(tensors["kl"]), checksum(path))
    checkpoint.write_json(_note_path(out, number), asdict(part))


def _note_path(out: Path, number: int) -> Path:
    return out / f"shard-{number:05d}.json"


def _note(out: Path, number: int) -> Part | None:
    """What the note of a complete, undamaged shard says; None: it is to be written."""
    path = _note_path(out, number)
    try:
        part: Part = build_config(str(path), Part, json.loads(path.read_text(encoding="utf-8")))
        return part if checksum(out / part.file) == part.sha256 else None
    except (OSError, ValueError):
        return None


def _read_shard(folder: Path, part: Part) -> Mapping[int, Dependence]:
    path = folder / part.file
    try:
        if checksum(path) != part.sha256:
            raise InputError(f"{path} is damaged (its checksum is another); measure again with {COMMAND}")
        tensors = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}); measure again with {COMMAND}") from error
    counts = tensors["count"].tolist()
    columns = (tensors["kl"].float().split(counts), tensors["js"].float().split(counts))
    rows = zip(*columns, tensors["changed"].split(counts))
    return {record: Dependence(*row) for record, row in zip(tensors["record"].tolist(), rows)}


def _finish(out: Path, manifest: Manifest, n_shards: int) -> Manifest:
    """Writes the manifest with what all shards hold, and the scale of all their tokens."""
    parts = [_note(out, number) for number in range(n_shards)]
    if any(part is None for part in parts):
        raise InputError(f"{out}: a shard is missing; the same {COMMAND} command again goes on")
    whole = replace(manifest, parts=tuple(part for part in parts if part is not None))
    every = torch.cat([found.kl for found in Store(out, whole).found.values()])
    done = replace(whole, scale=Scale.of(every))
    done.save(out)
    return done


def distribution(session: Session, store: Store) -> list[dict[str, Any]]:
    """How dependence is distributed, overall and by topic: one row each, KL in nats."""
    topics: dict[str, list[Dependence]] = {"all": []}
    for record, found in sorted(store.found.items()):
        topics["all"].append(found)
        topics.setdefault(session.corpus.samples[record].topic or "no topic", []).append(found)
    rows = []
    for topic, members in topics.items():
        kl, changed = torch.cat([m.kl for m in members]), torch.cat([m.changed for m in members])
        if len(kl):
            rows.append({"topic": topic, **_figures(kl, changed)})
    return rows


def _figures(kl: Tensor, changed: Tensor) -> dict[str, Any]:
    """Of the tokens of one topic, at least one."""
    # Not torch's quantile, which refuses more than 2^24 values.
    median, p90, p99 = np.quantile(kl.numpy(), [0.5, 0.9, 0.99]).tolist()
    return {
        "tokens": len(kl), "mean": float(kl.mean()), "p50": median, "p90": p90, "p99": p99,
        "above 0.1": float((kl > 0.1).float().mean()), "changed": float(changed.float().mean()),
    }  # fmt: skip
