"""Reading YAML and `a.b=c` overrides into the dataclasses of this room, and writing them. Imports no torch."""

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

DEPTH, VALUES = 20, 200_000  # of a configuration: its levels, and its values with what aliases repeat


def build(cls: type[T], values: Any, path: str = "") -> T:
    """Make the dataclass ``cls`` from nested dicts and lists; every fault is one ConfigError that names the key."""
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path.rstrip('.') or 'the configuration'} must be a mapping of settings, got {shown(values)}"
        )
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    check_names(values, fields, path)
    missing = [
        n
        for n, f in fields.items()
        if n not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"missing key {path}{missing[0]}")
    try:
        return cls(**{key: _convert(hints[key], value, path + key) for key, value in values.items()})
    except ConfigError as error:
        text = str(error)
        if path and text.split(" ")[0].rstrip(":,") in fields:
            text = path + text
        raise ConfigError(text) from None


def _convert(hint: Any, value: Any, name: str) -> Any:
    """A value of a field: a dataclass from its mapping, anything else as ``typed`` has it."""
    inner = hint
    if isinstance(hint, types.UnionType) and value is not None:
        (inner,) = (a for a in typing.get_args(hint) if a is not type(None))
    if dataclasses.is_dataclass(inner):
        return build(inner, value, name + ".")  # type: ignore[arg-type]
    for text in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(text, str) and "${" in text:
            raise ConfigError(f"{name}: interpolation (${{…}}) is not offered, write the value itself")
    return typed(hint, value, name)


def load(cls: type[T], file: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> T:
    """Read a YAML file, apply ``a.b=c`` overrides, and check everything. Raises ConfigError."""
    return build(cls, _read(Path(file), overrides))


def config_file(run: str | Path) -> Path:
    """The saved configuration of a run directory. Raises ConfigError where there is none."""
    file = Path(run) / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{run} is not a run: it has no config.yaml{runs_below(run)}")
    return file


def runs_below(folder: str | Path) -> str:
    """The end of a message on a folder that is not a run: which of its sub-folders are, such as those of the first stages."""
    below = sorted(str(other.parent) for other in Path(folder).glob("*/config.yaml"))
    return f"; there is one in {' and in '.join(below)}" if below else ""


def load_run(
    run: str | Path,
) -> AutoencoderTrainingConfig | ClipTrainingConfig | DiffusionTrainingConfig | ClassifierTrainingConfig:
    """The configuration of a run directory, whichever command of ``RUNS`` wrote it. Raises ConfigError."""
    file = config_file(run)
    values = _read(file, ())
    # a saved configuration is resolved: of the classes with the most keys in common, the smallest is the one that wrote it
    kind = max(RUNS.values(), key=lambda cls: (len(_names(cls) & values.keys()), -len(_names(cls))))
    try:
        return build(kind, values)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def load_any(
    file: str | Path, overrides: list[str] | tuple[str, ...] = ()
) -> AutoencoderTrainingConfig | ClipTrainingConfig | DiffusionTrainingConfig | ClassifierTrainingConfig:
    """A configuration of whichever command of ``RUNS`` its keys fit best. Raises ConfigError where they fit two alike."""
    values = _read(Path(file), overrides)
    fits = {command: _fit(cls, values) for command, cls in RUNS.items()}
    best = [command for command, fit in fits.items() if fit == max(fits.values())]
    if len(best) > 1:
        raise ConfigError(f"{file} may be of {' or of '.join(best)}: say which by --command")
    return build(RUNS[best[0]], values)


def _fit(cls: type, values: Any) -> int:
    """Keys that ``cls`` knows, less those that it does not know and those that it lacks."""
    hints = typing.get_type_hints(cls)
    lacking = sum(
        f.default is f.default_factory is dataclasses.MISSING for f in dataclasses.fields(cls) if f.name not in values
    )
    inside = [
        _fit(hints[key], value)
        for key, value in values.items()
        if dataclasses.is_dataclass(hints.get(key)) and isinstance(value, dict)
    ]
    return sum(1 if key in hints else -1 for key in values) + sum(inside) - lacking


def _names(cls: type) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)}


def _read(file: Path, overrides: list[str] | tuple[str, ...]) -> dict[Any, Any]:
    """The settings of a YAML file with ``a.b=c`` overrides applied, as plain dicts and lists; not yet checked."""
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
    except Exception as error:  # PyYAML and OmegaConf raise more than their own of odd tags, numbers and keys
        raise ConfigError(f"{file}: cannot be read: {' '.join(str(error).split())[:300]}") from None


def _require_small(text: str) -> None:
    """Raise ConfigError for YAML that is nested deep or that aliases would blow up, before it is built; yaml.YAMLError for none."""
    import yaml

    sizes: dict[str, int] = {}  # of what has a name, with all that it refers to
    open_nodes: list[tuple[str | None, int]] = []  # the names of the nodes around, and the count of values before each
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
            raise ConfigError(
                f"the configuration is nested more than {DEPTH} deep, or holds more than {VALUES} values with its aliases"
            )


def save(config: Any, file: str | Path) -> None:
    """Write the resolved configuration as YAML that ``load`` reads back to an equal object."""
    from omegaconf import OmegaConf

    replace(Path(file), OmegaConf.to_yaml(OmegaConf.create(to_dict(config))).encode())


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dicts and lists, as JSON and YAML hold them."""
    return {
        f.name: to_dict(v) if dataclasses.is_dataclass(v) else list(v) if isinstance(v, tuple) else v
        for f in dataclasses.fields(config)
        for v in [getattr(config, f.name)]
    }
