"""Raw records of JSON and JSONL files, one at a time, however large the file and whatever is wrong with single ones.

Invariant: but for blanks and the list's own brackets and commas every byte of a file is in one of its records, and one
record is held at a time. Nothing is decoded here: a malformed record is found by whoever parses it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mmspec.types import InputError

CHUNK = 1 << 20
MAX_RECORD = 256 << 20
"""Bytes of one record; more is a file of another kind, or one whose brackets do not close."""
BOM = b"\xef\xbb\xbf"
# A string ends at its quote, else at the end of the line, which JSON's strings cannot cross, or where the bytes end.
_TOKEN = re.compile(rb'"(?:[^"\\\n]++|\\[^\n])*+(?:(")|\\?\Z|(?=\\?\n))|[\[\]{},]')


def raw_records(path: Path) -> Iterator[tuple[int, bytes]]:
    """Place and bytes of every record.

    A file that is not called .jsonl and begins with a bracket is a JSON list, whose records are counted from 1; any
    other is JSONL, whose lines are. Of a list that is not closed, or is followed by something, one record more tells.

    Raises:
        InputError: the file is neither, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            if _begins_with_a_bracket(file) and path.suffix != ".jsonl":
                yield from enumerate(_elements(file, path), start=1)
            else:
                _check_lines(file, path)
                yield from _lines(file, path)
    except OSError as error:
        raise InputError(f"data file {path} cannot be read ({error.strerror})") from error


def _begins_with_a_bracket(file: BinaryIO) -> bool:
    """Whether the first thing in the file is a list; the file is at its first byte afterwards."""
    begin = len(BOM) if file.read(len(BOM)) == BOM else 0
    file.seek(begin)
    first = b""
    while not first and (chunk := file.read(CHUNK)):
        first = chunk.lstrip()[:1]
    file.seek(begin)
    return first == b"["


def _check_lines(file: BinaryIO, path: Path) -> None:
    """JSONL may be called what it likes, but a file that is called .json must begin with a whole record."""
    if path.suffix == ".jsonl":
        return
    begin = file.tell()
    first = next((raw for _, raw in _lines(file, path)), b"")
    file.seek(begin)
    try:
        record = json.loads(first)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"data file {path} is no JSON list of records, nor one record a line: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(record, dict):
        raise InputError(f"data file {path} must be a list of records or one a line, not a {type(record).__name__}")


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers."""
    number = 0
    while raw := file.readline(MAX_RECORD + 1):
        number += 1
        if len(raw) > MAX_RECORD:
            raise _too_large(path, number)
        if raw := raw.strip():
            yield number, raw


def _elements(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The elements of a list, by brackets and strings alone."""
    buffer, at, begin, depth, number, ended = b"", 0, 0, 0, 0, False
    while True:
        token = _TOKEN.search(buffer, at)
        cut = token is not None and token[0][:1] == b'"' and token.end() == len(buffer) and token[1] is None
        if (token is None or cut) and not ended:
            # What the buffer holds of this record may be half a token: more bytes, and once again.
            at = (len(buffer) if token is None else token.start()) - begin
            chunk = file.read(CHUNK)
            buffer, begin, ended = buffer[begin:] + chunk, 0, not chunk
            if len(buffer) > MAX_RECORD + CHUNK:
                raise _too_large(path, number + 1)
            continue
        if token is None:
            yield buffer[begin:].strip()
            return
        at = token.end()
        if token[0] in (b"[", b"{"):
            depth += 1
            begin = at if depth == 1 else begin
        elif token[0] in (b"]", b"}"):
            depth -= 1
        if depth == 0 or (depth == 1 and token[0] == b","):
            raw = buffer[begin : token.start()].strip()
            # A comma behind the last element, and nothing in an empty list, are nobody's record.
            if raw or depth:
                number += 1
                yield raw
            begin = at
        if depth == 0:
            break
    if behind := (buffer[at:] + file.read(CHUNK)).strip():
        yield behind


def _too_large(path: Path, number: int) -> InputError:
    return InputError(
        f"data file {path}: record {number} has more than {MAX_RECORD >> 20} MiB; is there a bracket or quote missing?"
    )
