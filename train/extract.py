"""Writes the target's states of a corpus into a FeatureStore: many processes, each its own shards, resumable.

Invariant: which shards there are and what is in them depends on the conversations and the settings alone, so a killed
extraction goes on with any number of processes; what is finished is verified, not computed again.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mmspec import checkpoint
from mmspec.recipe import Recipe
from mmspec.records import RecordError
from mmspec.types import Features, InputError, Target
from train.corpus import Corpus, Picture
from train.encode import encode, length_limit, shown
from train.features import (
    COMMAND,
    DTYPES,
    SHARD_BYTES,
    Manifest,
    Origin,
    Row,
    Shard,
    check_origin,
    fault,
    note_path,
    pack,
    read_manifest,
    read_note,
    shard_file,
    state_names,
    token_bytes,
    write_shard,
)
from train.placement import uneven
from train.regenerate import answers_folder, answers_key
from train.session import Session
from train.stopping import Stopped


@dataclass(frozen=True)
class Settings:
    """What is written and how.

    Args:
        out: the store's folder.
        stored_as: one of `features.DTYPES`; empty: the target's own dtype.
        batch: conversations in one pass of the target.
        shard_tokens: a shard ends with the record that reaches so many; 0: as many as 256 MiB hold.
    """

    out: Path
    stored_as: str = ""
    batch: int = 8
    shard_tokens: int = 0


def origin(recipe: Recipe, corpus: Corpus, target: Target) -> Origin:
    """What features of this recipe come from, as far as it is known before there are answers."""
    name, key = checkpoint.discreet(target.name), answers_key(recipe, corpus, target)
    return Origin(name, target.fingerprint, recipe.target.arithmetic, target.vocabulary, key)


def new_folder(out: Path, what: str) -> None:
    """Makes the folder that shards go to, or takes one in which nothing was finished.

    Args:
        out: the folder.
        what: it is to hold, in words.

    Raises:
        InputError: it cannot be made, or holds something else.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out} cannot be made ({error.strerror}); name a writable folder") from error
    if any(path.suffix != ".tmp" for path in out.iterdir()):
        raise InputError(f"--out {out} is not empty and holds no {what}; name another folder")


def head_taps(recipe: Recipe, target: Target) -> tuple[int, ...]:
    """The hidden states that the recipe's head reads beside the last, known without building its weights."""
    with torch.device("meta"):
        head = checkpoint.build_head(recipe.head.kind, recipe.head.config.resolve(target.shape), recipe.loss)
    taps: tuple[int, ...] = head.taps  # type: ignore[assignment]
    return tuple(sorted(set(taps)))


def extract(session: Session, settings: Settings) -> Manifest:
    """Writes what is missing of a store and its manifest. Every rank must call, and gets the manifest.

    Raises:
        InputError: on every rank. The folder holds other features, the disk is too small, or a record cannot be read.
        Stopped: finished shards are kept.
    """
    out, world = settings.out, session.world
    manifest = world.lead(lambda: _begin(session, settings))
    writer = _Writer(session, manifest, settings)
    numbers = range(len(writer.shards))
    known = {shard.file: shard for shard in manifest.shards}
    damaged = [number for number in numbers[world.rank :: world.size] if not _kept(out, number, known)]
    missing = sorted(number for part in world.gather(damaged) for number in part)
    world.lead(lambda: _check_disk(session, manifest, settings, sum(writer.tokens(number) for number in missing)))
    if manifest.shards and missing:
        # While a shard is missing, nobody shall take the store for complete.
        manifest = replace(manifest, shards=())
        world.lead(lambda: manifest.save(out))
    in_shares(session, "features", missing, lambda number: len(writer.shards[number]), writer.write)
    return world.lead(lambda: _finish(session, manifest, settings, len(numbers)))


def in_shares(
    session: Session, what: str, missing: Sequence[int], records: Callable[[int], int], write: Callable[[int], None]
) -> None:
    """Has shards written, this rank its share. Every rank must call.

    Args:
        what: shown beside the progress bar.
        missing: numbers of the shards, the same on every rank.
        records: how many a shard has.
        write: writes one, wholly or not at all.

    Raises:
        InputError: on every rank, what the first rank that failed has to say.
        Stopped: finished shards are kept.
    """
    world, tracker = session.world, session.tracker
    share = missing[world.rank :: world.size]
    tracker.progress(what, sum(records(number) for number in share), 0, "record")
    problem: str | None = None
    try:
        with uneven(session.target):
            for number in share:
                write(number)
    except Stopped:
        pass
    except InputError as error:
        problem = str(error)
    tracker.end_progress()
    for found in filter(None, world.gather(problem)):
        raise InputError(found)
    session.stopper.check_together()


def _kept(out: Path, number: int, known: Mapping[str, Shard]) -> bool:
    """Whether a shard is there already, complete and undamaged; it then has a note, in whatever way that was known."""
    note = read_note(out, number) or known.get(shard_file(number))
    if note is None:
        return False
    found = fault(out, note)
    if found is None:
        checkpoint.write_json(note_path(out, number), asdict(note))
    else:
        print(f"features {out / note.file}: {found}; it is written again", flush=True)
    return found is None


def summary(manifest: Manifest, out: Path) -> str:
    """What was written, in one line."""
    gb, millions = manifest.bytes / 1e9, max(manifest.tokens, 1) / 1e6
    records, images = (sum(getattr(shard, name) for shard in manifest.shards) for name in ("records", "images"))
    return (
        f"{out}: {manifest.tokens:,} tokens of {records:,} records, {images:,} images, {len(manifest.shards)} shards, "
        f"{manifest.bytes:,} bytes, {gb / millions:.2f} GB per million tokens"
    )


class _Writer:
    """One rank's part of the work.

    Args:
        manifest: of the store, its `shards` not looked at.
    """

    def __init__(self, session: Session, manifest: Manifest, settings: Settings) -> None:
        self.session, self.manifest, self.settings = session, manifest, settings
        self.shards = _partition(session, manifest.shard_tokens)
        self._limit = length_limit(session.recipe.data, session.target)
        self._image_of = _image_numbers(session)
        # The first shard in which an image is shown keeps its features.
        self._keeper: dict[int, int] = {}
        for number, records in enumerate(self.shards):
            for record in records:
                self._keeper.setdefault(self._image_of.get(record, 0), number)

    def tokens(self, number: int) -> int:
        """Tokens of a shard."""
        return int(self.session.prepared.lengths[self.shards[number]].sum())

    def write(self, number: int) -> None:
        """Computes and writes a shard.

        Raises:
            InputError: a record cannot be read, or its states are not finite.
            Stopped: asked to stop; nothing of the shard is written.
        """
        lengths, rows = self.session.prepared.lengths, []
        images: dict[int, tuple[Tensor, Tensor | None]] = {}
        ordered = sorted(self.shards[number], key=lambda record: (lengths[record], record))
        for start in range(0, len(ordered), self.settings.batch):
            self.session.stopper.check()
            records = ordered[start : start + self.settings.batch]
            features = self._features(records)
            for row, record in enumerate(records):
                rows.append(self._row(features, row, record))
                image = rows[-1].image
                if image and self._keeper[image] == number and image not in images:
                    images[image] = self._host(features.embeds[row][features.visual[row]], record)
            self.session.tracker.advance(len(records))
        write_shard(self.settings.out, number, rows, images)

    def _features(self, records: Sequence[int]) -> Features:
        session = self.session
        prompts, answers = [], []
        for record in records:
            sample = session.corpus.samples[record]
            try:
                prompt, answer = encode(sample, session.prepared.dialogues[record], session.target, self._limit)
            except (RecordError, ValueError) as error:
                raise InputError(
                    f"record {sample.id} ({sample.file}:{sample.line}) could be read when it was answered: {error}"
                ) from error
            prompts.append(prompt)
            answers.append(answer)
        return session.target.teacher(prompts, answers, self.manifest.taps)

    def _row(self, features: Features, row: int, record: int) -> Row:
        n = int(features.valid[row].sum())
        tensors = [features.last_hidden, *(features.hidden[tap] for tap in self.manifest.taps)]
        states = {
            name: self._host(tensor[row, :n], record) for name, tensor in zip(state_names(self.manifest.taps), tensors)
        }
        ids, answer, visual = (x[row, :n].cpu() for x in (features.input_ids, features.answer, features.visual))
        return Row(record, ids, answer, visual, states, self._image_of.get(record, 0))

    def _host(self, states: Tensor, record: int) -> tuple[Tensor, Tensor | None]:
        stored, scale = pack(states, self.manifest.stored_as)
        if not bool((stored if scale is None else scale).isfinite().all()):
            sample = self.session.corpus.samples[record]
            raise InputError(
                f"record {sample.id} ({sample.file}:{sample.line}) has states that are not finite as "
                f"{self.manifest.stored_as}; use another target.dtype or --dtype, or leave the record out"
            )
        return stored.cpu(), None if scale is None else scale.cpu()


def _partition(session: Session, shard_tokens: int) -> list[list[int]]:
    """The records of each shard, in the order of the corpus."""
    shards: list[list[int]] = [[]]
    filled = 0
    for record in session.prepared.usable:
        if filled >= shard_tokens:
            shards.append([])
            filled = 0
        shards[-1].append(record)
        filled += int(session.prepared.lengths[record])
    return shards


def _image_numbers(session: Session) -> dict[int, int]:
    """A number for what each record shows: 8 bytes of the hash of its pictures, never 0. Every rank must call."""
    world, records = session.world, session.prepared.usable
    known: dict[Path, bytes] = {}
    mine = {}
    for record in records[world.rank :: world.size]:
        # A file that has vanished is reported with its record, when that is encoded.
        pictures = shown(session.corpus.samples[record], session.prepared.dialogues[record])
        hashes = [_hash(picture, known) for picture in pictures]
        if hashes:
            whole = hashes[0] if len(hashes) == 1 else hashlib.sha256(b"".join(hashes)).digest()
            mine[record] = int.from_bytes(whole[:8], "big", signed=True) or 1
    return {record: number for part in world.gather(mine) for record, number in part.items()}


def _hash(picture: Picture, known: dict[Path, bytes]) -> bytes:
    """The hash of a picture's content; files that several records show are read once."""
    if picture.path is None:
        return hashlib.sha256(picture.content()).digest()
    if picture.path not in known:
        known[picture.path] = hashlib.sha256(picture.content()).digest()
    return known[picture.path]


def _begin(session: Session, settings: Settings) -> Manifest:
    """The manifest to go on with: the folder's own where there is one, else a new one."""
    recipe, target, out = session.recipe, session.target, settings.out
    if not session.prepared.dialogues:
        raise InputError("no record is left to make features of after quarantine")
    stored_as = settings.stored_as or recipe.target.dtype
    if stored_as not in DTYPES:
        raise InputError(f"features cannot be stored as {stored_as}; give --dtype, one of: {', '.join(DTYPES)}")
    taps = head_taps(recipe, target)
    shard_tokens = settings.shard_tokens or max(1, SHARD_BYTES // token_bytes(target.shape, len(taps), stored_as))
    wanted = Manifest(
        origin(recipe, session.corpus, target), session.prepared.digest, taps, stored_as,
        target.shape.hidden_size, shard_tokens,
    )  # fmt: skip
    if not (out / "manifest.json").is_file():
        new_folder(out, "features")
        wanted.save(out)
        return wanted
    found = read_manifest(out)
    check_origin(out, found.origin, wanted.origin)
    for what, name in (
        ("answers", "answers"),
        ("taps", "taps"),
        ("--dtype", "stored_as"),
        ("--shard-tokens", "shard_tokens"),
    ):
        mine, its = getattr(found, name), getattr(wanted, name)
        if mine != its:
            raise InputError(f"features {out} were begun with {what} {mine}, not {its}; name another --out folder")
    return found


def _check_disk(session: Session, manifest: Manifest, settings: Settings, tokens: int) -> None:
    n_bytes = tokens * token_bytes(session.target.shape, len(manifest.taps), manifest.stored_as)
    free = shutil.disk_usage(settings.out).free
    session.tracker.say(f"features: {tokens:,} tokens to write, about {n_bytes / 1e9:.2f} GB; {free / 1e9:.0f} GB free")
    if n_bytes > free:
        raise InputError(
            f"--out {settings.out} has {free / 1e9:.1f} GB free, the features need {n_bytes / 1e9:.1f} GB; "
            "try --dtype float8, another disk, or train online without data.features"
        )


def _finish(session: Session, manifest: Manifest, settings: Settings, n_shards: int) -> Manifest:
    """Gathers the notes in the manifest, with the answers beside it."""
    out = settings.out
    answers = answers_folder(session.recipe, session.corpus, session.target)
    shutil.copytree(answers, out / "answers" / answers.name, dirs_exist_ok=True)
    shards: list[Shard] = []
    for number in range(n_shards):
        note = read_note(out, number)
        if note is None:
            raise InputError(f"features {out}: shard {number} has no note; the same {COMMAND} command again goes on")
        shards.append(note)
    done = replace(manifest, shards=tuple(shards))
    done.save(out)
    for number in range(n_shards):
        note_path(out, number).unlink()
    return done
