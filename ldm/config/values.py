"""A value of a setting, of the type that its field says. Imports no torch."""

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
LONGEST = 256  # bits of a whole number: more have no meaning here, and Python refuses to write very many


def typed(hint: Any, value: Any, name: str) -> Any:
    """``value`` as a field of this type holds it: a list as a tuple, a whole number as a float where one is meant.

    Scalars of numpy and torch are taken as the numbers that they are. Raises ConfigError beginning with ``name``.
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
        raise ConfigError(
            f"{name} must be {_TYPE_NAMES[hint]} of at most {LONGEST} bits, got one of {value.bit_length()}"
        )
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{name} must be {_TYPE_NAMES[hint]}, got {shown(value)}")
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value)):
        raise ConfigError(f"{name} must be text without NUL and in UTF-8, got {shown(value)}")
    return value


def check_names(names: Iterable[Any], known: Iterable[str], path: str = "") -> None:
    """Raise ConfigError for the first name that is not known, with the nearest that is."""
    known = list(known)
    for name in names:
        if name not in known:
            name = str(name)[:100]
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"unknown key {path}{name}: "
                + (f"did you mean {path}{near[0]}?" if near else f"known are {', '.join(known)}")
            )


def changed(config: T, given: Mapping[str, Any]) -> T:
    """A dataclass with other values of some fields, each of its type. Raises ConfigError naming the first that is not."""
    hints = typing.get_type_hints(type(config))
    check_names(given, [field.name for field in dataclasses.fields(config)])  # type: ignore[arg-type]
    return dataclasses.replace(config, **{name: typed(hints[name], value, name) for name, value in given.items()})  # type: ignore[type-var]


def check_types(config: Any) -> None:
    """Give each field of a frozen dataclass its value as ``typed`` has it. Raises ConfigError naming the first that has none."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        object.__setattr__(config, field.name, typed(hints[field.name], getattr(config, field.name), field.name))


def plain(value: Any) -> Any:
    """A scalar of numpy or torch as Python's own number; text of numpy as text; anything else as it is."""
    if isinstance(value, str) and type(value) is not str:
        return str(value)
    item = getattr(value, "item", None)
    return item() if callable(item) and tuple(getattr(value, "shape", (0,))) == () else value
