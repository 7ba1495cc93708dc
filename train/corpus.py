"""Training conversations in LLaVA's JSON layout, and the order in which a run visits them.

Invariant: reading a source gives usable samples plus one quarantine entry for every other record, and is a pure
function of the files: every rank reads the same list, and the order of batches depends on the seed alone, not on the
number of processes. Images are opened later, by whoever encodes the sample.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from mmspec.recipe import Source
from mmspec.records import Quarantine, RecordError, open_image
from mmspec.types import InputError

IMAGE_MARK = "<image>"
SYNTHETIC = "synth:"
HUMAN, TARGET = ("human", "user"), ("gpt", "assistant")


@dataclass(frozen=True)
class Picture:
    """A picture of a sample: a file, or the bytes of one.

    Args:
        name: of the file; "<line>#<k>" where the bytes have none.
        path: of the file, or None.
        data: its bytes, or None where it is a file.
    """

    name: str
    path: Path | None = None
    data: bytes | None = None

    def open(self) -> Image.Image:
        """The picture in RGB. Raises RecordError when it is missing or cannot be decoded."""
        return open_image(Path(self.name) if self.path is None else self.path, self.data)

    def size(self) -> int:
        """Bytes; 0 of a file that is missing."""
        if self.data is not None:
            return len(self.data)
        return self.path.stat().st_size if self.path is not None and self.path.is_file() else 0

    def content(self) -> bytes:
        """Its bytes; none of a file that is missing."""
        if self.data is not None:
            return self.data
        return self.path.read_bytes() if self.path is not None and self.path.is_file() else b""


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Args:
        id: of the record.
        pictures: in the order of the `<image>` marks.
        turns: what the user says; each `<image>` marks where a picture stands.
        answers: the file's answers; fewer than turns when the last one is open.
        file, line: where it came from (line: 1-based place in the list).
        topic: the record's, or its category; "" where it has neither.
        system: what a system message says before the first turn, or None.
    """

    id: str
    pictures: tuple[Picture, ...]
    turns: tuple[str, ...]
    answers: tuple[str, ...]
    file: Path
    line: int
    topic: str = ""
    system: str | None = None

    def messages(self, answers: Sequence[str], n_turns: int | None = None) -> list[dict[str, Any]]:
        """Hugging Face chat messages of the first turns, each but the last followed by its answer (the last too,
        where there is one), behind the system message."""
        out: list[dict[str, Any]] = []
        if self.system is not None:
            out.append({"role": "system", "content": [{"type": "text", "text": self.system}]})
        for index, turn in enumerate(self.turns[:n_turns]):
            out.append({"role": "user", "content": _content(turn)})
            if index < len(answers):
                out.append({"role": "assistant", "content": [{"type": "text", "text": answers[index]}]})
        return out

    def images(self) -> list[Any]:
        """The decoded pictures, in order of their marks. Raises RecordError when one cannot be read."""
        return [picture.open() for picture in self.pictures]


@dataclass(frozen=True)
class Corpus:
    """All usable samples of a recipe's sources.

    Args:
        samples: in order of sources and files.
        weights: of each sample's source.
        n_read: records read, the quarantined included.
        digest: hash of the conversations and of the sizes of their images.
        removed: how many more there were that `train.decontaminate` left out, by rule.
    """

    samples: tuple[Sample, ...]
    weights: tuple[float, ...]
    n_read: int
    digest: str
    removed: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples)


def read(sources: Sequence[Source], quarantine: Quarantine) -> Corpus:
    """Reads every source.

    Raises:
        InputError: a file is missing or no list of records, has none of the topic that is asked for, or nothing in all
            of them is usable.
    """
    samples: list[Sample] = []
    weights: list[float] = []
    n_read, digest = 0, hashlib.sha256()
    for source in sources:
        path = locate(source)
        records = list(enumerate(_records(path)[: source.limit], start=1))
        if source.topic is not None:
            records = _of_topic(records, source)
        n_read += len(records)
        for line, record in records:
            try:
                sample = _sample(record, path, line)
            except RecordError as error:
                quarantine.add(path, line, _id(record), str(error))
                continue
            samples.append(sample)
            weights.append(source.weight)
            size = sum(picture.size() for picture in sample.pictures)
            digest.update(json.dumps([sample.id, sample.turns, sample.answers, size]).encode())
    if not samples:
        most = next(iter(quarantine.reasons()), "the files are empty")
        places = ", ".join(source.path for source in sources)
        raise InputError(f"no usable record among the {n_read} of {places} (most often: {most})")
    return Corpus(tuple(samples), tuple(weights), n_read, digest.hexdigest()[:16])


def locate(source: Source) -> Path:
    """The JSON file of a source; a synthetic one is made now, if this is the first time.

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
    if path.is_dir():
        path = path / "llava.json"
        if not path.is_file():
            raise InputError(f"data folder {source.path} has no llava.json; name the JSON file itself")
    if not path.is_file():
        raise InputError(
            f"data file {source.path} does not exist; give LLaVA-style JSON as data.train=PATH or synth:train"
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


class Order:
    """The stream of sample indices, epoch after epoch, for any number of processes.

    In each epoch a sample of weight w is drawn floor(w) times, and once more with the probability of the remainder.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        if not any(weight > 0 for weight in weights):
            raise InputError("no sample is left to train on")
        self._weights, self._seed = weights, seed
        self._stream: list[int] = []
        self._epoch = 0

    def batch(self, step: int, size: int) -> list[int]:
        """Indices of the global batch of a step, counted from 0."""
        while len(self._stream) < (step + 1) * size:
            self._stream += self._next_epoch()
        return self._stream[step * size : (step + 1) * size]

    def _next_epoch(self) -> list[int]:
        rng = random.Random(f"{self._seed}/{self._epoch}")
        self._epoch += 1
        drawn: list[int] = []
        for index, weight in enumerate(self._weights):
            whole = int(weight)
            drawn += [index] * (whole + (rng.random() < weight - whole))
        rng.shuffle(drawn)
        return drawn


def deal(batch: Sequence[int], lengths: Sequence[int], rank: int, size: int, accumulate: int) -> list[list[int]]:
    """This rank's micro-batches of a global batch, neighbours in length together so that little is padding.

    Args:
        batch: indices of the global batch.
        lengths: token counts by index.
        rank, size: this process among all.
        accumulate: micro-batches per rank; len(batch) is a multiple of size * accumulate.

    Returns:
        `accumulate` lists of equal length. Over all ranks they hold the batch exactly once.
    """
    ordered = sorted(batch, key=lambda index: (lengths[index], index))
    each = len(ordered) // (size * accumulate)
    micro = [ordered[start : start + each * size] for start in range(0, len(ordered), each * size)]
    return [group[rank::size] for group in micro]


def _records(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        records = json.loads(text)
    except (ValueError, OSError) as error:
        raise InputError(f"data file {path} is no JSON: {' '.join(str(error).split())}") from error
    if not isinstance(records, list):
        raise InputError(
            f"data file {path} must be a list of {{id, image, conversations}}, not a {type(records).__name__}"
        )
    return records


def _sample(record: Any, path: Path, line: int) -> Sample:
    """One record. Raises RecordError with the reason it is unusable."""
    if not isinstance(record, dict):
        raise RecordError(f"record is no object but {type(record).__name__}")
    turns, answers = _conversation(record.get("conversations"))
    pictures = _pictures(record.get("image"), path.parent)
    marks = sum(turn.count(IMAGE_MARK) for turn in turns)
    if marks and marks != len(pictures):
        raise RecordError(f"conversation has <image> marks that are not its pictures: {marks} for {len(pictures)}")
    if not marks:
        turns = (f"{IMAGE_MARK}\n" * len(pictures) + turns[0], *turns[1:])
    return Sample(_id(record) or str(line), pictures, turns, answers, path, line, _topic(record))


def _pictures(named: Any, folder: Path) -> tuple[Picture, ...]:
    """The pictures of an `image` field: a file name or a list of them. Raises RecordError."""
    names = named if isinstance(named, list) else [] if named is None else [named]
    for name in names:
        if not isinstance(name, str) or not name:
            raise RecordError(f"image is no file name but {type(name).__name__}")
    return tuple(Picture(Path(name).name, _image_path(folder, name)) for name in names)


def _conversation(said: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """User turns and answers of a `conversations` list. Raises RecordError."""
    if not isinstance(said, list) or not said:
        raise RecordError("empty conversation")
    texts: list[str] = []
    for index, entry in enumerate(said):
        speaker = entry.get("from") if isinstance(entry, dict) else None
        if speaker not in (TARGET if index % 2 else HUMAN):
            raise RecordError(f"conversation does not alternate human and gpt (entry {index + 1} is from {speaker!r})")
        value = entry.get("value")
        if not isinstance(value, str):
            raise RecordError(f"non-string text in the conversation (entry {index + 1} is {type(value).__name__})")
        if not value.replace(IMAGE_MARK, "").strip():
            raise RecordError(f"empty text in the conversation (entry {index + 1})")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise RecordError(f"text is not valid Unicode (entry {index + 1})")
        if index % 2 and IMAGE_MARK in value:
            raise RecordError(f"an answer holds an <image> mark (entry {index + 1})")
        texts.append(value.strip())
    return tuple(texts[::2]), tuple(texts[1::2])


def _image_path(folder: Path, name: str) -> Path:
    """LLaVA's files name images relative to a folder beside them; which one differs between releases."""
    tried = [folder / name, folder / "images" / name, folder / "image" / name]
    return next((path for path in tried if path.is_file()), tried[0])


def _content(turn: str) -> list[dict[str, str]]:
    """A user turn as content parts, the picture where its mark stands."""
    parts: list[dict[str, str]] = []
    for piece in re.split(f"({IMAGE_MARK})", turn):
        if piece == IMAGE_MARK:
            parts.append({"type": "image"})
        elif piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return parts


def _of_topic(records: Sequence[tuple[int, Any]], source: Source) -> list[tuple[int, Any]]:
    """The records of a source's topic, with their lines."""
    found = {line: _topic(record) for line, record in records if isinstance(record, dict)}
    if source.topic not in found.values():
        topics = ", ".join(sorted(set(found.values()) - {""})) or "none"
        raise InputError(f"data source {source.path}: no record has the topic {source.topic!r}; it has: {topics}")
    return [(line, record) for line, record in records if found.get(line) == source.topic]


def _topic(record: dict[str, Any]) -> str:
    named = (record.get("topic"), record.get("category"))
    return next((name.strip() for name in named if isinstance(name, str) and name.strip()), "")


def _id(record: Any) -> str:
    value = record.get("id", "") if isinstance(record, dict) else ""
    return str(value) if isinstance(value, str | int) else ""
