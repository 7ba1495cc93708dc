"""The answers of a corpus on disk: parts that processes append to, then one file with a line for every sample.

Layout of a folder: `part-<rank>.jsonl` while answers are made, `answers.jsonl` and no part once all are there, and
`manifest.json`, which says what they were made from.
Invariant: a line that was written whole is never lost and never changed; `answers.jsonl` has the samples in their order
and appears at once. So it does not tell how many processes made it, nor how often they were killed.

In memory a sample is 21 bytes, whatever was said.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

FINAL, MANIFEST, PARTS = "answers.jsonl", "manifest.json", "part-*.jsonl"
OPEN, GOOD, BAD, DEGENERATE = range(4)
"""What is known of a sample: nothing, its answers, why it cannot be used, why its answers were dropped."""
DROPPED = "degenerate answer"
"""How the reason begins of a sample whose answers were dropped."""


@dataclass(frozen=True)
class Dialogue:
    """The answers a sample is trained on.

    Args:
        answers: one per answered turn.
        finished: whether each ended in a stop token (else it was cut at a limit, and no stop token is trained).
        length: tokens of the whole conversation.
    """

    answers: tuple[str, ...]
    finished: tuple[bool, ...]
    length: int


class Prepared:
    """What some files know of a corpus: `dialogues[k]` belongs to `corpus.samples[k]`, unusable ones are in `bad`.

    Args:
        files: of JSON lines; of a sample that has several, the first counts. Lines that are torn are passed over.
        n: samples of the corpus.

    Attributes:
        status: [n] uint8, one of OPEN, GOOD, BAD, DEGENERATE.
        lengths: [n] int32, tokens of the whole conversation; 0 where there is none.
        dialogues, bad: read from the files when they are asked for.
    """

    def __init__(self, files: Sequence[Path] = (), n: int = 0) -> None:
        self.status: NDArray[np.uint8] = np.zeros(n, np.uint8)
        self.lengths: NDArray[np.int32] = np.zeros(n, np.int32)
        self._file: NDArray[np.int32] = np.zeros(n, np.int32)
        self._start: NDArray[np.int64] = np.zeros(n, np.int64)
        self._size: NDArray[np.int32] = np.zeros(n, np.int32)
        self._open: list[BinaryIO] = [path.open("rb") for path in files]
        for number, file in enumerate(self._open):
            start = 0
            for line in file:
                self._note(number, start, line)
                start += len(line)
        self.dialogues: Mapping[int, Dialogue] = _Dialogues(self, (GOOD,))
        self.bad: Mapping[int, str] = _Reasons(self, (BAD, DEGENERATE))
        self._digest = ""

    def _note(self, number: int, start: int, line: bytes) -> None:
        try:
            entry = json.loads(line)
            index = int(entry["index"])
        except (ValueError, KeyError, TypeError):
            # Torn when a process was killed: its sample is answered again.
            return
        if not 0 <= index < len(self.status) or self.status[index]:
            return
        if "bad" in entry:
            self.status[index] = DEGENERATE if str(entry["bad"]).startswith(DROPPED) else BAD
        else:
            self.status[index] = GOOD
            self.lengths[index] = entry["length"]
        self._file[index], self._start[index], self._size[index] = number, start, len(line.rstrip(b"\n"))

    @property
    def complete(self) -> bool:
        """Whether something is known of every sample."""
        return bool((self.status != OPEN).all())

    @property
    def usable(self) -> list[int]:
        """The samples that have answers, in order."""
        found: list[int] = np.flatnonzero(self.status == GOOD).tolist()
        return found

    def reasons(self, *kinds: int) -> dict[str, int]:
        """How often each kind of reason occurs (its text up to a colon), the most frequent first.

        Args:
            kinds: BAD, DEGENERATE; none: both.
        """
        chosen = (reason for k, reason in self.bad.items() if not kinds or self.status[k] in kinds)
        return dict(Counter(reason.partition(":")[0] for reason in chosen).most_common())

    @property
    def digest(self) -> str:
        """Hash of all conversations' answers and lengths; formed once."""
        if not self._digest:
            found = hashlib.sha256()
            for k, d in self.dialogues.items():
                found.update(json.dumps([k, d.answers, d.finished, d.length]).encode())
            self._digest = found.hexdigest()[:16]
        return self._digest

    def line(self, index: int) -> bytes:
        """What the files say of a sample, without the end of the line. Threads may ask at the same time."""
        file = self._open[self._file[index]]
        return os.pread(file.fileno(), int(self._size[index]), int(self._start[index]))

    def entry(self, index: int) -> dict[str, Any]:
        """The same, decoded."""
        found: dict[str, Any] = json.loads(self.line(index))
        return found


class _Of(Mapping[int, Any]):
    """The samples of some kinds, in order, each read when it is asked for."""

    def __init__(self, prepared: Prepared, kinds: Sequence[int]) -> None:
        self._prepared, self._kinds = prepared, kinds

    def __contains__(self, index: object) -> bool:
        status = self._prepared.status
        return isinstance(index, int | np.integer) and 0 <= index < len(status) and status[index] in self._kinds

    def __iter__(self) -> Iterator[int]:
        return iter(np.flatnonzero(np.isin(self._prepared.status, self._kinds)).tolist())

    def __len__(self) -> int:
        return int(np.isin(self._prepared.status, self._kinds).sum())

    def _entry(self, index: int) -> dict[str, Any]:
        if index not in self:
            raise KeyError(index)
        return self._prepared.entry(index)


class _Dialogues(_Of):
    def __getitem__(self, index: int) -> Dialogue:
        entry = self._entry(index)
        return Dialogue(tuple(entry["answers"]), tuple(entry["finished"]), int(entry["length"]))


class _Reasons(_Of):
    def __getitem__(self, index: int) -> str:
        return str(self._entry(index)["bad"])


class Part:
    """The file one process appends to; a torn last line of a killed one is closed off first.

    Args:
        folder: of the answers.
        rank: of the process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"part-{rank}.jsonl"

    def __enter__(self) -> Part:
        torn = False
        if self.path.is_file() and self.path.stat().st_size:
            with self.path.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
        self._file = self.path.open("a", encoding="utf-8")
        if torn:
            self._file.write("\n")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, index: int, id: str, result: Dialogue | str) -> None:
        """Adds a sample: its answers, or the reason why there are none."""
        entry: dict[str, Any] = {"index": index, "id": id}
        if isinstance(result, str):
            entry["bad"] = result
        else:
            entry |= {"answers": result.answers, "finished": result.finished, "length": result.length}
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._file.flush()


def read(folder: Path, n: int) -> Prepared:
    """What a folder knows of n samples: the final file alone, or else the parts."""
    final = folder / FINAL
    return Prepared([final] if final.is_file() else sorted(folder.glob(PARTS)), n)


def merge(folder: Path, parts: Prepared) -> None:
    """Makes the final file of parts that know every sample. One process calls."""
    # Another run on the same answers may be at it; what it writes is the same.
    temporary = folder / f"{FINAL}.{os.getpid()}.tmp"
    with temporary.open("wb") as file:
        for index in range(len(parts.status)):
            file.write(parts.line(index) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / FINAL)


def tidy(folder: Path) -> None:
    """Removes what a final file makes superfluous: parts, and beginnings of it. One process calls."""
    if (folder / FINAL).is_file():
        for path in (*folder.glob(PARTS), *folder.glob(f"{FINAL}.*.tmp")):
            path.unlink(missing_ok=True)
