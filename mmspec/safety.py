"""What is checked of files that others made before anything in them is read: names, kinds, headers, settings.

Invariant: nothing here, and nothing that reads behind these checks, runs what a file says. Weights are safetensors with
a header that is small and fits the file, settings are JSON that asks for no code, a name stays inside its folder, and a
link is followed nowhere but into the Hub cache's own store of files.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mmspec.types import InputError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
"""Endings of files that torch and others unpickle."""
MAX_HEADER = 10 * 2**20
"""Bytes of a safetensors header: some hundred for each tensor, of which a head has dozens and a target thousands."""
MAX_JSON = 10 * 2**20
"""Bytes of a file of settings."""
REMOTE_CODE = ("auto_map", "custom_pipelines", "custom_generate", "trust_remote_code")
"""Keys of a config by which transformers loads Python from the folder."""


def check_name(name: str) -> str:
    """A file's name inside its folder, with `/` between parts.

    Returns:
        The name.

    Raises:
        InputError: it is empty, absolute, leaves the folder (`..`), or is spelled so that systems read it differently.
    """
    parts = name.split("/")
    leaves = PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or "\\" in name
    if leaves or any(part in ("", ".", "..") for part in parts) or not name.isprintable():
        raise InputError(f"file name {name!r} does not stay inside its folder; it is not read or written")
    return name


def check_file(path: Path) -> Path:
    """A file that is about to be read.

    Args:
        path: of any kind; that of weights is safetensors.

    Returns:
        The path.

    Raises:
        InputError: it is missing, a link (but for the Hub cache's own), not a regular file, a pickle by name or by
            content, or safetensors with a header that `check_header` refuses.
    """
    said = _said(path)
    try:
        mode = path.lstat().st_mode
    except OSError:
        raise InputError(f"{said} does not exist") from None
    if stat.S_ISLNK(mode):
        if not any(path.resolve().is_relative_to(store) for store in _stores(path)):
            raise InputError(f"{said} is a symlink, which is not followed here; put the file itself in its place")
        mode = path.stat().st_mode if path.exists() else 0
    if not stat.S_ISREG(mode):
        raise InputError(f"{said} is no regular file; put the file itself in its place")
    if path.suffix.lower() in PICKLES:
        raise InputError(
            f"{said} is a pickle, which is not read here; where you trust it, rewrite it: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')"
        )
    if path.suffix.lower() == ".safetensors":
        check_header(path)
    return path


def check_header(path: Path) -> int:
    """The header of a safetensors file, before its library reads it.

    Returns:
        Bytes of the header.

    Raises:
        InputError: it is a pickle under another name, longer than MAX_HEADER or than the file, or no JSON object.
    """
    said = _said(path)
    with path.open("rb") as file:
        start = file.read(8)
        size, room = int.from_bytes(start, "little"), path.stat().st_size - 8
        if len(start) < 8 or size > room:
            # As a length, the marks of what torch.save writes (zip archives, once bare pickles) are beyond any file.
            pickled = start[:4] == b"PK\x03\x04" or (
                start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5")
            )
            if pickled:
                raise InputError(f"{said} is a pickle by its content, not safetensors, and is not read here")
            raise InputError(f"{said} is damaged (its header is longer than the file); fetch it again")
        if size > MAX_HEADER:
            raise InputError(f"{said} has a header of {size} bytes, more than {MAX_HEADER}; it is not read here")
        header = file.read(size)
    try:
        whole = json.loads(header)
    except (ValueError, RecursionError):
        whole = None
    if not isinstance(whole, dict):
        raise InputError(f"{said} is damaged (its header is no JSON object); fetch it again")
    return size


def check_settings(settings: Any, path: Path) -> None:
    """Settings of a foreign config, at any depth.

    Args:
        settings: what a JSON file says.
        path: of that file, for the message.

    Raises:
        InputError: they ask for Python code of the folder to be run.
    """
    waiting = [settings]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            for key in REMOTE_CODE:
                if value.get(key):
                    raise InputError(f"{_said(path)} asks for remote code ({key}), which is not run here; remove {key}")
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON file of a foreign folder, such as config.json.

    Raises:
        InputError: what `check_file` and `check_settings` refuse; it is larger than MAX_JSON or no JSON object.
    """
    check_file(path)
    if (size := path.stat().st_size) > MAX_JSON:
        raise InputError(f"{_said(path)} has {size} bytes, more than {MAX_JSON}; it is not read here")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{_said(path)} is damaged ({line}); fetch it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{_said(path)} is damaged (not a JSON object); fetch it again")
    check_settings(value, path)
    return value


def _stores(path: Path) -> list[Path]:
    """Where the Hub's cache keeps the files that a snapshot of a repository links to; none elsewhere.

    Newer versions of its library keep what several repositories hold beside them, and link to that.
    """
    for folder in path.absolute().parents:
        if folder.name == "snapshots" and folder.parent.name.startswith("models--"):
            return [(home / "blobs").resolve() for home in (folder.parent, folder.parent.parent)]
    return []


def _said(path: Path) -> str:
    """A path for a message of one line, whatever characters a foreign name has."""
    return str(path) if str(path).isprintable() else repr(str(path))
