"""From YAML and the command line to a recipe.

Invariant: what `load` returns are plain dataclasses (no OmegaConf object leaves this package), and their values make
sense. `head.kind: foo` imports `mmspec.heads.foo`, whose `Config` gives the other keys of the `head` node: the file
name is the registry.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import mmspec.heads
from mmspec.losses import LossConfig
from mmspec.recipe.checks import check
from mmspec.recipe.nodes import (
    HEAD_KEYS,
    Data,
    DeepSpeedNode,
    HeadNode,
    Instruction,
    Lora,
    Optim,
    PolicyNode,
    Recipe,
    Run,
    Source,
    TargetNode,
)
from mmspec.recipe.settings import build_config, check_keys, one_line, thawed, typed
from mmspec.types import InputError

NOT_A_DRAFT_HEAD = ("base", "viskip")
"""Files of `mmspec/heads` that `head.kind` cannot name, besides the `_shared` ones: the base, and the controller."""


def load(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        path: YAML file.
        overrides: `key.path=value` items, later ones win.

    Raises:
        InputError: the file is missing or no YAML, a key is unknown, a value is missing, mistyped or impossible.
    """
    raw = _merge_raw(read_yaml(Path(path), _nodes()), overrides)
    head_module = import_head(_head_kind(raw, path))
    schema = _schema(head_module)
    check_keys(raw, schema, prefix="")
    plain = typed(schema, raw)
    recipe = _assemble(plain, head_module)
    check(recipe)
    return recipe


def head_kinds() -> list[str]:
    """Names that `head.kind` may take: the files of `mmspec/heads`."""
    names = [module.name for module in pkgutil.iter_modules(mmspec.heads.__path__)]
    return sorted(name for name in names if name not in NOT_A_DRAFT_HEAD and not name.startswith("_"))


def import_head(kind: str) -> ModuleType:
    """The module `mmspec.heads.<kind>`.

    Raises:
        InputError: there is no such file.
    """
    if kind not in head_kinds():
        raise InputError(f"head.kind={kind!r} is unknown; mmspec/heads has: {', '.join(head_kinds()) or 'none'}")
    return importlib.import_module(f"mmspec.heads.{kind}")


def read_yaml(path: Path, nodes: Sequence[str]) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        path: the file.
        nodes: its top-level keys, for the error message alone.

    Raises:
        InputError: the file is missing, or no YAML mapping.
    """
    if not path.is_file():
        near = sorted(str(p) for p in Path("recipes").glob("*.yaml"))
        raise InputError(f"recipe {path} does not exist" + (f"; there are: {', '.join(near)}" if near else ""))
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path} is no valid YAML: {one_line(error)}") from error
    if not isinstance(raw, dict):
        raise InputError(f"recipe {path} must be a mapping with the nodes {', '.join(nodes)}")
    return raw


def _merge_raw(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The file's containers with the overrides applied, and `data.train` written out as one source."""
    for item in overrides:
        if "=" not in item or item.startswith(("-", "=")):
            raise InputError(f"override {item!r} is not of the form key=value, as in optim.lr=1e-3")
    try:
        merged = OmegaConf.merge(OmegaConf.create(raw), OmegaConf.from_dotlist(list(overrides)))
        plain: Any = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, ValueError, TypeError, yaml.YAMLError) as error:
        raise InputError(f"the recipe or its overrides cannot be read: {one_line(error)}") from error
    for node in ("head", "data", "policy"):
        if node in plain and not isinstance(plain[node], dict):
            raise InputError(f"{node} must be a mapping, not {plain[node]!r}")
    data = plain.get("data", {})
    if "train" in data:
        data["sources"] = [{"path": data.pop("train")}]
    return plain


def _head_kind(raw: Mapping[str, Any], path: Path | str) -> str:
    kind = raw.get("head", {}).get("kind")
    if not isinstance(kind, str):
        raise InputError(f"{path}: head.kind is missing; mmspec/heads has: {', '.join(head_kinds()) or 'none'}")
    return kind


def _nodes() -> list[str]:
    return [f.name for f in dataclasses.fields(Recipe)]


def _schema(head_module: ModuleType) -> dict[str, Any]:
    """Structured node by node: the classes whose fields and types the raw containers must fit."""
    viskip = importlib.import_module("mmspec.heads.viskip")
    head_class = dataclasses.make_dataclass(
        "HeadKeys",
        [
            ("kind", str, MISSING),
            ("init_from", str | None, None),
            ("init_layer", int | None, None),
            ("lora", Lora, dataclasses.field(default_factory=Lora)),
            ("blind", bool, False),
        ],
        bases=(thawed(head_module.Config),),
    )
    controller = thawed(viskip.Config)
    policy_class = dataclasses.make_dataclass(
        "PolicyKeys",
        [("controller", controller, dataclasses.field(default_factory=controller))],
        bases=(PolicyNode,),
    )
    return {
        "target": TargetNode,
        "head": head_class,
        "data": Data,
        "loss": thawed(LossConfig),
        "optim": Optim,
        "policy": policy_class,
        "run": Run,
        "deepspeed": DeepSpeedNode,
    }


def _assemble(plain: dict[str, Any], head_module: ModuleType) -> Recipe:
    """Plain containers to the dataclasses; heads' own checks speak here."""
    viskip = importlib.import_module("mmspec.heads.viskip")
    head, data, policy = dict(plain["head"]), dict(plain["data"]), dict(plain["policy"])
    kind, init_from, init_layer, lora, blind = (head.pop(key) for key in HEAD_KEYS)
    data["sources"] = [Source(**source) for source in data["sources"]]
    data["instructions"] = [Instruction(**instruction) for instruction in data["instructions"]]
    policy["controller"] = build_config("policy.controller", viskip.Config, policy["controller"])
    policy["optim"] = build_config("policy.optim", Optim, policy["optim"])
    return Recipe(
        target=TargetNode(**plain["target"]),
        head=HeadNode(kind, init_from, build_config("head", head_module.Config, head), init_layer, Lora(**lora), blind),
        data=Data(**data),
        loss=build_config("loss", LossConfig, plain["loss"]),
        optim=build_config("optim", Optim, plain["optim"]),
        policy=PolicyNode(**policy),
        run=Run(**plain["run"]),
        deepspeed=DeepSpeedNode(**plain["deepspeed"]),
    )
