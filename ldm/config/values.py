"""Type checks and conversions of the values of settings. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from autoencoder.config import ConfigError, shown

T = TypeVar("T")
_TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
LONGEST = 256  # bits of an integer: no setting needs more, and Python refuses to print very long ones


def typed(hint: Any, value: Any, name: str) -> Any:
    """Convert ``value`` to the type of a field: a list to a tuple, an integer to a float, if meant.

    Scalars of numpy and torch become Python numbers. Raises ConfigError beginning with ``name``.
    """
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        (hint,) = (a for a in typing.get_args(hint) if a is not type(None))
    value = plain(value)
    if typing.get_origin(hint) is tuple:
        items, parts = value if isinstance(value, (list, tuple)) else [value], typing.get_args(hint)
        if parts[-1] is not Ellipsis and len(items) != len(parts):
            raise ConfigError(f"{name} must be {len(parts)} values, got {shown(list(items))}")
        return tuple(typed(parts[0], item, f"{name}[{i}]") for i, item in enumerate(items))
    if type(value) is int and value.bit_length() > LONGEST:
        wanted = f"{_TYPE_NAMES[hint]} of at most {LONGEST} bits"
        raise ConfigError(f"{name} must be {wanted}, got one of {value.bit_length()}")
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{name} must be {_TYPE_NAMES[hint]}, got {shown(value)}")
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value)):
        raise ConfigError(f"{name} must be text without NUL and in UTF-8, got {shown(value)}")
    return value


def check_names(names: Iterable[Any], known: Iterable[str], path: str = "") -> None:
    """Raise ConfigError for the first unknown name, with the nearest known one."""
    known = list(known)
    for name in names:
        if name not in known:
            name = str(name)[:100]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {path}{near[0]}?" if near else f"known are {', '.join(known)}"
            raise ConfigError(f"unknown key {path}{name}: {hint}")


def changed(config: T, given: Mapping[str, Any]) -> T:
    """Copy of a dataclass with some fields changed. Raises ConfigError for a wrong name or type."""
    hints = typing.get_type_hints(type(config))
    check_names(given, [field.name for field in dataclasses.fields(config)])  # type: ignore[arg-type]
    return dataclasses.replace(config, **{name: typed(hints[name], value, name) for name, value in given.items()})  # type: ignore[type-var]


def check_types(config: Any) -> None:
    """Convert each field of a frozen dataclass by ``typed``, in place. Raises ConfigError."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        object.__setattr__(config, field.name, typed(hints[field.name], getattr(config, field.name), field.name))


def plain(value: Any) -> Any:
    """A numpy or torch scalar as a Python number, numpy text as str, anything else unchanged."""
    if isinstance(value, str) and type(value) is not str:
        return str(value)
    item = getattr(value, "item", None)
    return item() if callable(item) and tuple(getattr(value, "shape", (0,))) == () else value
