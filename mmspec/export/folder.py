"""An exported folder: model.safetensors, config.json and NOTES.md, all of it or nothing.

Invariant: the folder appears under its name when it is complete and was checked, and nothing but an earlier export is
ever replaced.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmspec.checkpoint import Checkpoint, discreet, git_commit, write_json, write_tensors
from mmspec.export.engines import ENGINES
from mmspec.export.layouts import Layout
from mmspec.types import InputError

FILES = ("NOTES.md", "config.json", "model.safetensors")
"""All that an exported folder holds."""


def check_out(out: Path, force: bool) -> None:
    """Whether a folder can be written, before anything is computed for it.

    Args:
        out: where to.
        force: whether an earlier export may be replaced.

    Raises:
        InputError: something else is there, or an earlier export without `force`.
    """
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise InputError(f"--out {out} is there already and no folder; name a new one")
    names = sorted(path.name for path in out.iterdir())
    if names and not force:
        raise InputError(f"--out {out} is there already and not empty; name a new folder, or say --force")
    if strange := [name for name in names if name not in FILES]:
        raise InputError(
            f"--out {out} has {strange[0]!r} and is no earlier export, so it is not replaced; name another"
        )


@contextlib.contextmanager
def assembled(out: Path, force: bool = False) -> Iterator[Path]:
    """An empty folder to fill, which gets its name when the block ends without an error.

    Args:
        out, force: see `check_out`.

    Raises:
        InputError: see there; the folder cannot be made.
    """
    check_out(out, force)
    making, former = (out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.{age}") for age in ("new", "old"))
    try:
        making.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"--out {out} cannot be made ({error.strerror}); name another folder") from error
    try:
        yield making
        check_out(out, force)
        if out.exists():
            os.rename(out, former)
        try:
            os.rename(making, out)
        except OSError:
            if former.exists():
                os.rename(former, out)
            raise
    finally:
        for left in (making, former):
            shutil.rmtree(left, ignore_errors=True)


def write(folder: Path, layout: Layout) -> None:
    """Writes what an engine reads of a layout."""
    # The mark of torch's tensors, without which transformers refuses the file.
    write_tensors(folder / "model.safetensors", layout.tensors, {"format": "pt"})
    write_json(folder / "config.json", layout.config)


def write_notes(
    folder: Path, made: Checkpoint, format: str, verifier: str, notes: Sequence[str], checks: Sequence[str]
) -> None:
    """Writes NOTES.md: what was exported, how it is served, and what to know of it.

    Args:
        folder: of the export.
        made: the run.
        format: a key of ENGINES.
        verifier: the name by which the engine finds the target.
        notes: see `engines.check`.
        checks: what `verify` found, in words.
    """
    engine, config = ENGINES[format], made.config
    said = [f"- kind: {made.kind}, for {discreet(made.target.name)}", f"- image_input: {config.image_input}"]
    if engine.kind == "eagle3":
        said += [
            f"- rope: {config.rope}",
            f"- hidden states read: {', '.join(str(tap) for tap in sorted(config.taps))} (0 is the embeddings)",
            f"- draft vocabulary: {config.draft_vocab_size} of {config.vocab_size} tokens",
        ]
    lines = [
        f"# A draft head in the {format} layout",
        "",
        f"For {engine.name}, written by scripts/export.py at commit {git_commit() or 'unknown'}.",
        "",
        *said,
        "",
        "## Serve it",
        "",
        f"    {_command(format, made, discreet(verifier))}",
        "",
        "## To know",
        "",
        *[f"- {note}" for note in notes],
        *([] if notes else ["- nothing"]),
        "",
        "## Verified",
        "",
        *[f"- {check}" for check in checks],
        *([] if checks else ["- no: export with --verify"]),
    ]
    (folder / "NOTES.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _command(format: str, made: Checkpoint, verifier: str) -> str:
    tree = made.tree
    if format == "sglang":
        return (
            f"python -m sglang.launch_server --model-path {verifier} --speculative-algorithm EAGLE3 "
            f"--speculative-draft-model-path DIR --speculative-num-steps {tree.depth} "
            f"--speculative-eagle-topk {tree.width} --speculative-num-draft-tokens {tree.budget + 1}"
        )
    method = "medusa" if format == "vllm-medusa" else "eagle3"
    depth = made.config.n_ahead if method == "medusa" else tree.depth
    return (
        f"vllm serve {verifier} --speculative-config "
        f'\'{{"method": "{method}", "model": "DIR", "num_speculative_tokens": {depth}}}\''
    )
