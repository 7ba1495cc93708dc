"""What of a run is published: a folder of listed files, each looked at, without a word about the machine it is from.

Invariant: the folder holds nothing that `mmspec.hub` does not list; paths of this machine are cut to their last part
where they are values, and wherever else one is left, or a token, or this machine's name, nothing is published.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import get_token

from eval import card
from eval.summary import PLAIN
from mmspec import checkpoint as checkpoints
from mmspec.assets import EMBEDDED
from mmspec.hub import HEAD, PAGES, is_repo, listed, look_at
from mmspec.safety import read_settings
from mmspec.types import InputError

TOKEN = "a token"
SECRETS = {
    "one of Hugging Face": re.compile(r"\bhf_[A-Za-z0-9]{20,}|\bapi_org_[A-Za-z0-9]{20,}"),
    "one of GitHub": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"),
    "one that begins with sk-": re.compile(r"\bsk-[\w-]{20,}"),
    "one of AWS": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "one of Slack": re.compile(r"\bxox[abprs]-[\w-]{10,}"),
    "one of W&B": re.compile(r"\bwandb_v\d_\w{20,}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY"),
    "a password in an address": re.compile(r"://[^\s/:@\"'<>]+:[^\s/@\"'<>]+@"),
    "one behind Bearer": re.compile(r"\b[Bb]earer [\w.-]{20,}"),
}
"""Tokens and passwords by their looks, by what a finding is called."""
SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)
"""Environment variables whose values must not be in a file, whatever they look like."""
PRIVATE_HOSTS = re.compile(
    r"(?<![\d.])(?:10\.\d{1,3}|192\.168|172\.(?:1[6-9]|2\d|3[01]))\.\d{1,3}\.\d{1,3}(?![\d.])"
    r"|\b[\w-]+\.(?:local|internal|lan|corp|intranet)\b"
)
_TOPS = ("home", "Users", "root", "mnt", "media", "tmp", "var", "scratch", "data", "work", "opt", "srv", "workspace")
_WINDOWS = r"(?<![A-Za-z])[A-Za-z]:\\+\w[^\s\"'<>|]*|file://[^\s\"'<>]+"


@dataclass(frozen=True)
class Options:
    """How a run is published.

    Args:
        repo: `org/name`.
        base_model: the target's name on the Hub, where the run has another one (a folder of this machine).
        license: of the head, an identifier of the Hub; None is the target's.
        scores: folder with the evaluation (default: `eval` of the run).
        report: whether its page goes along, which shows records of the benchmark with their pictures.
        anyway: publish what provenance or correctness gate speak against; the card says it.
        allowed: words that the scan is to let pass.
    """

    repo: str
    base_model: str | None = None
    license: str | None = None
    scores: Path | None = None
    report: bool = True
    anyway: bool = False
    allowed: Sequence[str] = ()


@dataclass(frozen=True)
class Finding:
    """Something in a file that must not be published.

    Args:
        file: its name in the folder.
        line: counted from 1.
        what: the kind.
        text: what was found; of a token not a letter, for it would be in a log, but which one it is and where.
    """

    file: str
    line: int
    what: str
    text: str


def build(run: Path, out: Path, options: Options) -> list[str]:
    """Writes the exact folder that is published.

    Args:
        run: run folder of train/distill.py or scripts/convert.py, or a place on the Hub.
        out: a new or empty folder.

    Returns:
        Names of the files, sorted.

    Raises:
        InputError: the run is damaged, unproven or failed its gate; something in a file must not be published.
    """
    loaded = checkpoints.load(run)
    folder = loaded.folder
    base_model = target_on_hub(loaded.target.name, options.base_model)
    scores = options.scores or folder / "eval"
    summary = read_summary(scores)
    doubts = objections(loaded, summary)
    if doubts and not options.anyway:
        raise InputError(f"{run} is not published: {doubts[0]}; --anyway publishes it, and its card says so")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    _copy_run(folder, out, base_model or EMBEDDED)
    if summary is not None:
        _copy_scores(scores, out, summary, options.report)
    facts = card.Facts(options.repo, loaded, base_model, options.license, summary, doubts)
    text = card.write(facts, out)
    card.validate(text)
    (out / "README.md").write_text(text, encoding="utf-8")
    return check(out, options.allowed)


def check(folder: Path, allowed: Sequence[str] = ()) -> list[str]:
    """Looks at each file of a folder that is about to be published.

    Returns:
        Names of the files, sorted.

    Raises:
        InputError: a link, a name that is not on the list, weights that are no safetensors, or a finding of `scan`.
    """
    names = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise InputError(f"{folder}: {name} is a link; only files are published")
        if path.is_dir():
            continue
        if not listed(name):
            raise InputError(f"{folder}: {name} is not on the list of what is published ({', '.join((*HEAD, *PAGES))})")
        look_at(path)
        names.append(name)
    found = [one for one in scan(folder, names) if one.text not in allowed]
    if found:
        one = found[0]
        more = f" ({len(found)} findings in all)" if len(found) > 1 else ""
        raise InputError(
            f"{one.file}, line {one.line}, holds {one.what}, {one.text!r}{more}; take it out of the run, or let it "
            f"pass with --allow {one.text!r}"
        )
    return names


def scan(folder: Path, names: Sequence[str]) -> list[Finding]:
    """Tokens, host names and paths of this machine in files; of weights their header is read, the rest are numbers."""
    searches = _searches()
    found = []
    for name in names:
        for number, line in enumerate(_text(folder / name).splitlines(), start=1):
            for what, search in searches:
                for text in search(line):
                    found.append(Finding(name, number, what, f"{text} in {name}:{number}" if what == TOKEN else text))
    return found


def objections(loaded: checkpoints.Checkpoint, summary: Mapping[str, Any] | None) -> list[str]:
    """What speaks against publishing: no provenance, or a correctness gate that was not passed; the gravest first."""
    doubts = []
    path = loaded.folder / "provenance.json"
    if not path.is_file():
        doubts.append("it has no provenance.json, so nobody knows how it came about")
    elif (made := (read_settings(path).get("target") or {}).get("fingerprint")) != loaded.target.fingerprint:
        doubts.append(f"provenance.json is of another run (target {made}, the head's is {loaded.target.fingerprint})")
    if summary is None:
        return [*doubts, "it was never evaluated (python -m eval.mmspec --ckpt RUN)"]
    said = (summary.get("settings") or {}).get("fingerprint")
    if said != loaded.target.fingerprint:
        doubts.append(f"its evaluation is of another target ({said}, the head's is {loaded.target.fingerprint})")
    if summary.get("invalid") or summary.get("valid") is False:
        doubts.append("its evaluation is marked invalid")
    # Of a sweep every cell is published, not only the first one, which is at the top.
    cells = [summary, *summary.get("cells", ())]
    for name, method in (entry for cell in cells for entry in cell["methods"].items()):
        overall = method["overall"]
        if method.get("invalid") or overall.get("invalid"):
            doubts.append(f"its evaluation marks {name} invalid")
        if name == PLAIN:
            continue
        if overall.get("exact_match") is None:
            doubts.append(f"the text of {name} was not compared with plain decoding's (--verifier match compares)")
        elif overall["exact_match"] < 1 or overall.get("diverged"):
            share = overall["exact_match"]
            doubts.append(f"{name} changed the text: exact_match {share:.3f}, {overall.get('diverged')} without a tie")
    return list(dict.fromkeys(doubts))


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The evaluation in a folder, or None. Raises InputError when it is damaged."""
    path = folder / "summary.json"
    if not path.is_file():
        return None
    summary = read_settings(path)
    if not isinstance(summary.get("methods"), dict) or PLAIN not in summary["methods"] or "primary" not in summary:
        raise InputError(f"{path} is no summary of python -m eval.mmspec; evaluate again")
    return summary


def target_on_hub(name: str, given: str | None) -> str | None:
    """Where others find the target: a repository of the Hub; None is the embedded one, which every installation has.

    Raises:
        InputError: it is a folder of this machine, and nothing else was given.
    """
    if given is not None:
        if not is_repo(given):
            raise InputError(f"--base-model {given} must be org/name, the target's repository on the Hub")
        return given
    if name == EMBEDDED or name == f"embedded:{EMBEDDED}":
        return None
    if not is_repo(name) or Path(name).exists():
        raise InputError(
            f"the target {name} is a folder of this machine; say what it is on the Hub (--base-model ORG/NAME)"
        )
    return name


def discreet(value: Any) -> Any:
    """A value with paths of this machine cut to their last part, all the way down."""
    if isinstance(value, str):
        return checkpoints.discreet(value)
    if isinstance(value, Mapping):
        return {key: discreet(item) for key, item in value.items()}
    return [discreet(item) for item in value] if isinstance(value, list | tuple) else value


def _copy_run(run: Path, out: Path, target: str) -> None:
    """The listed files of a run. What is text is written anew without paths; who the target is becomes `target`."""
    for pattern in HEAD:
        for path in sorted(run.glob(pattern)):
            if path.is_symlink():
                raise InputError(f"{path} is a link; only files are published")
            copy = out / path.relative_to(run)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".safetensors":
                look_at(path)
                shutil.copyfile(path, copy)
            elif path.suffix == ".json":
                value = discreet(read_settings(path))
                if isinstance(value.get("target"), dict) and "name" in value["target"]:
                    value["target"]["name"] = target
                checkpoints.write_json(copy, value)
            else:
                recipe = discreet(yaml.safe_load(path.read_text(encoding="utf-8")))
                recipe["target"]["name"] = target
                copy.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _copy_scores(scores: Path, out: Path, summary: Mapping[str, Any], report: bool) -> None:
    """The evaluation: its figures, its page and its plots."""
    (out / "eval").mkdir()
    checkpoints.write_json(out / "eval" / "summary.json", discreet(summary))
    if report and (scores / "report.html").is_file():
        shutil.copyfile(scores / "report.html", out / "eval" / "report.html")
    rows = scores / "requests.jsonl"
    lines = rows.read_text(encoding="utf-8").splitlines() if rows.is_file() else []
    plots = card.plots(summary, [json.loads(line) for line in lines])
    if plots:
        (out / "plots").mkdir()
    for name, drawing in plots.items():
        (out / "plots" / name).write_text(drawing, encoding="utf-8")


def _text(path: Path) -> str:
    if path.suffix != ".safetensors":
        return path.read_text(encoding="utf-8")
    with path.open("rb") as file:
        return file.read(struct.unpack("<Q", file.read(8))[0]).decode("utf-8", "replace")


def _searches() -> list[tuple[str, Callable[[str], list[str]]]]:
    """What is looked for, each with a search that gives what it found in a line, of tokens what they are called."""

    def by(pattern: re.Pattern[str], called: str = "") -> Callable[[str], list[str]]:
        return lambda line: [called or match[0] for match in pattern.finditer(line)]

    # Whatever stands at the root of this machine may begin a path of it.
    tops = sorted({*_TOPS, *(name for name in os.listdir("/") if re.fullmatch(r"[A-Za-z][\w.-]*", name))})
    paths = re.compile(rf"(?<![\w./<~+\\-])/(?:{'|'.join(map(re.escape, tops))})/[^\s\"'<>,;)\]]+|{_WINDOWS}")
    set_here = [(k, v) for k, v in sorted(os.environ.items()) if SECRET_NAMES.search(k)]
    known = {f"the value of {k}": v for k, v in set_here if len(v) >= 8 and not os.path.isabs(v)}
    known |= {"that of the Hub's login": token} if (token := get_token()) else {}
    secrets = SECRETS | {called: re.compile(re.escape(value)) for called, value in known.items()}
    hosts = {socket.gethostname(), socket.gethostname().split(".")[0]} - {"localhost"}
    named = [rf"\b{re.escape(host)}\b" for host in sorted(hosts) if len(host) > 3]
    searches: list[tuple[str, Callable[[str], list[str]]]] = [
        *((TOKEN, by(pattern, called)) for called, pattern in secrets.items()),
        ("a path of this machine", by(paths)),
        ("an address inside a network", by(PRIVATE_HOSTS)),
    ]
    if named:
        searches.append(("this machine's name", by(re.compile("|".join(named)))))
    return searches
