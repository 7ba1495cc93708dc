"""One conversation of a training set, and the pictures it shows.

Invariant: a sample holds no decoded picture. Pictures are opened by whoever encodes it, when it is encoded.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mmspec.records import open_image

IMAGE_MARK = "<image>"


@dataclass(frozen=True)
class Picture:
    """A picture of a sample: a file, or the bytes of one.

    Args:
        name: of the file; of bytes the `tail` of the path that is told with them, or "<line>#<k>".
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
        file, line: where it came from (line: 1-based line of JSONL, else place in the list or table).
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

    def image_name(self) -> str:
        """The same of all samples that show the same pictures, by their bytes; "" of text alone."""
        return "+".join(sorted(hashlib.sha256(picture.content()).hexdigest()[:16] for picture in self.pictures))

    def shown(self, n_turns: int | None = None) -> tuple[Picture, ...]:
        """The pictures of the first turns."""
        return self.pictures[: sum(turn.count(IMAGE_MARK) for turn in self.turns[:n_turns])]

    def images(self) -> list[Any]:
        """The decoded pictures, in order of their marks. Raises RecordError when one cannot be read."""
        return [picture.open() for picture in self.pictures]


def tail(path: Path | None) -> str:
    """The end of a path, where a collection's name may stand; "" of none."""
    return "" if path is None else "/".join(path.parts[-4:]).lstrip("/")


def _content(turn: str) -> list[dict[str, str]]:
    """A user turn as content parts, a picture where its mark stands."""
    parts: list[dict[str, str]] = []
    for piece in re.split(f"({IMAGE_MARK})", turn):
        if piece == IMAGE_MARK:
            parts.append({"type": "image"})
        elif piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return parts
