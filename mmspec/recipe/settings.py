"""Dataclasses from plain values, by key and type: the nodes of a recipe, and whatever else has a `Config`.

Invariant: what is wrong is an `InputError` of one line that names the key or value, and what comes out holds no object
of OmegaConf.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from mmspec.types import InputError


def typed_config(name: str, config: type, values: Mapping[str, Any]) -> Any:
    """A `Config` from the values of a YAML node, checked as a recipe is: by key, type, and the class itself.

    Args:
        name: of the node, for error messages.

    Raises:
        InputError: the first key or value that is wrong.
    """
    schema = {name: thawed(config)}
    check_keys({name: values}, schema, prefix="")
    return build_config("settings", config, typed(schema, {name: values})[name])


def build_config(name: str, config: type, values: Mapping[str, Any]) -> Any:
    """A `Config` from JSON-like values: lists become tuples where the field says so.

    Raises:
        InputError: `name` says where the values that the class refuses came from.
    """
    hints = typing.get_type_hints(config)
    unknown = [key for key in values if key not in hints]
    if unknown:
        raise InputError(f"{name}: unknown key {unknown[0]!r}{did_you_mean(unknown[0], list(hints))}")
    made = {key: tuple(v) if isinstance(v, list) and _is_tuple(hints[key]) else v for key, v in values.items()}
    try:
        return config(**made)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: {one_line(error)}") from error


def thawed(config: type) -> type:
    """A non-frozen twin of a dataclass: OmegaConf makes nodes of frozen ones read-only, overrides included."""
    hints = typing.get_type_hints(config)
    entries: list[Any] = []
    for item in dataclasses.fields(config):
        if item.default_factory is not dataclasses.MISSING:
            entries.append((item.name, hints[item.name], dataclasses.field(default_factory=item.default_factory)))
        elif item.default is not dataclasses.MISSING:
            entries.append((item.name, hints[item.name], item.default))
        else:
            entries.append((item.name, hints[item.name], MISSING))
    return dataclasses.make_dataclass(config.__name__, entries)


def check_keys(raw: Mapping[str, Any], schema: Mapping[str, Any], prefix: str) -> None:
    """Every key of the recipe must be a field; recursion follows dataclasses and lists of dataclasses."""
    for key, value in raw.items():
        if key not in schema:
            extra = ["train"] if prefix == "data." else []
            raise InputError(f"unknown recipe key {prefix}{key}{did_you_mean(str(key), [*schema, *extra])}")
        kind = schema[key]
        arguments = typing.get_args(kind)
        if dataclasses.is_dataclass(kind) and isinstance(value, dict):
            check_keys(value, typing.get_type_hints(kind), f"{prefix}{key}.")
        elif arguments and dataclasses.is_dataclass(arguments[0]) and isinstance(value, list):
            for index, entry in enumerate(value):
                if isinstance(entry, dict):
                    check_keys(entry, typing.get_type_hints(arguments[0]), f"{prefix}{key}[{index}].")


def typed(schema: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's values converted to the fields' types, as plain containers with defaults filled in."""
    plain: dict[str, Any] = {}
    for name, node in schema.items():
        values = raw.get(name)
        if values is not None and not isinstance(values, dict):
            raise InputError(f"{name} must be a mapping, not {values!r}")
        try:
            merged = OmegaConf.merge(OmegaConf.structured(node), OmegaConf.create(values or {}))
            plain[name] = OmegaConf.to_container(merged, throw_on_missing=True)
        except MissingMandatoryValue as error:
            key = f"{name}.{error.full_key}" if error.full_key else name
            raise InputError(f"recipe key {key} is missing; give it in the file or as {key}=VALUE") from error
        except OmegaConfBaseException as error:
            key = f"{name}.{error.full_key}" if getattr(error, "full_key", None) else name
            raise InputError(f"recipe key {key}: {one_line(error)}") from error
    return plain


def did_you_mean(value: str, known: Sequence[str]) -> str:
    """The end of an error message: the known name that is most like the value, or all of them."""
    near = difflib.get_close_matches(value, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def one_line(error: Exception) -> str:
    """The first sentence of an exception, on one line."""
    text = " ".join(
        part.strip() for part in str(error).splitlines() if "full_key" not in part and "object_type" not in part
    )
    return text or type(error).__name__


def _is_tuple(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple or any(typing.get_origin(a) is tuple for a in typing.get_args(hint))
