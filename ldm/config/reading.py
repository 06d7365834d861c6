"""Configurations from YAML and `a.b=c` overrides, and back to YAML. Imports no torch."""

from __future__ import annotations

import dataclasses
import io
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from autoencoder.config import ConfigError, shown
from ldm.config.runs import (
    RUNS,
    AutoencoderTrainingConfig,
    ClassifierTrainingConfig,
    ClipTrainingConfig,
    DiffusionTrainingConfig,
)
from ldm.config.values import check_names, typed
from ldm.files.disk import replace
from ldm.files.text import read_text

T = TypeVar("T")

BEST = "best.json"  # of RUN/best: its update and what it reached
DEPTH, VALUES = 20, 200_000  # limits of a configuration: levels, and values with aliases expanded


def build(cls: type[T], values: Any, path: str = "") -> T:
    """Make the dataclass ``cls`` from nested dicts and lists. Raises ConfigError naming the key."""
    if not isinstance(values, dict):
        what = path.rstrip(".") or "the configuration"
        raise ConfigError(f"{what} must be a mapping of settings, got {shown(values)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    check_names(values, fields, path)
    if missing := [name for name, field in fields.items() if name not in values and _is_required(field)]:
        raise ConfigError(f"missing key {path}{missing[0]}")
    try:
        return cls(**{key: _convert(hints[key], value, path + key) for key, value in values.items()})
    except ConfigError as error:
        text = str(error)
        if path and text.split(" ")[0].rstrip(":,") in fields:
            text = path + text
        raise ConfigError(text) from None


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _convert(hint: Any, value: Any, name: str) -> Any:
    """The value of a field: a dataclass from its mapping, several from a list, anything else by ``typed``."""
    inner = hint
    if isinstance(hint, types.UnionType) and value is not None:
        (inner,) = (a for a in typing.get_args(hint) if a is not type(None))
    if dataclasses.is_dataclass(inner):
        return build(inner, value, name + ".")  # type: ignore[arg-type]
    if typing.get_origin(hint) is tuple and dataclasses.is_dataclass(part := typing.get_args(hint)[0]):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{name} must be a list, got {shown(value)}")
        return tuple(build(part, item, f"{name}[{i}].") for i, item in enumerate(value))  # type: ignore[arg-type]
    for text in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(text, str) and "${" in text:
            raise ConfigError(f"{name}: interpolation (${{…}}) is not offered, write the value itself")
    return typed(hint, value, name)


def load(cls: type[T], file: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> T:
    """Read a YAML file, apply ``a.b=c`` overrides, and check everything. Raises ConfigError."""
    return build(cls, _read(Path(file), overrides))


def config_file(run: str | Path) -> Path:
    """The file of a run's configuration. Raises ConfigError if there is none."""
    file = Path(run) / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{run} is not a run: it has no config.yaml{runs_below(run)}")
    return file


def model_config_file(path: str | Path) -> Path:
    """The configuration with which a model was trained: that of its run, for RUN/best that of RUN.

    Raises ConfigError if there is none.
    """
    folder = Path(path)
    return config_file(folder.parent if (folder / BEST).is_file() else folder)


def runs_below(folder: str | Path) -> str:
    """End of an error message on a folder that is not a run: those of its sub-folders that are."""
    below = sorted(str(other.parent) for other in Path(folder).glob("*/config.yaml"))
    return f"; there is one in {' and in '.join(below)}" if below else ""


def load_run(
    run: str | Path,
) -> AutoencoderTrainingConfig | ClipTrainingConfig | DiffusionTrainingConfig | ClassifierTrainingConfig:
    """The configuration of a run of any command of ``RUNS``. Raises ConfigError."""
    file = config_file(run)
    values = _read(file, ())
    # A saved configuration has all keys: of the classes that share most keys with it, the smallest has written it.
    kind = max(RUNS.values(), key=lambda cls: (len(_names(cls) & values.keys()), -len(_names(cls))))
    try:
        return build(kind, values)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def load_any(
    file: str | Path, overrides: list[str] | tuple[str, ...] = ()
) -> AutoencoderTrainingConfig | ClipTrainingConfig | DiffusionTrainingConfig | ClassifierTrainingConfig:
    """Read a configuration of the command of ``RUNS`` that fits its keys best.

    Raises ConfigError.
    """
    values = _read(Path(file), overrides)
    fits = {command: _fit(cls, values) for command, cls in RUNS.items()}
    best = [command for command, fit in fits.items() if fit == max(fits.values())]
    if len(best) > 1:
        raise ConfigError(f"{file} may be for {' or for '.join(best)}: say which by --command")
    return build(RUNS[best[0]], values)


def _fit(cls: type, values: Any) -> int:
    """Number of keys that ``cls`` knows, minus unknown keys and missing required ones."""
    hints = typing.get_type_hints(cls)
    known = sum(1 if key in hints else -1 for key in values)
    missing = sum(_is_required(field) for field in dataclasses.fields(cls) if field.name not in values)
    groups = [key for key, value in values.items() if isinstance(value, dict)]
    inside = sum(_fit(hints[key], values[key]) for key in groups if dataclasses.is_dataclass(hints.get(key)))
    return known + inside - missing


def _names(cls: type) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)}


def _read(file: Path, overrides: list[str] | tuple[str, ...]) -> dict[Any, Any]:
    """Read the settings of a YAML file and apply ``a.b=c`` overrides, unchecked."""
    from omegaconf import DictConfig, OmegaConf

    if file.is_dir():
        found = " or ".join(sorted(str(inside) for inside in file.glob("*.yaml")))
        raise ConfigError(f"{file} is a folder, not a configuration file" + (f": name {found}" if found else ""))
    if not file.is_file():
        raise ConfigError(f"no configuration file {file}")
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r} is not of the form key=value")
    try:
        text = read_text(file)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    try:
        for part in (text, *(override.partition("=")[2] for override in overrides)):
            _require_small(part)
        loaded = OmegaConf.load(io.StringIO(text))
        if not isinstance(loaded, DictConfig):
            raise ConfigError(f"{file} must be a mapping of settings, not a list")
        tree = OmegaConf.merge(loaded, OmegaConf.from_dotlist(list(overrides)))
        return typing.cast(dict[Any, Any], OmegaConf.to_container(tree, resolve=False, throw_on_missing=True))
    except ConfigError:
        raise
    except Exception as error:  # odd tags, numbers and keys make PyYAML and OmegaConf raise other errors too
        raise ConfigError(f"{file}: cannot be read: {' '.join(str(error).split())[:300]}") from None


def _require_small(text: str) -> None:
    """Raise ConfigError for YAML of too many levels or values; or yaml.YAMLError."""
    import yaml

    sizes: dict[str, int] = {}  # values of each anchor, aliases in it expanded
    open_nodes: list[tuple[str | None, int]] = []  # anchors of the enclosing nodes, and the count before each
    count = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, count))
        elif isinstance(event, yaml.CollectionEndEvent):
            name, before = open_nodes.pop()
            if name is not None:
                sizes[name] = count - before
        elif isinstance(event, yaml.AliasEvent):
            count += sizes.get(event.anchor, 1)
        count += isinstance(event, yaml.NodeEvent)
        if len(open_nodes) > DEPTH or count > VALUES:
            limits = f"nested more than {DEPTH} deep, or holds more than {VALUES} values with its aliases"
            raise ConfigError(f"the configuration is {limits}")


def save(config: Any, file: str | Path) -> None:
    """Write the resolved configuration as YAML that ``load`` reads back to an equal object."""
    from omegaconf import OmegaConf

    replace(Path(file), OmegaConf.to_yaml(OmegaConf.create(to_dict(config))).encode())


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as nested dicts and lists, for JSON and YAML."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
