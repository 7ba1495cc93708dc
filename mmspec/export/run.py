"""From a run to a folder that an engine reads: checked, translated, verified, and only then there"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from mmspec import checkpoint
from mmspec.assets import resolve
from mmspec.checkpoint import Checkpoint
from mmspec.export.engines import check
from mmspec.export.folder import assembled, check_out, write, write_notes
from mmspec.export.layouts import Source, layout, needs_target
from mmspec.export.verify import Check, verify
from mmspec.targets import describe_target, load_target
from mmspec.types import InputError, Target

DTYPES = ("float32", "bfloat16", "float16")
Verifier = Callable[[Path, Checkpoint, Target, torch.dtype], list[Check]]
"""(exported folder, run, target, dtype of the weights) -> what a further way of reading found."""


@dataclass(frozen=True)
class Exported:
    """What came of it.

    Args:
        made: the run.
        notes: what to know before serving it, see `engines.check`.
        checks: of the verification; empty where none was asked for.
    """

    made: Checkpoint
    notes: list[str]
    checks: list[Check]


def export(
    run: Path | str,
    format: str,
    out: Path | str,
    target: str | None = None,
    verifier: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    ways: Sequence[Verifier] | None = None,
    force: bool = False,
    head_only: bool = False,
    merged_images: bool = False,
) -> Exported:
    """Writes a trained head in an engine's layout.

    Args:
        run: a run folder of train/distill.py or scripts/convert.py.
        format: a key of `engines.ENGINES`.
        out: the folder to write.
        target: another name or place of the run's target.
        verifier: the name by which the engine finds the target; default: `target`.
        dtype: of the weights, one of DTYPES; default: as they are saved, halves and fp32, else fp32.
        device: where the target is loaded, if it must be.
        ways: verify, and by these ways too; None: do not.
        force: replace an earlier export.
        head_only: leave a ViSkip controller behind.
        merged_images: the engine is an SGLang that hands its draft merged image embeddings.

    Raises:
        InputError: a run, target, folder or setting that cannot be exported.
        Mismatch: the verification failed, and nothing was written.
    """
    folder = Path(out)
    check_out(folder, force)
    made = checkpoint.load(run)
    name = target or made.target.name
    if name.startswith(".../"):  # see `checkpoint.discreet`
        raise InputError(f"{run} knows its target by no more than {name}; name its folder by --target")
    described = describe_target(name)
    notes = check(format, made, described, head_only, merged_images)
    state = load_file(str(made.folder / "head.safetensors"))
    made.head()  # names and shapes are its config's
    kind = _dtype(dtype, next(tensor.dtype for tensor in state.values() if tensor.is_floating_point()))
    loaded: Target | None = None
    if ways is not None or needs_target(format, made.config):
        loaded = load_target(name, "float32", device)
        made.check_target(loaded)
    if Path(resolve(verifier or name)).is_dir():
        notes.append("the target was named as a folder: give the engine its Hub id or its place there (--verifier)")
    written = layout(format, Source(made, state, described, loaded, verifier or name, kind))
    with assembled(folder, force) as making:
        write(making, written)
        checks: list[Check] = []
        if ways is not None and loaded is not None:
            for way in (_ourselves(format), *ways):
                checks += way(making, made, loaded, kind)
        write_notes(making, made, format, verifier or name, notes, [str(check) for check in checks])
    return Exported(made, notes, checks)


def _ourselves(format: str) -> Verifier:
    def way(folder: Path, made: Checkpoint, target: Target, dtype: torch.dtype) -> list[Check]:
        return verify(folder, made, format, target, dtype)

    return way


def _dtype(asked: str | None, saved: torch.dtype) -> torch.dtype:
    if asked is not None and asked not in DTYPES:
        raise InputError(f"--dtype {asked!r} is none of {', '.join(DTYPES)}")
    name = asked or str(saved).removeprefix("torch.")
    found: torch.dtype = getattr(torch, name if name in DTYPES else "float32")
    return found
