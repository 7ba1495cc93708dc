"""Reading MMSpec's records, opening their images, and quarantining what is unusable.

Invariant: whatever bytes a data folder holds, reading it either raises one `InputError` (the folder as a whole is
unusable) or returns good records and has written one quarantine line for every bad one. Nothing is dropped silently.

MMSpec's layout is `folder/mmspec.jsonl` (one object a line: id, image, turns, category, topic) and `folder/images/`.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mmspec.types import InputError

RECORDS_FILE = "mmspec.jsonl"
IMAGES_FOLDER = "images"


class RecordError(ValueError):
    """One record is unusable; the message is the reason that goes to the quarantine."""


@dataclass(frozen=True)
class Record:
    """One conversation about one image.

    Args:
        id: unique within its file.
        image: path of the image, or None for a text-only record.
        turns: what the user says, in order; at least one, none of them blank.
        category, topic: MMSpec's labels; results are reported by topic.
        line: 1-based line number in the file.
    """

    id: str
    image: Path | None
    turns: tuple[str, ...]
    category: str
    topic: str
    line: int


class Quarantine:
    """The unusable records of a run, appended to a JSONL file as they are found.

    Args:
        path: the file, made with its folder at the first bad record; None counts without writing (ranks above 0).
        fresh: remove what an earlier run left at `path`, so that the file and the count speak of this run only.
    """

    def __init__(self, path: Path | None, fresh: bool = False) -> None:
        self.path = path
        self.n_read = 0
        """Records there were, good and bad, where who reads them says so."""
        self._reasons: Counter[str] = Counter()
        if fresh and path is not None:
            path.unlink(missing_ok=True)

    @property
    def count(self) -> int:
        """Records quarantined by this object."""
        return sum(self._reasons.values())

    def reasons(self) -> dict[str, int]:
        """How often each kind of reason occurred (its text up to a colon), the most frequent first."""
        return dict(self._reasons.most_common())

    def add(self, source: str | Path, line: int, id: str, reason: str) -> None:
        """Append one record.

        Args:
            source: the file the record came from.
            line: its 1-based line (or index) there.
            id: its id, or "" when it has none.
            reason: why it is unusable: the kind, then after a colon what is particular to this record.
        """
        reason = " ".join(reason.split())
        self._reasons[reason.partition(":")[0]] += 1
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            entry = {"source": str(source), "line": line, "id": id, "reason": reason}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def check(self, n_read: int, max_bad_share: float, what: str = "records are unusable", key: str = "") -> None:
        """Stop the run when too much of its input is unusable.

        Args:
            n_read: records read so far, good and bad.
            max_bad_share: the largest allowed `count / n_read`, 0 to 1.
            what: is the matter with those that are counted here.
            key: the setting that allows it, where the message is to name it.

        Raises:
            InputError: the share is larger; says how many, what is wrong with most, and where they are listed.
        """
        if n_read == 0 or self.count / n_read <= max_bad_share:
            return
        reason, times = self._reasons.most_common(1)[0]
        listed = f"; all are listed in {self.path}" if self.path is not None else ""
        raise InputError(
            f"{self.count} of {n_read} {what} ({self.count / n_read:.1%}, allowed {max_bad_share:.1%}"
            f"{f' by {key}' if key else ''}), most often ({times}x): {reason}{listed}"
        )


def read_mmspec(folder: Path | str, quarantine: Quarantine) -> list[Record]:
    """Read a folder in MMSpec's layout. Images are not opened here: see `open_image`.

    Args:
        folder: holds `mmspec.jsonl` and `images/`.
        quarantine: receives every line that is no usable record.

    Returns:
        The usable records in file order.

    Raises:
        InputError: the folder or its `mmspec.jsonl` is missing, or no record is usable.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"data folder not found: {folder} (a folder with {RECORDS_FILE} and {IMAGES_FOLDER}/)")
    path = folder / RECORDS_FILE
    if not path.is_file():
        raise InputError(f"no {RECORDS_FILE} in {folder} (MMSpec's layout: {RECORDS_FILE} beside {IMAGES_FOLDER}/)")
    records: list[Record] = []
    seen: set[str] = set()
    n_read = 0
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            n_read += 1
            entry: Any = None
            try:
                entry = _parse(raw)
                record = _record(entry, folder, line)
                if record.id in seen:
                    raise RecordError("its id was used by an earlier record")
            except RecordError as error:
                quarantine.add(path, line, _id_of(entry), str(error))
                continue
            seen.add(record.id)
            records.append(record)
    if not records:
        first = next(iter(quarantine.reasons()), "the file is empty")
        raise InputError(f"no usable record among the {n_read} of {path} (most often: {first})")
    return records


def open_image(path: Path, data: bytes | None = None) -> Image.Image:
    """Decode an image wholly, so that a file that is cut off is found here and not in the middle of a run.

    Args:
        path: any format that Pillow reads.
        data: the content, where it is no file; the path is then but its name.

    Returns:
        The image in RGB.

    Raises:
        RecordError: the file is missing, truncated or no image.
    """
    try:
        with Image.open(path if data is None else io.BytesIO(data)) as image:
            image.load()
            return image.convert("RGB")
    except FileNotFoundError:
        raise RecordError(f"image is missing: {path.name}") from None
    except Image.UnidentifiedImageError:
        raise RecordError(f"image is not in a readable format: {path.name}") from None
    except Exception as error:
        # Pillow's decoders raise nearly anything on damaged bytes (OSError, SyntaxError, struct.error, EOFError,
        # ValueError, DecompressionBombError, ...): whatever it is, this one record is unusable and the run goes on.
        detail = " ".join(str(error).split())[:120] or type(error).__name__
        raise RecordError(f"image cannot be decoded: {path.name} ({detail})") from None


def count_images(messages: Sequence[Mapping[str, Any]]) -> int:
    """Image parts among the content of Hugging Face chat messages."""
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    return sum(part["type"] == "image" for content in contents for part in content)


def _parse(raw: bytes) -> Any:
    """Decode one line. Raises RecordError for anything but a JSON object in UTF-8."""
    try:
        entry = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise RecordError("the line is not UTF-8") from None
    except (ValueError, RecursionError):
        raise RecordError("the line is not JSON") from None
    if not isinstance(entry, dict):
        raise RecordError(f"the line is not a JSON object: it is a {type(entry).__name__}")
    return entry


def _record(entry: dict[str, Any], folder: Path, line: int) -> Record:
    """Check one object's fields. Raises RecordError naming the first bad one."""
    for name in ("id", "image", "turns", "topic"):
        if name not in entry:
            raise RecordError(f"it has no '{name}' field")
    identifier = entry["id"]
    if isinstance(identifier, int) and not isinstance(identifier, bool):
        identifier = str(identifier)
    turns = entry["turns"]
    if not isinstance(turns, list):
        raise RecordError(f"'turns' is a {type(turns).__name__}, not a list")
    if not turns:
        raise RecordError("its conversation is empty")
    image = entry["image"]
    return Record(
        id=_text(identifier, "'id'"),
        image=None if image is None else folder / IMAGES_FOLDER / _text(image, "'image'"),
        turns=tuple(_text(turn, f"turn {number}") for number, turn in enumerate(turns, start=1)),
        category=str(entry.get("category") or ""),
        topic=_text(entry["topic"], "'topic'"),
        line=line,
    )


def _text(value: Any, what: str) -> str:
    """`value` if it is text with something in it that can be written as UTF-8. Raises RecordError otherwise."""
    if not isinstance(value, str):
        raise RecordError(f"{what} is a {type(value).__name__}, not text")
    if not value.strip():
        raise RecordError(f"{what} is blank")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        # JSON can spell a lone surrogate; tokenizers cannot take one.
        raise RecordError(f"{what} is not valid Unicode") from None
    return value


def _id_of(entry: Any) -> str:
    """The id to write to the quarantine, as far as there is one."""
    identifier = entry.get("id", "") if isinstance(entry, dict) else ""
    return str(identifier) if isinstance(identifier, str | int) else ""
