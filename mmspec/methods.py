"""Training-free methods by name: the files of `mmspec/drafters` are the registry, as those of `mmspec/heads` are.

A file there has a `Config`, whose fields are the method's settings and whose `depth` and `budget` are what to plan for,
and `make(config, target)`. `hybrid` stands beside them: it puts one of them in front of a draft head.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import mmspec.drafters
from mmspec.drafters._host import HostDrafter, Stream
from mmspec.drafters.hybrid import Config as HybridConfig
from mmspec.drafters.hybrid import HybridDrafter
from mmspec.policy import FixedPolicy
from mmspec.recipe import read_yaml, typed_config
from mmspec.types import Drafter, InputError, Target

HYBRID = "hybrid"
NOT_ALONE = ("null", HYBRID)
"""Files of `mmspec/drafters` that are no method of their own: plain decoding, and what needs a head."""

Settings = Mapping[str, Mapping[str, Any]]
"""Settings by method, as in recipes/methods/training_free.yaml; what is not given has its default."""


def method_names() -> list[str]:
    """The methods that need no training, in alphabetical order."""
    names = [module.name for module in pkgutil.iter_modules(mmspec.drafters.__path__)]
    return sorted(name for name in names if name not in NOT_ALONE and not name.startswith("_"))


def make_method(name: str, target: Target, settings: Mapping[str, Any] | None = None) -> tuple[Drafter, FixedPolicy]:
    """A training-free method for a target.

    Args:
        name: one of `method_names()`.
        target: what it drafts for.
        settings: fields of its `Config`; what is not given has its default.

    Returns:
        Its drafter, and the policy that asks for the drafts it is meant to make.

    Raises:
        InputError: an unknown method, key or value; the message says which ones there are.
    """
    config = configure(name, settings)
    drafter: Drafter = _module(name).make(config, target)
    return drafter, FixedPolicy(config.depth, config.budget)


def make_hybrid(
    target: Target, head: Drafter, depth: int, budget: int, settings: Mapping[str, Any] | None = None
) -> tuple[Drafter, FixedPolicy]:
    """A training-free method in front of a draft head.

    Args:
        target: what both draft for.
        head: the head's drafter.
        depth, budget: of its tree.
        settings: fields of `mmspec.drafters.hybrid.Config`.

    Returns:
        As `make_method` does.

    Raises:
        InputError: an unknown method, key or value, or a method that cannot tell how long its match is.
    """
    config = configure(HYBRID, settings)
    retrieval, plan = make_method(config.retrieval, target, config.settings)
    if not isinstance(retrieval, HostDrafter) or type(retrieval.start()).match is Stream.match:
        raise InputError(f"hybrid.retrieval={config.retrieval!r} has no matches to go by; use one that copies, as pld")
    policy = FixedPolicy(max(plan.max_depth, depth), max(plan.max_budget, budget))
    return HybridDrafter(retrieval, head, depth, budget, config.min_match), policy


def configure(name: str, settings: Mapping[str, Any] | None = None) -> Any:
    """The `Config` of a method or of the hybrid, its settings checked by key and type.

    Raises:
        InputError: as `make_method`.
    """
    config = HybridConfig if name == HYBRID else _module(name).Config
    return typed_config(name, config, settings or {})


def resolved(name: str, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All settings that a method runs with, defaults filled in, as plain values for a summary."""
    config = configure(name, settings)
    plain = dataclasses.asdict(config)
    return plain | {"settings": resolved(config.retrieval, config.settings)} if name == HYBRID else plain


def read_settings(path: Path | str) -> Settings:
    """Settings of methods from a YAML file with one node a method, all of them checked.

    Raises:
        InputError: the file is missing or no YAML mapping; an unknown method, key or value.
    """
    settings = read_yaml(Path(path), [*method_names(), HYBRID])
    for name, values in settings.items():
        if not isinstance(values, dict):
            raise InputError(f"{path}: {name} must be a mapping of settings, not {values!r}")
        resolved(name, values)
    return settings


def _module(name: str) -> ModuleType:
    if name not in method_names():
        raise InputError(f"method {name!r} is unknown; there are: {', '.join(method_names())}, and hybrid with a head")
    return importlib.import_module(f"mmspec.drafters.{name}")
