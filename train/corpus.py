"""The training conversations of a recipe's sources: what is usable of them, as one long sequence.

Invariant: reading a source gives usable samples plus one quarantine entry for every other record, and is a pure
function of the files: every rank reads the same. A sample is decoded when it is asked for; until then a few bytes of it
are held. Pictures are opened later still, by whoever encodes the sample.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
from numpy.typing import NDArray

from mmspec.recipe import Source
from mmspec.records import Quarantine, RecordError
from mmspec.types import InputError
from train.sample import IMAGE_MARK, Picture, Sample
from train.schemas import parse, record_id, topic_of

if TYPE_CHECKING:
    from train.tables import Row, Table

__all__ = ["IMAGE_MARK", "Corpus", "Picture", "Sample", "Samples", "check_sources", "locate", "read"]

SYNTHETIC, HUB = "synth:", "hub:"
BLOCK = 1000
"""Rows that are scanned at a time."""
_NUMBERED = re.compile(r"(?:^|[-_.])\d+(?=[-_.]|$)")
"""Where the number of a shard begins in its name, as in validation-00000-of-00002."""


@dataclass(frozen=True)
class Part:
    """What is usable of one source.

    Args:
        table: its records.
        layout: `data.sources.format`.
        rows: [n] of the usable ones, ascending.
        turns: [n] int32, how many each has.
        pictured: [n] bool, whether each has a picture.
    """

    table: Table
    layout: str | None
    rows: NDArray[np.int64]
    turns: NDArray[np.int32]
    pictured: NDArray[np.bool_]

    def line(self, number: int) -> int:
        """Where `rows[number]` stands in its file: the later, the further down."""
        return self.table.line(int(self.rows[number]))

    def sample(self, number: int) -> Sample:
        """The sample of `rows[number]`."""
        row = int(self.rows[number])
        return parse(self.table.record(row), self.table.file, self.table.folder, self.table.line(row), self.layout)


class Samples(Sequence[Sample]):
    """Samples in order of sources and files, each decoded anew when it is asked for.

    Args:
        parts: what is usable of each source.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self._ends = list(accumulate(len(part.rows) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        part, number = self._find(index)
        return part.sample(number)

    def __iter__(self) -> Iterator[Sample]:
        return (part.sample(number) for part in self.parts for number in range(len(part.rows)))

    def place(self, index: int) -> tuple[str, int]:
        """File and line of a sample, without decoding it."""
        part, number = self._find(index)
        return str(part.table.file), part.line(number)

    def find(self, file: str, line: int) -> list[int]:
        """The samples of a file and line: none, one, or several where a file is several sources."""
        found = []
        for part, end in zip(self.parts, self._ends):
            if str(part.table.file) == file:
                number = bisect_left(range(len(part.rows)), line, key=part.line)
                if number < len(part.rows) and part.line(number) == line:
                    found.append(end - len(part.rows) + number)
        return found

    @property
    def turns(self) -> NDArray[np.int32]:
        """How many turns each has, [len] int32, without decoding any."""
        return np.concatenate([np.zeros(0, np.int32), *(part.turns for part in self.parts)])

    @property
    def pictured(self) -> NDArray[np.bool_]:
        """Which have a picture, [len] bool, without decoding any."""
        return np.concatenate([np.zeros(0, np.bool_), *(part.pictured for part in self.parts)])

    def pick(self, kept: Sequence[int]) -> Samples:
        """These alone, in their order here."""
        chosen, parts, start = np.sort(np.asarray(kept, dtype=np.int64)), [], 0
        for part, end in zip(self.parts, self._ends):
            mine = chosen[(chosen >= start) & (chosen < end)] - start
            parts.append(replace(part, rows=part.rows[mine], turns=part.turns[mine], pictured=part.pictured[mine]))
            start = end
        return Samples(parts)

    def _find(self, index: int) -> tuple[Part, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index = int(index) % len(self)
        which = bisect_right(self._ends, index)
        return self.parts[which], index - (self._ends[which - 1] if which else 0)


@dataclass(frozen=True)
class Corpus:
    """All usable samples of a recipe's sources.

    Args:
        samples: in order of sources and files.
        weights: [len(samples)] float64, of each sample's source.
        n_read: records read, the quarantined included.
        digest: hash of the conversations and of the sizes of their pictures.
        removed: how many more there were that `train.decontaminate` left out, by rule.
        missing: records that are quarantined because a picture is not there, and which.
    """

    samples: Samples
    weights: NDArray[np.float64]
    n_read: int
    digest: str
    removed: Mapping[str, int] = field(default_factory=dict)
    missing: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def gone(self) -> str:
        """What of the pictures may have made this another corpus than before, for an error message; "" for nothing."""
        if not self.missing:
            return ""
        n = len(self.missing)
        return f" (records without their picture: {n}, the first {self.missing[0]}; put back what was there)"


def read(sources: Sequence[Source], quarantine: Quarantine) -> Corpus:
    """Reads every source once, from its first record to its last.

    Raises:
        InputError: a source is missing or no set of records, has none of the topic that is asked for, or nothing in all
            of them is usable.
    """
    parts: list[Part] = []
    missing: list[str] = []
    n_read, digest = 0, hashlib.sha256()
    for source in sources:
        table = open_source(source)
        rows, turns, pictured = array("q"), array("i"), array("b")
        for row, found in _rows(table, source):
            n_read += 1
            try:
                sample = _usable(found, table, source)
            except RecordError as error:
                quarantine.add(table.file, found.line, record_id(found.record), str(error))
                if isinstance(error, _Missing):
                    missing.append(f"{table.file}:{found.line}, {error.picture}")
                continue
            rows.append(row)
            turns.append(len(sample.turns))
            pictured.append(bool(sample.pictures))
            sizes = [picture.size() for picture in sample.pictures]
            said = [sample.id, sample.system, sample.turns, sample.answers, sizes, found.sizes]
            digest.update(json.dumps(said).encode())
        held = np.frombuffer(rows, np.int64), np.frombuffer(turns, np.int32), np.frombuffer(pictured, np.bool_)
        parts.append(Part(table, source.format, *held))
    samples = Samples(parts)
    if not samples:
        most = next(iter(quarantine.reasons()), "there are none")
        places = ", ".join(source.path for source in sources)
        raise InputError(f"no usable record among the {n_read} of {places} (most often: {most})")
    weights = np.repeat([source.weight for source in sources], [len(part.rows) for part in parts])
    return Corpus(samples, weights, n_read, digest.hexdigest()[:16], missing=missing)


def open_source(source: Source) -> Table:
    """The records of a source, as far as it is asked for as a whole: `limit` and `topic` are not looked at.

    Raises:
        InputError: it is not there or cannot be read.
    """
    # Here, so that the planner, which opens nothing, need not load Arrow.
    from train.tables import open_files, open_hub, open_saved

    if source.path.startswith(HUB):
        return open_hub(source.path, source.split)
    path = locate(source)
    if not path.is_dir():
        if source.split is not None:
            raise InputError(f"data file {path} has no splits, but split={source.split} is asked for; leave it out")
        return open_files([path], path, path.parent)
    if _is_saved(path):
        return open_saved(path, source.split)
    return open_files(_shards(path, source.split), path, path)


def _shards(folder: Path, split: str | None) -> list[Path]:
    """The Parquet files of a split of a folder, `train` unless one is given; all where their names tell of none."""
    shards = sorted(folder.glob("*.parquet"))
    chosen = [shard for shard in shards if shard.name.startswith(split or "train")]
    if chosen:
        return chosen
    if split is not None:
        raise InputError(f"data folder {folder} has no Parquet file whose name begins with {split}")
    names = sorted({_NUMBERED.split(shard.stem, maxsplit=1)[0] for shard in shards})
    if len(names) > 1:
        raise InputError(f"data folder {folder} has several splits; give split, one of: {', '.join(names)}")
    return shards


def locate(source: Source) -> Path:
    """The file or folder of a source; a synthetic one is made now, if this is the first time.

    Raises:
        InputError: there is no such file or split.
    """
    if source.path.startswith(SYNTHETIC):
        from mmspec.synth import materialise

        try:
            return materialise(source.path.removeprefix(SYNTHETIC), source.limit) / "llava.json"
        except ValueError as error:
            raise InputError(f"data source {source.path}: {error}") from error
    path = Path(source.path)
    if source.path.startswith(HUB):
        return path
    if path.is_dir():
        if _is_saved(path) or next(path.glob("*.parquet"), None):
            return path
        path = path / "llava.json"
        if not path.is_file():
            raise InputError(
                f"data folder {source.path} has no llava.json, Parquet file or saved data set; name the file itself"
            )
    if not path.is_file():
        raise InputError(
            f"data file {source.path} does not exist; give a JSON, JSONL or Parquet file, a folder, hub:org/name or "
            "synth:train as data.train=PATH"
        )
    return path


def check_sources(sources: Sequence[Source]) -> None:
    """What can be known before any work starts: files are there, synthetic splits exist.

    Raises:
        InputError: naming the first source that is not.
    """
    for source in sources:
        if not source.path.startswith(SYNTHETIC):
            locate(source)
            continue
        from mmspec.synth import SPLITS

        name = source.path.removeprefix(SYNTHETIC)
        if name not in SPLITS:
            raise InputError(f"data source {source.path}: no such split; there are: {', '.join(SPLITS)}")


def _is_saved(folder: Path) -> bool:
    """Whether `datasets`' `save_to_disk` wrote a folder."""
    whole = all((folder / name).is_file() for name in ("dataset_info.json", "state.json"))
    return whole or (folder / "dataset_dict.json").is_file()


def _rows(table: Table, source: Source) -> Iterator[tuple[int, Row]]:
    """The rows of a source's limit and topic, with their numbers."""
    n = len(table) if source.limit is None else min(len(table), source.limit)
    topics: set[str] = set()
    for start in range(0, n, BLOCK):
        for row, found in enumerate(table.scan(start, min(start + BLOCK, n)), start):
            # What cannot be decoded has no topic, but is no record of another one either.
            if source.topic is not None and not found.fault:
                topics.add(topic := topic_of(found.record))
                if topic != source.topic:
                    continue
            yield row, found
    if source.topic is not None and source.topic not in topics:
        has = ", ".join(sorted(topics - {""})) or "none"
        raise InputError(f"data source {source.path}: no record has the topic {source.topic!r}; it has: {has}")


class _Missing(RecordError):
    """A picture that is not there."""

    def __init__(self, picture: str) -> None:
        super().__init__(f"image is missing: {picture}")
        self.picture = picture


def _usable(found: Row, table: Table, source: Source) -> Sample:
    """The sample of a scanned row. Raises RecordError."""
    if found.fault:
        raise RecordError(found.fault)
    sample = parse(found.record, table.file, table.folder, found.line, source.format)
    for picture in sample.pictures:
        try:
            there = picture.path is None or picture.path.is_file()
        except OSError as error:
            raise RecordError(f"image name is no path: {picture.name[:60]} ({error.strerror})") from error
        if not there:
            raise _Missing(picture.name)
    return sample
