"""Resumable state on disk: a folder a step, complete or not there at all.

Layout: `state/<phase>/step-00000120/`, one safetensors file a rank and `manifest.json` with sizes and checksums.
Invariant: a folder of that name was renamed into place after all its bytes were on disk. What a killed run leaves is
called `*.tmp`; it and whatever else fails its checksums is passed over with one line of warning. Nothing is unpickled.

A tensor is called `<kind>:<name>@<start>`: a stretch of a flattened parameter. Readers ask for the stretches they need,
so neither the number of ranks nor the ZeRO stage that wrote them matters.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mmspec.types import InputError
from train.world import World

SCHEMA = 1
UNFINISHED = ".tmp"


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint.

    Args:
        folder: where it is.
        step: steps done.
        facts: what else its writer noted.
        files: names of its tensor files.
    """

    folder: Path
    step: int
    facts: Mapping[str, Any]
    files: tuple[str, ...]


def write(
    parent: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], keep: int, world: World
) -> None:
    """Writes a checkpoint, each rank its tensors, and removes all but the newest `keep`. Every rank must call.

    Raises:
        InputError: on every rank, where any could not write.
    """
    final = parent / f"step-{step:08d}"
    temporary = final.with_name(final.name + UNFINISHED)
    entry: dict[str, Any] = {}
    with _Together(world, parent):
        if world.first:
            _sweep(parent)
            temporary.mkdir(parents=True)
    with _Together(world, parent):
        entry = _write_file(temporary / f"rank-{world.rank:05d}.safetensors", tensors)
    entries = world.gather(entry)
    with _Together(world, parent):
        if world.first:
            manifest = {"schema": SCHEMA, "step": step, "facts": dict(facts), "files": entries}
            _write_bytes(temporary / "manifest.json", json.dumps(manifest, indent=1).encode())
            _flush(temporary)
            if final.exists():
                _remove(final)  # a damaged one that this run fell back from
            temporary.rename(final)
            _flush(parent)
            # Later ones are damaged: this run fell back from them. They must not count among those that are kept.
            later = [path for path in _finished(parent) if path.name > final.name]
            for old in [*later, *_finished(parent)[len(later) :][keep:]]:
                _remove(old)


def newest(parent: Path, world: World, warn: Callable[[str], None]) -> Saved | None:
    """The newest checkpoint that is whole, or None. Every rank must call; they share the work of checking.

    Args:
        parent: of the checkpoints' folders.
        warn: told, in one line each, of those that are passed over.
    """
    for torn in world.lead(lambda: sorted(path.name for path in parent.glob(f"*{UNFINISHED}"))):
        warn(f"{parent / torn} was never finished: ignored")
    for name in world.lead(lambda: [path.name for path in _finished(parent)]):
        found, faults = None, []
        try:
            found, sums = _manifest(parent / name)
            mine = list(sums.items())[world.rank :: world.size]
            faults = [fault for file, wanted in mine if (fault := _fault(parent / name / file, wanted))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            faults = [f"manifest.json cannot be read ({type(error).__name__})"]
        faults = sorted({fault for part in world.gather(faults) for fault in part})
        if not faults and found is not None:
            return found
        warn(f"{parent / name} is damaged ({faults[0]}): ignored, going back to the one before")
    return None


class Reader:
    """Reads stretches of a checkpoint's tensors; a context manager is not needed, files are mapped."""

    def __init__(self, saved: Saved) -> None:
        self.saved = saved
        self._pieces: dict[tuple[str, str], list[tuple[int, Any, str]]] = {}
        for name in saved.files:
            try:
                file = safe_open(str(saved.folder / name), framework="pt")
            except (SafetensorError, OSError) as error:
                raise self._damaged(name) from error
            for key in file.keys():  # noqa: SIM118 (a file is no mapping)
                kind, _, rest = key.partition(":")
                tensor, _, start = rest.rpartition("@")
                self._pieces.setdefault((kind, tensor), []).append((int(start), file, key))

    def fill(self, kind: str, name: str, start: int, out: Tensor) -> None:
        """Copies the stretch [start, start + n) into out [n], converting to its dtype.

        Raises:
            InputError: the checkpoint has not all of it.
        """
        done = 0
        for begin, file, key in self._pieces.get((kind, name), []):
            piece = file.get_slice(key)
            first, last = max(begin, start), min(begin + piece.get_shape()[0], start + len(out))
            if first < last:
                out[first - start : last - start].copy_(piece[first - begin : last - begin])
                done += last - first
        if done != len(out):
            raise self._damaged(f"{kind} of {name}")

    def _damaged(self, what: str) -> InputError:
        return InputError(f"{self.saved.folder}: {what} is missing or damaged; start over without run.resume=true")


def key(kind: str, name: str, start: int) -> str:
    """What a stretch is called."""
    return f"{kind}:{name}@{start}"


class _Together:
    """A part of writing that must succeed on every rank before any goes on."""

    def __init__(self, world: World, folder: Path) -> None:
        self._world, self._folder = world, folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if error is not None and not isinstance(error, OSError):
            return
        said = "" if error is None else f"{error.strerror or type(error).__name__}"
        faults = sorted(fault for fault in self._world.gather(said) if fault)
        if faults:
            raise InputError(f"resumable state cannot be written to {self._folder} ({faults[0]})") from error


def _finished(parent: Path) -> list[Path]:
    """Folders that were renamed into place, the newest first."""
    found = [path for path in parent.glob("step-*") if path.is_dir() and not path.name.endswith(UNFINISHED)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def _manifest(folder: Path) -> tuple[Saved, dict[str, dict[str, Any]]]:
    values = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if values["schema"] != SCHEMA:
        raise ValueError(f"schema {values['schema']}")
    sums = {str(entry["file"]): entry for entry in values["files"]}
    return Saved(folder, int(values["step"]), values["facts"], tuple(sums)), sums


def _fault(path: Path, wanted: Mapping[str, Any]) -> str | None:
    """What is wrong with a file, or None."""
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != wanted["bytes"]:
        return f"{path.name} has {path.stat().st_size} of {wanted['bytes']} bytes"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return None if found == wanted["sha256"] else f"{path.name} fails its checksum"


def _write_file(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    content = save({name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()})
    _write_bytes(path, content)
    return {"file": path.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _write_bytes(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """Makes names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(folder: Path) -> None:
    """Removes a checkpoint; from its first moment on it is no finished one any more."""
    gone = folder.with_name(folder.name + ".old" + UNFINISHED)
    folder.rename(gone)
    shutil.rmtree(gone)


def _sweep(parent: Path) -> None:
    """Removes what killed runs left unfinished."""
    for torn in parent.glob(f"*{UNFINISHED}"):
        shutil.rmtree(torn)
