"""Policies by name: the files here are the registry, as those of `mmspec/heads` and `mmspec/drafters` are.

A file has a `Config`, whose fields are what may be tuned, and `make(config, parts)`. None of them changes a token.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from mmspec.policies._parts import Parts
from mmspec.recipe import typed_config
from mmspec.types import InputError, Policy

__all__ = ["Parts", "configure", "make_policy", "policy_names"]


def policy_names() -> list[str]:
    """All of them, in alphabetical order."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def make_policy(name: str, parts: Parts, settings: Mapping[str, Any] | None = None) -> Policy:
    """A policy for a drafter.

    Args:
        name: one of `policy_names()`.
        parts: what it decides by.
        settings: fields of its `Config`; what is not given has its default.

    Raises:
        InputError: an unknown name, key or value; a controller is needed and there is none.
    """
    policy: Policy = _module(name).make(configure(name, settings), parts)
    return policy


def configure(name: str, settings: Mapping[str, Any] | None = None) -> Any:
    """The `Config` of a policy, its settings checked by key and type.

    Raises:
        InputError: as `make_policy`.
    """
    return typed_config(name, _module(name).Config, settings or {})


def _module(name: str) -> ModuleType:
    if name not in policy_names():
        raise InputError(f"policy {name!r} is unknown; there are: {', '.join(policy_names())}")
    return importlib.import_module(f"mmspec.policies.{name}")
