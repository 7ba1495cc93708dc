"""Data sets as tables on disk: rows by number through memory-mapped Arrow, so that a set may be larger than memory.

Invariant: a table holds nothing in memory per row. Lines of JSON are kept as they are and decoded when asked for, so a
malformed one is one bad record; a Parquet file or a `datasets` folder has its own columns. What is made here lies under
`$MMSPEC_CACHE/arrow`, named by the content of what it was made of, and can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets
import pyarrow
import pyarrow.compute as pc
from datasets.exceptions import DatasetGenerationError

from mmspec.records import RecordError
from mmspec.synth import cache_folder
from mmspec.types import InputError
from train.elements import raw_records

VERSION = 1
"""Of how files are split into records."""
PICTURES = ("image", "images")
"""Columns whose bytes a scan leaves on disk."""


@dataclass(frozen=True)
class Row:
    """What a scan sees of a row.

    Args:
        line: see `Table.line`.
        record: decoded, embedded pictures without their bytes; None where that failed.
        fault: why, or "".
        sizes: bytes of its embedded pictures.
    """

    line: int
    record: Any
    fault: str
    sizes: tuple[int, ...] = ()


class Table(Protocol):
    """Rows of one source.

    Args:
        file: what samples and the quarantine name as their source.
        folder: what pictures are named relative to.
    """

    file: Path
    folder: Path

    def __len__(self) -> int: ...

    def line(self, row: int) -> int:
        """Where a row stands in its file, from 1."""

    def record(self, row: int) -> Any:
        """A row, decoded. Raises RecordError when it cannot be."""

    def scan(self, start: int, stop: int) -> Iterator[Row]:
        """Rows one after the other, without the bytes of pictures."""


# ---- JSON ----


class Lines:
    """The records of a JSON list or JSONL file."""

    def __init__(self, path: Path) -> None:
        self.file, self.folder = path, path.parent
        features = datasets.Features({"line": datasets.Value("int64"), "raw": datasets.Value("large_binary")})
        if next(raw_records(path), None) is None:
            # `from_generator` does not take none for an answer.
            self._rows = datasets.Dataset.from_dict({"line": [], "raw": []}, features)
            return
        self._rows = _made(
            path,
            lambda: datasets.Dataset.from_generator(
                _raw_rows,
                features=features,
                gen_kwargs={"path": path},
                cache_dir=str(cache_folder() / "arrow"),
                fingerprint=f"{_digest([path])}-{VERSION}",
            ).with_format("arrow"),
        )

    def __len__(self) -> int:
        return len(self._rows)

    def line(self, row: int) -> int:
        return int(self._rows[row : row + 1]["line"][0].as_py())

    def record(self, row: int) -> Any:
        return _decoded(self._rows[row : row + 1]["raw"][0].as_py())

    def scan(self, start: int, stop: int) -> Iterator[Row]:
        rows = self._rows[start:stop]
        for line, raw in zip(rows["line"].to_pylist(), rows["raw"]):
            try:
                yield Row(line, _decoded(raw.as_py()), "")
            except RecordError as error:
                yield Row(line, None, str(error))


def _raw_rows(path: Path) -> Iterator[dict[str, Any]]:
    for line, raw in raw_records(path):
        yield {"line": line, "raw": raw}


def _decoded(raw: bytes) -> Any:
    if not raw:
        raise RecordError("record is missing: the list is cut off, or has two commas in a row")
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RecordError(f"record is not UTF-8: byte {error.start}") from error
    except ValueError as error:
        raise RecordError(f"record is not JSON: {error}") from error
    except RecursionError as error:
        raise RecordError("record is not JSON: it is nested too deeply") from error


# ---- columns ----


class Columns:
    """The rows of an Arrow table with a column for each field.

    Args:
        rows: the table.
        file, folder: see `Table`.
    """

    def __init__(self, rows: datasets.Dataset, file: Path, folder: Path) -> None:
        self.file, self.folder = file, folder
        self._rows = rows.with_format("arrow")
        self._pictures = [name for name in PICTURES if name in rows.column_names]
        others = [name for name in rows.column_names if name not in PICTURES]
        self._texts = rows.select_columns(others).with_format("arrow")

    def __len__(self) -> int:
        return len(self._rows)

    def line(self, row: int) -> int:
        return row + 1

    def record(self, row: int) -> Any:
        return _values(self._rows[row : row + 1])[0]

    def scan(self, start: int, stop: int) -> Iterator[Row]:
        try:
            texts: Sequence[Any] = _values(self._texts[start:stop])
        except RecordError:
            texts = [self._alone(row) for row in range(start, stop)]
        rows = self._rows[start:stop]
        pictures = {name: _without_bytes(rows[name]) for name in self._pictures}
        for number, record in enumerate(texts):
            if isinstance(record, RecordError):
                yield Row(start + number + 1, None, str(record))
                continue
            shown = {name: column[number] for name, column in pictures.items()}
            values = {name: value for name, (value, _) in shown.items()}
            sizes = tuple(size for _, sizes in shown.values() for size in sizes)
            yield Row(start + number + 1, {**record, **values}, "", sizes)

    def _alone(self, row: int) -> Any:
        try:
            return _values(self._texts[row : row + 1])[0]
        except RecordError as error:
            return error


def _values(rows: pyarrow.Table) -> list[dict[str, Any]]:
    try:
        values: list[dict[str, Any]] = rows.to_pylist()
    except UnicodeDecodeError as error:
        raise RecordError("record is not UTF-8") from error
    return values


def _without_bytes(column: Any) -> list[tuple[Any, tuple[int, ...]]]:
    """Values of a column of pictures with the bytes left out, and how many bytes those are.

    Args:
        column: an Arrow column of file names, bytes, structs of `bytes` and `path`, or lists of those.
    """
    kind = column.type
    if not (pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)):
        return [(value, (size,) if size else ()) for value, size in _one_picture_a_row(column)]
    flat = iter(_one_picture_a_row(pc.list_flatten(column)))
    out: list[tuple[Any, tuple[int, ...]]] = []
    for n in pc.list_value_length(column).to_pylist():
        some = [next(flat) for _ in range(n or 0)]
        values = None if n is None else [value for value, _ in some]
        out.append((values, tuple(size for _, size in some if size)))
    return out


def _one_picture_a_row(column: Any) -> list[tuple[Any, int]]:
    kind = column.type
    if pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
        return [(None if n is None else b"", n or 0) for n in pc.binary_length(column).to_pylist()]
    inner = {kind.field(k).name: kind.field(k).type for k in range(kind.num_fields)}
    data = inner.get("bytes") if pyarrow.types.is_struct(kind) else None
    if data is None or not (pyarrow.types.is_binary(data) or pyarrow.types.is_large_binary(data)):
        return [(value, 0) for value in column.to_pylist()]
    lengths = pc.binary_length(pc.struct_field(column, "bytes")).to_pylist()
    paths = pc.struct_field(column, "path").to_pylist() if "path" in inner else [None] * len(lengths)
    return [
        ({"bytes": None if n is None else b"", "path": path} if there else None, n or 0)
        for n, path, there in zip(lengths, paths, column.is_valid().to_pylist())
    ]


# ---- opening ----


def open_files(paths: Sequence[Path], file: Path, folder: Path) -> Table:
    """A JSON or JSONL file, or Parquet files one after the other.

    Raises:
        InputError: they cannot be read.
    """
    if paths[0].suffix != ".parquet":
        return Lines(paths[0])
    cache = cache_folder() / "arrow" / "parquet" / _digest(paths)
    rows = _made(file, lambda: datasets.Dataset.from_parquet([str(path) for path in paths], cache_dir=str(cache)))
    return Columns(rows, file, folder)


def open_saved(folder: Path, split: str | None) -> Table:
    """A folder of `datasets`' `save_to_disk`, pictures named relative to it.

    Raises:
        InputError: it cannot be read, or the split is not in it.
    """
    found = _made(folder, lambda: datasets.load_from_disk(str(folder)))
    if isinstance(found, datasets.DatasetDict):
        if split is None and len(found) > 1 and "train" not in found:
            raise InputError(f"data folder {folder} has several splits; give split, one of: {', '.join(found)}")
        name = split or ("train" if "train" in found else next(iter(found)))
        if name not in found:
            raise InputError(f"data folder {folder} has no split {name!r}; it has: {', '.join(found)}")
        return Columns(found[name], folder, folder)
    if split is not None:
        raise InputError(f"data folder {folder} has no splits, but split={split} is asked for; leave it out")
    return Columns(found, folder, folder)


def open_hub(name: str, split: str | None) -> Table:
    """A data set of the Hub, `hub:org/name` or `hub:org/name/configuration`; the split is `train` unless one is given.

    Raises:
        InputError: it is not there, or cannot be reached.
    """
    parts = name.removeprefix("hub:").split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise InputError(f"data source {name} must be hub:org/name, or hub:org/name/configuration")
    config = parts[2] if len(parts) == 3 else None
    rows = _made(Path(name), lambda: datasets.load_dataset("/".join(parts[:2]), config, split=split or "train"))
    return Columns(rows, Path(name), Path())


def _made(what: Path, work: Callable[[], Any]) -> Any:
    """What `datasets` makes, without its progress bars."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return work()
    except InputError:
        raise
    except Exception as error:
        # Its readers, Arrow's and the Hub's raise nearly anything (OSError, ArrowInvalid, CastError, HTTP errors, ...):
        # whatever it is, the source as a whole cannot be read.
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        if isinstance(cause, InputError):
            raise cause from error
        detail = " ".join(str(cause).split())[:200] or type(cause).__name__
        raise InputError(f"data source {what} cannot be read: {detail}") from error
    finally:
        if shown:
            datasets.enable_progress_bars()


def _digest(paths: Sequence[Path]) -> str:
    """The hash of files' contents."""
    whole = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise InputError(f"data file {path} cannot be read ({error.strerror})") from error
    return whole.hexdigest()[:16]
