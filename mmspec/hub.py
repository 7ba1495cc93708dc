"""Heads on the Hugging Face Hub: from `hub:org/name@revision` to a run folder on this machine, of known files only.

Invariant: nothing is fetched that is not on a list of names, nothing is parsed before it was looked at, and what is
handed out is a folder of our own cache (`$MMSPEC_CACHE/heads`), named by repository and commit, which appears complete
or not at all. No file is unpickled and no code of a repository runs.

A place on the Hub is written `hub:org/name` or `hub:org/name@revision` (branch, tag or commit), or without `hub:` where
no such path exists here. `HF_HUB_OFFLINE=1` takes what is in the cache, `HF_TOKEN` reaches private repositories.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from huggingface_hub.utils import logging as hub_logging

from mmspec.assets import EMBEDDED
from mmspec.safety import PICKLES, check_file, check_name, read_settings
from mmspec.synth.store import cache_folder
from mmspec.types import InputError

MARK = "hub:"
HEAD = (
    "head.json",
    "head.safetensors",
    "viskip.json",
    "viskip.safetensors",
    "tree.json",
    "static_tree.json",
    "costs/*.json",
    "recipe.yaml",
    "provenance.json",
)
"""What of a published run is fetched, and with which it decodes."""
NEEDED = ("head.json", "head.safetensors", "tree.json")
"""What of it no head is without."""
PAGES = ("README.md", "eval/summary.json", "eval/report.html", "plots/*.svg")
"""What else is published, for people."""
FOREIGN = ("config.json", "*.safetensors")
"""What is fetched of a head in another project's layout: top-level files of these names."""
_ID = r"[A-Za-z0-9][\w.-]*"
_PLACE = re.compile(rf"({_ID}/{_ID})(?:@([A-Za-z0-9][\w./-]*))?")


@dataclass(frozen=True)
class Place:
    """A repository of the Hub.

    Args:
        repo: `org/name`.
        revision: branch, tag or commit; None is the default branch.
    """

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{MARK}{self.repo}" + (f"@{self.revision}" if self.revision else "")


def is_repo(name: str) -> bool:
    """Whether this can be the name of a repository, `org/name`."""
    found = _PLACE.fullmatch(name)
    return found is not None and found[2] is None and ".." not in name and "--" not in name


def place_of(path: Path | str) -> Place | None:
    """The place on the Hub that a path names, or None where it is a path of this machine.

    Raises:
        InputError: it begins with `hub:` and goes on wrongly.
    """
    text = str(path)
    found = _PLACE.fullmatch(text.removeprefix(MARK))
    good = found is not None and is_repo(found[1]) and ".." not in (found[2] or "")
    if text.startswith(MARK):
        if found is None or not good:
            raise InputError(f"{text} must be hub:org/name or hub:org/name@revision")
        return Place(found[1], found[2])
    if found is None or not good or Path(text).exists():
        return None
    # `runs/nothing` is a mistyped path wherever there is a folder `runs`, and no question for the Hub.
    return None if Path(found[1]).parent.exists() else Place(found[1], found[2])


def run_folder(path: Path | str, target: str | None = None, dtype: str = "float32") -> Path:
    """The folder of a head: a path of this machine as it is, or what a place on the Hub holds.

    Args:
        path: either.
        target: whom a head in another project's layout was made for, where its files do not say.
        dtype: of that target while the head is translated (see `mmspec.convert`).

    Raises:
        InputError: the Hub has no such head, cannot be reached, or has something that is refused.
    """
    place = place_of(path)
    if place is None:
        return Path(path)
    try:
        snapshot = fetch(place)
    except InputError as error:
        if str(path).startswith(MARK):
            raise
        raise InputError(f"{path} is no folder here, and {error}") from error
    if (snapshot / "head.json").is_file():
        return _settled(place, snapshot, "", lambda folder: _copy(snapshot, folder, HEAD))
    settings = read_settings(snapshot / "config.json") if (snapshot / "config.json").is_file() else {}
    named = target or _verifier(settings)
    if named is None:
        raise InputError(
            f"{place} is a head in another project's layout, which does not say its target; name it (--target org/name)"
        )
    key = hashlib.sha256(f"{named} {dtype}".encode()).hexdigest()[:8]
    return _settled(place, snapshot, f"-{key}", lambda folder: _translate(place, snapshot, folder, named, dtype))


def fetch(place: Place) -> Path:
    """The snapshot of a repository in the Hub's own cache, of the files that are read here; all of them looked at.

    Raises:
        InputError: see `run_folder`.
    """
    with one_line(f"{place} cannot be loaded"):
        names = _names(place)
        patterns = HEAD if names is None else _patterns(place, names)
        folder = _download(place, patterns, cached=names is None)
        if names is None and not (folder / "head.json").is_file():
            patterns = FOREIGN
            folder = _download(place, patterns, cached=True)
    _inspect(folder, patterns, place)
    return folder


def origin(place: Place, snapshot: Path) -> str:
    """What a snapshot is a snapshot of, with its commit."""
    return str(Place(place.repo, snapshot.name))


def listed(name: str, patterns: Sequence[str] = (*HEAD, *PAGES)) -> bool:
    """Whether a file's name, relative to its repository, is on a list and leads nowhere else."""
    try:
        check_name(name)
    except InputError:
        return False
    return any(fnmatch(name, p) and name.count("/") == p.count("/") for p in patterns)


def look_at(path: Path) -> None:
    """Checks a file before anything parses it; see `mmspec.safety`.

    Raises:
        InputError: a link, a pickle, weights whose header does not fit; JSON that is damaged or asks for code.
    """
    if path.suffix == ".json":
        read_settings(path)
    else:
        check_file(path)


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Says in one line what went wrong between us and the Hub, and keeps its library quiet meanwhile.

    Its warnings are silenced as they name addresses of uploads, which are as good as a password while they last. Its
    progress bars are shown on a terminal.

    Raises:
        InputError: whatever the Hub's library raised.
    """
    before, bars = hub_logging.get_verbosity(), not are_progress_bars_disabled() and not sys.stderr.isatty()
    hub_logging.set_verbosity_error()
    if bars:
        disable_progress_bars()
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # The library passes on what its transport raises, and which transport that is depends on its version.
        raise InputError(f"{what}: {explain(error)}") from error
    finally:
        hub_logging.set_verbosity(before)
        if bars:
            enable_progress_bars()


def explain(error: BaseException) -> str:
    """What an error of the Hub's library means, in one line without addresses or tokens."""
    chain = [error]
    while (deeper := chain[-1].__cause__ or chain[-1].__context__) is not None and deeper not in chain:
        chain.append(deeper)
    words: tuple[tuple[type[BaseException], str], ...] = (
        (GatedRepoError, "access to it must be asked for on its page first"),
        (RevisionNotFoundError, "it has no such revision"),
        (
            RepositoryNotFoundError,
            "the Hub has no such repository, or it is private and no token (HF_TOKEN) reaches it",
        ),
        (LocalTokenNotFoundError, "there is no token; set HF_TOKEN, or log in (hf auth login)"),
        (OfflineModeIsEnabled, "it is not in the cache, and HF_HUB_OFFLINE forbids to ask the Hub"),
    )
    for kind, said in words:
        if any(isinstance(one, kind) for one in chain):
            return said
    status = next((int(one.response.status_code) for one in chain if isinstance(one, HfHubHTTPError)), None)
    if status == 401:
        return "the Hub does not accept the token; set HF_TOKEN, or log in anew (hf auth login)"
    if status == 403:
        return "the token has no right to do that; use one with write access to it"
    if status is not None:
        detail = next(one for one in chain if isinstance(one, HfHubHTTPError))
        return f"the Hub answers {status} ({_short(detail.server_message or 'no reason given')})"
    broken = next((one for one in chain if _transport(one)), None)
    if broken is not None:
        return f"the connection failed ({type(broken).__name__}); try again"
    if any(isinstance(one, LocalEntryNotFoundError) for one in chain):
        return "the Hub cannot be reached, and it is not in the cache"
    return _short(str(error) or type(error).__name__)


def _short(text: str) -> str:
    """The beginning of a message, in one line."""
    return " ".join(re.sub(r"https?://\S+", "...", text).split())[:200]


def _transport(error: BaseException) -> bool:
    """Whether a connection failed: an error of the transport of the installed huggingface_hub, or of the system."""
    return type(error).__module__.split(".")[0] in ("httpx", "httpx2", "requests", "urllib3", "httpcore") or isinstance(
        error, ConnectionError | TimeoutError
    )


def _names(place: Place) -> list[str] | None:
    """All files of a repository, or None where the Hub cannot be asked."""
    try:
        found = HfApi().model_info(place.repo, revision=place.revision).siblings or []
    except OfflineModeIsEnabled:
        return None
    except Exception as error:
        # Every transport has its own errors; what the Hub itself answers is none of them.
        if isinstance(error, HfHubHTTPError) or not _transport(error):
            raise
        return None
    return [sibling.rfilename for sibling in found]


def _download(place: Place, patterns: Sequence[str], cached: bool) -> Path:
    """The snapshot with the files of a list; `cached` looks into the cache alone."""
    below = None if patterns is HEAD else ["*/*"]
    return Path(
        snapshot_download(
            place.repo,
            revision=place.revision,
            allow_patterns=list(patterns),
            ignore_patterns=below,
            local_files_only=cached,
        )
    )


def _patterns(place: Place, names: Sequence[str]) -> tuple[str, ...]:
    """Which list the files of a repository are fetched by: a head of ours, or one in another layout.

    Raises:
        InputError: it is neither, or a name in it leads out of it.
    """
    try:
        for name in names:
            check_name(name)
    except InputError as error:
        raise InputError(f"{place} is refused: {error}") from error
    if "head.json" in names:
        return HEAD
    top = [name for name in names if "/" not in name]
    if any(name.endswith(".index.json") for name in top):
        raise InputError(f"{place} is a whole model in several files, and no draft head")
    if any(name.endswith(".safetensors") for name in top):
        return FOREIGN
    pickles = [name for name in top if name.endswith(PICKLES)]
    if pickles:
        raise InputError(f"{place} has {pickles[0]}, a pickle, and no safetensors; pickles are not read here")
    raise InputError(f"{place} has neither head.json nor *.safetensors: it is no draft head")


def _inspect(folder: Path, patterns: Sequence[str], place: Place) -> None:
    """Refuses a snapshot whose files lead out of the cache or must not be parsed."""
    try:
        for path in _files(folder, patterns):
            look_at(path)
    except InputError as error:
        raise InputError(f"{place} is refused: {_named(error, place, folder)}") from error
    if (folder / "head.json").is_file():
        # What is handed out once stays: a download that was cut off must not.
        if missing := [name for name in NEEDED if not (folder / name).is_file()]:
            raise InputError(f"{place} is incomplete: it has no {missing[0]}; fetch or publish it again")
        target = read_settings(folder / "head.json").get("target")
        name = target.get("name") if isinstance(target, Mapping) else None
        if not isinstance(name, str) or not (name == EMBEDDED or is_repo(name)):
            raise InputError(
                f"{place} is refused: its target {name!r} is neither a repository of the Hub nor {EMBEDDED}"
            )


def _files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    found = [path for path in sorted(folder.rglob("*")) if not path.is_dir()]
    return [path for path in found if listed(path.relative_to(folder).as_posix(), patterns)]


def _settled(place: Place, snapshot: Path, key: str, fill: Callable[[Path], None]) -> Path:
    """The folder of our cache for a commit; filled under another name first, so that two processes may race."""
    home = cache_folder() / "heads" / place.repo.replace("/", "--")
    folder = home / f"{snapshot.name}{key}"
    if folder.is_dir():
        return folder
    home.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".", dir=home))
    try:
        fill(scratch)
        scratch.chmod(0o755)
        with contextlib.suppress(OSError):  # another process was faster
            os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _copy(snapshot: Path, folder: Path, patterns: Sequence[str]) -> None:
    for path in _files(snapshot, patterns):
        out = folder / path.relative_to(snapshot)
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path.resolve(), out)


def _translate(place: Place, snapshot: Path, folder: Path, target: str, dtype: str) -> None:
    """Converts a head of another layout."""
    from mmspec.convert import convert
    from mmspec.targets import load_target

    try:
        convert(snapshot, "auto", load_target(target, dtype), folder, origin=origin(place, snapshot))
    except InputError as error:
        raise InputError(_named(error, place, snapshot, folder)) from error


def _named(error: Exception, place: Place, *folders: Path) -> str:
    """A message that names the place on the Hub instead of folders of the caches."""
    text = str(error)
    for folder in folders:
        text = text.replace(str(folder), str(place))
    return text


def _verifier(settings: Mapping[str, Any]) -> str | None:
    """The target that a head's config.json names, as those for engines do."""
    node: Any = settings.get("speculators_config")
    node = node.get("verifier") if isinstance(node, Mapping) else None
    name = node.get("name_or_path") if isinstance(node, Mapping) else None
    return name if isinstance(name, str) and is_repo(name) else None
