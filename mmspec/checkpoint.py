"""Run folders: a head and its controller with everything needed to decode with them again.

Layout: `head.safetensors head.json viskip.safetensors viskip.json tree.json recipe.yaml provenance.json`.
Invariant: every file is written under a temporary name and renamed, so a reader sees the old file or the new one,
and weights are safetensors only (nothing here unpickles). A checkpoint names its target by fingerprint, and refuses
another one before a single token is decoded.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from mmspec import hub
from mmspec.files import replacing, write_text
from mmspec.heads._blind import blind_twin
from mmspec.losses import LossConfig
from mmspec.recipe import Recipe, build_config, import_head
from mmspec.types import InputError, Target, TargetShape

SCHEMA = 1
LIBRARIES = ("torch", "transformers", "deepspeed", "safetensors", "omegaconf", "mmspec-toolkit")


@dataclass(frozen=True)
class DraftTree:
    """The draft tree to decode with: levels, candidates per level, and verified nodes (the root excluded)."""

    depth: int
    width: int
    budget: int


@dataclass(frozen=True)
class TargetIdentity:
    """What a checkpoint remembers of the target it was made for."""

    name: str
    fingerprint: str
    shape: TargetShape


@dataclass(frozen=True)
class Checkpoint:
    """A run folder that was read and found complete; weights are loaded on demand.

    Args:
        folder: where it is.
        kind: file name under `mmspec/heads`.
        config: the head's `Config`.
        target: the target it was made for.
        tree: depth, width and budget to decode with.
        viskip: the controller's `Config`, or None.
        blind: whether the head is a vision-blind twin.
    """

    folder: Path
    kind: str
    config: Any
    target: TargetIdentity
    tree: DraftTree
    viskip: Any | None = None
    blind: bool = False

    def check_target(self, target: Target) -> None:
        """Refuses a target this checkpoint was not made for.

        Raises:
            InputError: hidden size, vocabulary or fingerprint differ; both values are named.
        """
        pairs: tuple[tuple[str, Any, Any], ...] = (
            ("hidden size", self.target.shape.hidden_size, target.shape.hidden_size),
            ("vocabulary size", self.target.shape.vocab_size, target.shape.vocab_size),
            ("target fingerprint", self.target.fingerprint, target.fingerprint),
        )
        for what, mine, its in pairs:
            if mine != its:
                raise InputError(
                    f"checkpoint {self.folder} was made for {self.target.name} with {what} {mine}, but the target "
                    f"{target.name} has {its}; use its own target or train a head for this one"
                )

    def head(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The draft head, in eval mode.

        Raises:
            InputError: weights and config disagree.
        """
        module = build_head(self.kind, self.config, blind=self.blind)
        return _filled(module, self.folder / "head.safetensors", dtype)

    def controller(self, dtype: torch.dtype = torch.float32) -> nn.Module | None:
        """The ViSkip controller in eval mode, or None where none was trained."""
        if self.viskip is None:
            return None
        module = build_controller(self.viskip)
        return _filled(module, self.folder / "viskip.safetensors", dtype)

    def deployed(self, target: Target) -> Any:
        """The controller ready to decode with (`viskip.Deployed`), or None where none was trained."""
        controller = self.controller()
        if controller is None:
            return None
        return _viskip().Deployed(controller.to(target.device), target.embed, target.shape.vocab_size)


def load_controller(path: Path | str, target: Target) -> Any:
    """The controller of a run folder ready to decode with (`viskip.Deployed`), whether or not a head lies beside it.

    Raises:
        InputError: there is none, or it was made for another target.
    """
    folder = Path(path)
    if not (folder / "viskip.json").is_file():
        raise InputError(f"{folder} has no controller (viskip.json); train one with train/distill.py")
    described = _read_json(folder / "viskip.json")
    fingerprint = _field(_field(described, "target", folder / "viskip.json"), "fingerprint", folder / "viskip.json")
    if fingerprint != target.fingerprint:
        raise InputError(f"the controller of {folder} was made for another target than {target.name}")
    values = _field(described, "config", folder / "viskip.json")
    config = build_config(str(folder / "viskip.json"), _viskip().Config, values)
    head: Any = _filled(build_controller(config), folder / "viskip.safetensors", torch.float32).to(target.device)
    return _viskip().Deployed(head, target.embed, target.shape.vocab_size)


def build_head(kind: str, config: Any, loss: LossConfig | None = None, blind: bool = False) -> nn.Module:
    """A fresh head of `mmspec.heads.<kind>`, or its vision-blind twin; without a loss for drafting alone."""
    head: Any = import_head(kind).Head
    made: Any = blind_twin(head) if blind else head
    built: nn.Module = made(config, loss)
    return built


def build_controller(config: Any) -> nn.Module:
    """A fresh ViSkip controller."""
    controller: nn.Module = _viskip().Head(config)
    return controller


def save_head(folder: Path, state: Mapping[str, Tensor], config: Any, target: Target, blind: bool = False) -> None:
    """Writes `head.safetensors` and `head.json`.

    Args:
        folder: the run folder.
        state: the head's state dict.
        config: its resolved `Config`; the module that defines it is the head's kind.
        target: the target it drafts for.
        blind: whether it is a vision-blind twin.
    """
    _save_module(folder, "head", state, config, target, {"blind": blind})


def save_controller(
    folder: Path, state: Mapping[str, Tensor], config: Any, target: Target, held_out: Sequence[Any] = ()
) -> None:
    """Writes `viskip.safetensors` and `viskip.json`; arguments as for `save_head`, and

    Args:
        held_out: how well it is calibrated, JSON rows.
    """
    _save_module(folder, "viskip", state, config, target, {"held_out": list(held_out)})


def save_tree(folder: Path, tree: DraftTree) -> None:
    """Writes `tree.json`."""
    write_json(folder / "tree.json", dataclasses.asdict(tree))


def load(path: Path | str, target: str | None = None, dtype: str = "float32") -> Checkpoint:
    """Reads a run folder.

    Args:
        path: the folder, or a place on the Hub (see `mmspec.hub`).
        target, dtype: for a head of the Hub in another project's layout, see `hub.run_folder`.

    Raises:
        InputError: the folder is missing, empty or incomplete, or a file in it is damaged; see `hub.run_folder`.
    """
    folder = hub.run_folder(path, target, dtype)
    if not folder.is_dir():
        raise InputError(f"checkpoint {folder} does not exist; train one with train/distill.py")
    if not any(folder.iterdir()):
        raise InputError(f"checkpoint {folder} is empty; train a head into it with train/distill.py")
    for name in hub.NEEDED:
        if not (folder / name).is_file():
            raise InputError(
                f"checkpoint {folder} is incomplete: it has no {name}; finish its training (run.resume=true)"
            )
    if (folder / "viskip.json").is_file() != (folder / "viskip.safetensors").is_file():
        raise InputError(f"checkpoint {folder} has only one of viskip.json and viskip.safetensors; train it again")
    head = _read_json(folder / "head.json")
    _check_weights(folder / "head.safetensors")
    viskip = None
    if (folder / "viskip.json").is_file():
        _check_weights(folder / "viskip.safetensors")
        values = _field(_read_json(folder / "viskip.json"), "config", folder / "viskip.json")
        viskip = build_config(str(folder / "viskip.json"), _viskip().Config, values)
    where = folder / "head.json"
    kind = _field(head, "kind", where)
    config = build_config(str(where), import_head(kind).Config, _field(head, "config", where))
    identity = _field(head, "target", where)
    made_for = TargetIdentity(
        _field(identity, "name", where),
        _field(identity, "fingerprint", where),
        build_config(str(where), TargetShape, _field(identity, "shape", where)),
    )
    if config.resolve(made_for.shape) != config:
        raise InputError(
            f"{where} is damaged (its config does not say all of the head's shape); copy or train it again"
        )
    tree = build_config(str(folder / "tree.json"), DraftTree, _read_json(folder / "tree.json"))
    return Checkpoint(folder, kind, config, made_for, tree, viskip, bool(head.get("blind", False)))


def save_provenance(folder: Path, recipe: Recipe, target: Target, data_hash: str, argv: Sequence[str]) -> None:
    """Writes `provenance.json`: how this run came about, without host names or paths outside the project."""
    write_json(
        folder / "provenance.json",
        {
            "schema": SCHEMA,
            "command": [discreet(word) for word in argv],
            "commit": git_commit(),
            "python": sys.version.split()[0],
            "libraries": {name: _version(name) for name in LIBRARIES},
            "seed": recipe.run.seed,
            "data_hash": data_hash,
            "target": {
                "name": discreet(target.name),
                "fingerprint": target.fingerprint,
                "dtype": recipe.target.dtype,
                "quantize": recipe.target.quantize,
            },
        },
    )


def git_commit() -> str | None:
    """The project's commit, with `+changes` when the working tree differs; None outside a git checkout."""
    root = Path(__file__).resolve().parents[1]
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):  # no git, no repository, or one that takes too long
        return None


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes safetensors atomically, equal tensors as equal bytes; copied, so shared storage is no obstacle."""
    copied = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    header, data = _in_order(save(copied, metadata=dict(metadata or {})))
    # `save_file` would make a file that only its owner may read, whatever the umask says.
    with replacing(path) as scratch, scratch.open("wb") as file:
        file.write(header)
        file.write(data)


def _in_order(raw: bytes) -> tuple[bytes, memoryview]:
    """Header and data of a safetensors file, its metadata in order: the library has them in that of a random hash."""
    end = 8 + int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:end])
    if "__metadata__" in entries:
        entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # data are aligned
    return len(header).to_bytes(8, "little") + header, memoryview(raw)[end:]


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def discreet(word: str) -> str:
    """A command-line word with every absolute path made relative to the project, or cut to its last part."""
    key, equals, value = word.partition("=")
    if not equals:
        key, value = "", word
    if os.path.isabs(value):
        root = Path(__file__).resolve().parents[1]
        path = Path(value)
        value = str(path.relative_to(root)) if path.is_relative_to(root) else f".../{path.name}"
    return f"{key}{equals}{value}"


def _viskip() -> ModuleType:
    return importlib.import_module("mmspec.heads.viskip")


def _save_module(
    folder: Path,
    stem: str,
    state: Mapping[str, Tensor],
    config: Any,
    target: Target,
    more: Mapping[str, Any] | None = None,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / f"{stem}.safetensors", state, {"format": "pt", "schema": str(SCHEMA)})
    write_json(
        folder / f"{stem}.json",
        {
            "schema": SCHEMA,
            "kind": type(config).__module__.rsplit(".", 1)[-1],
            **(more or {}),
            "config": dataclasses.asdict(config),
            "target": {
                "name": discreet(target.name),
                "fingerprint": target.fingerprint,
                "shape": dataclasses.asdict(target.shape),
            },
        },
    )


def _filled(module: nn.Module, path: Path, dtype: torch.dtype) -> nn.Module:
    """The module with the file's weights, names and shapes strictly equal; what a module's `LATER` names may be missing
    in older files."""
    state, wanted = _tensors(path), module.state_dict()
    state = {name: wanted[name] for name in getattr(module, "LATER", ())} | state
    missing, extra = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    if missing or extra:
        raise InputError(
            f"{path} does not fit its config: missing {missing[:3] or 'none'}, unexpected {extra[:3] or 'none'}"
        )
    for name, tensor in wanted.items():
        if tensor.shape != state[name].shape:
            raise InputError(
                f"{path}: {name} has shape {tuple(state[name].shape)}, its config asks for {tuple(tensor.shape)}"
            )
    module.load_state_dict(state)
    floating = {name for name, tensor in wanted.items() if tensor.is_floating_point()}
    return (module.to(dtype) if floating else module).eval()


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged ({_line(error)}); copy or train it again") from error


def _check_weights(path: Path) -> None:
    """Opens the file: its header and its length are checked without reading the weights."""
    try:
        with safe_open(str(path), framework="pt") as file:
            empty = not list(file.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged ({_line(error)}); copy or train it again") from error
    if empty:
        raise InputError(f"{path} holds no weights; train it again")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is damaged ({_line(error)}); copy or train it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged (not a JSON object); copy or train it again")
    return value


def _field(values: Mapping[str, Any], key: str, path: Path) -> Any:
    if key not in values:
        raise InputError(f"{path} is damaged (no {key!r}); copy or train it again")
    return values[key]


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
