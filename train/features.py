"""A folder with the frozen target's states of a corpus: what training reads instead of running the target.

Layout: `manifest.json`, `shard-00000.safetensors` and so on, `answers/` (the conversations the states are of).
Invariant: a shard depends on records, target and settings only, not on the process that wrote it; one with an entry in
the manifest (or, while the store is being written, with a note beside it) is complete, and its checksum says so.

Per token there are its id, reply number and image mark, the last hidden state and the tapped ones: never logits, which
the frozen unembedding gives, and no text embedding, which the frozen table gives. The projected features of an image
are kept once, in the shard of the first record that shows it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmspec import checkpoint
from mmspec.recipe import build_config
from mmspec.types import InputError, TargetShape
from train.world import World

SCHEMA = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float8": torch.float8_e4m3fn}
"""What states can be stored as; float8 has a scale per token."""
SHARD_BYTES = 256 * 2**20
COMMAND = "scripts/extract_features.py"
_FP8_MAX = 448.0
_LAST, _IMAGES = "last_hidden", "images"


@dataclass(frozen=True)
class Origin:
    """What a store was made from; training from it must agree in all of this.

    Args:
        target: its name, for messages only.
        fingerprint: of the target's weights.
        dtype: what the target computed in, and its quantisation where there is one.
        vocabulary: fingerprint of the tokenizer.
        data: key of corpus and answer settings.
    """

    target: str
    fingerprint: str
    dtype: str
    vocabulary: str
    data: str


@dataclass(frozen=True)
class Shard:
    """One file of a store, with its checksum."""

    file: str
    records: int
    tokens: int
    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a store holds.

    Args:
        origin: what it was made from.
        answers: hash of the conversations, replies included.
        taps: indices into the target's hidden_states, beside the last hidden state.
        stored_as: one of DTYPES.
        hidden_size: D.
        shard_tokens: a shard ends with the record that reaches so many.
        shards: empty until all are there.
    """

    origin: Origin
    answers: str
    taps: tuple[int, ...]
    stored_as: str
    hidden_size: int
    shard_tokens: int
    shards: tuple[Shard, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens in all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.bytes for shard in self.shards)

    def save(self, folder: Path) -> None:
        """Writes `manifest.json`."""
        checkpoint.write_json(folder / "manifest.json", {"schema": SCHEMA, **dataclasses.asdict(self)})


def read_manifest(folder: Path) -> Manifest:
    """Reads `manifest.json`.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise InputError(f"features {folder} hold no manifest.json; write them with {COMMAND} RECIPE --out {folder}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        schema = values.pop("schema")
        if schema == SCHEMA:
            values["origin"] = build_config(str(path), Origin, values["origin"])
            values["shards"] = tuple(build_config(str(path), Shard, entry) for entry in values["shards"])
            manifest: Manifest = build_config(str(path), Manifest, values)
            return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"features {path} is damaged ({type(error).__name__}: {error}); write it again") from error
    raise InputError(f"features {path} has schema {schema}, this version reads {SCHEMA}; write it again with {COMMAND}")


def check_origin(folder: Path, found: Origin, wanted: Origin) -> None:
    """Compares what a store was made from with what a recipe wants.

    Raises:
        InputError: they differ; both values are named.
    """
    words = {
        "fingerprint": "target",
        "dtype": "target dtype",
        "vocabulary": "tokenizer",
        "data": "data and answer settings",
    }
    for name, what in words.items():
        mine, its = getattr(found, name), getattr(wanted, name)
        if mine != its:
            if name == "fingerprint":
                mine, its = f"{found.target} ({mine})", f"{wanted.target} ({its})"
            raise InputError(
                f"features {folder} were made with {what} {mine}, but the recipe has {what} {its}; "
                f"write others with {COMMAND}, or train without data.features"
            )


def token_bytes(shape: TargetShape, n_taps: int, stored_as: str) -> int:
    """Bytes of one token on disk."""
    state = shape.hidden_size * DTYPES[stored_as].itemsize + (4 if stored_as == "float8" else 0)
    return (1 + n_taps) * state + 7


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fault(folder: Path, shard: Shard) -> str | None:
    """What is wrong with a shard's file as a whole, or None."""
    path = folder / shard.file
    if not path.is_file():
        return "it is missing"
    if path.stat().st_size != shard.bytes:
        return f"it has {path.stat().st_size} bytes, the manifest says {shard.bytes}"
    found = checksum(path)
    if found != shard.sha256:
        return f"checksum {found[:12]}, the manifest says {shard.sha256[:12]}: damaged, or of another store"
    return None


# ---- states on disk ----


def pack(states: Tensor, stored_as: str) -> tuple[Tensor, Tensor | None]:
    """States [N, D] as they are stored, and with float8 their scales [N] fp32: states = stored * scale."""
    if stored_as != "float8":
        return states.to(DTYPES[stored_as]), None
    scale = states.float().abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny * _FP8_MAX) / _FP8_MAX
    return (states.float() / scale.unsqueeze(-1)).to(torch.float8_e4m3fn), scale


def unpack(stored: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The states again, in `dtype`."""
    return stored.to(dtype) if scale is None else (stored.float() * scale.unsqueeze(-1)).to(dtype)


@dataclass(frozen=True)
class Row:
    """One conversation as it is written, on the host.

    Args:
        record: index in the corpus.
        ids, answer, visual: [L], as in `Features`.
        states: {"last_hidden" or "hidden.<tap>": packed [L, D]}.
        image: number of its image (of the image's content), 0: none.
    """

    record: int
    ids: Tensor
    answer: Tensor
    visual: Tensor
    states: Mapping[str, tuple[Tensor, Tensor | None]]
    image: int


def state_names(taps: Sequence[int]) -> list[str]:
    """Names of the states that are stored."""
    return [_LAST, *(f"hidden.{tap}" for tap in taps)]


def shard_file(number: int) -> str:
    """Name of a shard."""
    return f"shard-{number:05d}.safetensors"


def write_shard(
    folder: Path, number: int, rows: Sequence[Row], images: Mapping[int, tuple[Tensor, Tensor | None]]
) -> Shard:
    """Writes a shard, and beside it the note that it is complete.

    Args:
        rows: its records.
        images: {number: packed features [n_visual, D]} of the images that it is the first to show.
    """
    tensors = {
        "record": torch.tensor([row.record for row in rows]),
        "start": _starts([len(row.ids) for row in rows]),
        "image": torch.tensor([row.image for row in rows]),
        "ids": torch.cat([row.ids for row in rows]).to(torch.int32),
        "answer": torch.cat([row.answer for row in rows]).to(torch.int16),
        "visual": torch.cat([row.visual for row in rows]),
        "image_number": torch.tensor(list(images), dtype=torch.long),
        "image_start": _starts([len(stored) for stored, _ in images.values()]),
    }
    parts = {name: [row.states[name] for row in rows] for name in rows[0].states}
    if images:
        parts[_IMAGES] = list(images.values())
    for name, packed in parts.items():
        tensors[name] = torch.cat([stored for stored, _ in packed])
        if packed[0][1] is not None:
            tensors[f"{name}.scale"] = torch.cat([scale for _, scale in packed if scale is not None])
    path = folder / shard_file(number)
    # No note while there is no whole file to go with it: a kill in between leaves the shard to be written again.
    note_path(folder, number).unlink(missing_ok=True)
    checkpoint.write_tensors(path, tensors)
    n_tokens = sum(len(row.ids) for row in rows)
    shard = Shard(path.name, len(rows), n_tokens, len(images), path.stat().st_size, checksum(path))
    checkpoint.write_json(note_path(folder, number), dataclasses.asdict(shard))
    return shard


def note_path(folder: Path, number: int) -> Path:
    """The note that a shard is complete, until the manifest says so."""
    return folder / f"shard-{number:05d}.json"


def read_note(folder: Path, number: int) -> Shard | None:
    """What the note of a shard says; None where it was never finished."""
    path = note_path(folder, number)
    if not path.is_file():
        return None
    try:
        shard: Shard = build_config(str(path), Shard, json.loads(path.read_text(encoding="utf-8")))
    except ValueError:
        return None
    return shard


def _starts(lengths: Sequence[int]) -> Tensor:
    """Where each of some stretches begins, and the end of the last: [n + 1] int64."""
    return torch.tensor([0, *lengths]).cumsum(0)


# ---- reading ----


@dataclass(frozen=True)
class Place:
    """Rows `start:stop` of a shard's tensors; of a record also the number of its image, 0: none."""

    shard: int
    start: int
    stop: int
    image: int = 0


@dataclass(frozen=True)
class StoredRow:
    """One conversation as it is read: states and image features still packed."""

    ids: Tensor
    answer: Tensor
    visual: Tensor
    states: Mapping[str, tuple[Tensor, Tensor | None]]
    image: tuple[Tensor, Tensor | None] | None


class FeatureStore:
    """A complete store, read in any order. One thread at a time.

    Args:
        folder: where it is.
        manifest: of it.
        taps: those to read, all of them in the store.
    """

    def __init__(self, folder: Path, manifest: Manifest, taps: Sequence[int]) -> None:
        self.folder, self.manifest, self.taps = folder, manifest, tuple(taps)
        self._files: list[Any] = []
        self._places: dict[int, Place] = {}
        self._images: dict[int, Place] = {}
        for number, shard in enumerate(manifest.shards):
            try:
                self._files.append(safe_open(str(folder / shard.file), framework="pt"))
                self._index(number)
            except (SafetensorError, OSError, ValueError) as error:
                raise self._damaged(number, error) from error

    def __contains__(self, record: int) -> bool:
        return record in self._places

    def read(self, record: int) -> StoredRow:
        """One conversation.

        Raises:
            InputError: its shard cannot be read (any more).
        """
        place = self._places[record]
        ids, answer, visual = (self._slice(name, place) for name in ("ids", "answer", "visual"))
        states = {name: self._packed(name, place) for name in state_names(self.taps)}
        image = self._packed(_IMAGES, self._images[place.image]) if place.image else None
        return StoredRow(ids.long(), answer.long(), visual, states, image)

    def answer(self, record: int) -> Tensor:
        """The reply numbers of a conversation alone, [L] int64. Raises as `read`."""
        return self._slice("answer", self._places[record]).long()

    def _index(self, number: int) -> None:
        file = self._files[number]
        starts, images = file.get_tensor("start").tolist(), file.get_tensor("image").tolist()
        for row, record in enumerate(file.get_tensor("record").tolist()):
            self._places[record] = Place(number, starts[row], starts[row + 1], images[row])
        starts = file.get_tensor("image_start").tolist()
        for row, image in enumerate(file.get_tensor("image_number").tolist()):
            self._images[image] = Place(number, starts[row], starts[row + 1])

    def _packed(self, name: str, place: Place) -> tuple[Tensor, Tensor | None]:
        scaled = self.manifest.stored_as == "float8"
        return self._slice(name, place), self._slice(f"{name}.scale", place) if scaled else None

    def _slice(self, name: str, place: Place) -> Tensor:
        try:
            rows: Tensor = self._files[place.shard].get_slice(name)[place.start : place.stop]
            return rows
        except (SafetensorError, OSError, ValueError, IndexError) as error:
            raise self._damaged(place.shard, error) from error

    def _damaged(self, number: int, error: Exception) -> InputError:
        path = self.folder / self.manifest.shards[number].file
        return InputError(f"features {path}: cannot be read ({error}); write it again with {COMMAND}")


def open_store(folder: Path, wanted: Origin, taps: Sequence[int], world: World) -> FeatureStore:
    """Opens a store after verifying that it is the recipe's and whole. Every rank must call; they share the work.

    Args:
        wanted: what the recipe says.
        taps: those of its head; the store may hold more.

    Raises:
        InputError: on every rank. It is another target's, tokenizer's or data set's, lacks a tap, is not finished, or a
            shard is missing or damaged.
    """
    manifest = read_manifest(folder)
    check_origin(folder, manifest.origin, wanted)
    if lacking := sorted(set(taps) - set(manifest.taps)):
        raise InputError(
            f"features {folder} hold the hidden states {_listed(manifest.taps)}, but the recipe's head reads "
            f"{_listed(taps)}, so {_listed(lacking)} missing; write others with {COMMAND}"
        )
    if not manifest.shards:
        raise InputError(f"features {folder} are not finished; the same {COMMAND} command again goes on with them")
    mine = manifest.shards[world.rank :: world.size]
    faults = [(shard.file, found) for shard in mine if (found := fault(folder, shard)) is not None]
    for file, found in sorted(pair for pairs in world.gather(faults) for pair in pairs):
        raise InputError(f"features {folder / file}: {found}; write it again with {COMMAND} --out {folder}")
    return FeatureStore(folder, manifest, taps)


def _listed(taps: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(taps))) or "none but the last"
