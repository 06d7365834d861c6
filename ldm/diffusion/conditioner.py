"""Named conditions as one vector, added to the timestep embedding (docs/equations.md C1, C7).

A class, a number and a vector each have a slice of it, with a null of zeros, so that each can be
dropped alone. The U-Net's embedding of the vector begins with a linear map: a one-hot slice through
it is a learned vector for each class, and the network stays diffusers' with ``class_embed_type``
``projection``. Nothing here is learned; what is measured on the data is kept with the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ldm.config import ConditionConfig, ConfigError
from ldm.config.conditions import check_names
from ldm.config.values import plain
from ldm.diffusion.condition import Condition

FREQUENCIES = 16  # of a number's Fourier features
LOWEST, HIGHEST = 0.125, 8.0  # of them, in radians per standard deviation: what was trained between is interpolated
SHOWN = 8  # classes named in an error

Row = Mapping[str, Any]  # a sample's columns
Values = Mapping[str, Any] | Sequence[Row]  # by name, one for all samples or a list of theirs; or a Row for each


class Slice(Protocol):
    """A condition's part of the vector."""

    @property
    def width(self) -> int: ...

    def encode(self, value: Any) -> Float[Tensor, " width"]:
        """The slice of one value; never zeros, which mean that it is dropped. Raises ConfigError."""
        ...


@dataclass(frozen=True)
class Classes:
    """√K for the class, 0 for the others, so that the mean square is 1."""

    classes: tuple[str | int | bool, ...]

    @classmethod
    def measured(cls, values: Iterable[Any]) -> Classes:
        """All classes that occur, in order."""
        found = set()
        for value in map(plain, values):
            if not isinstance(value, (str, int)):
                raise ConfigError(f"a class must be text, an integer, true or false, got {value!r}")
            found.add((type(value).__name__, value))  # 1 and True are equal
        if len({kind for kind, _ in found}) > 1:
            raise ConfigError("classes must all be text, or all integers, or all true or false")
        return cls(tuple(sorted(value for _, value in found)))

    @property
    def width(self) -> int:
        return len(self.classes)

    def encode(self, value: Any) -> Tensor:
        """The slice of a class; 7 and "7" are the same, since a table in CSV knows text alone."""
        value, texts = plain(value), [str(one) for one in self.classes]
        if not isinstance(value, (str, int)) or str(value) not in texts:
            named = ", ".join(texts[:SHOWN]) + (", …" if self.width > SHOWN else "")
            raise ConfigError(f"{value!r} is not one of its {self.width} classes: {named}")
        slice_ = torch.zeros(self.width)
        slice_[texts.index(str(value))] = math.sqrt(self.width)
        return slice_


@dataclass(frozen=True)
class Number:
    """1, and [cos, sin](ω z) of the standardised number z, with ω from LOWEST to HIGHEST in equal ratios."""

    mean: float
    std: float

    @classmethod
    def measured(cls, values: Iterable[Any]) -> Number:
        """Mean and standard deviation of the numbers."""
        (mean,), (std,) = _moments([_number(value)] for value in values)
        return cls(mean, std)

    @property
    def width(self) -> int:
        return 1 + 2 * FREQUENCIES

    def encode(self, value: Any) -> Tensor:
        z = (_number(value) - self.mean) / self.std
        omega = LOWEST * (HIGHEST / LOWEST) ** (torch.arange(FREQUENCIES, dtype=torch.float64) / (FREQUENCIES - 1))
        return torch.cat([torch.ones(1), (omega * z).cos(), (omega * z).sin()]).float()


@dataclass(frozen=True)
class Numbers:
    """1, and the standardised components of a vector."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def measured(cls, values: Iterable[Any]) -> Numbers:
        """Mean and standard deviation of each component."""
        return cls(*_moments(_numbers(value) for value in values))

    @property
    def width(self) -> int:
        return 1 + len(self.mean)

    def encode(self, value: Any) -> Tensor:
        numbers = _numbers(value)
        if len(numbers) != len(self.mean):
            raise ConfigError(f"it has {len(self.mean)} components, got {len(numbers)}")
        return torch.tensor([1.0, *((v - m) / s for v, m, s in zip(numbers, self.mean, self.std, strict=True))])


KINDS: dict[str, type[Classes | Number | Numbers]] = {"class": Classes, "scalar": Number, "vector": Numbers}


@dataclass(frozen=True)
class Conditioner:
    """Encodes named conditions into a ``Condition`` with one vector [b, ``width``], parts in their order.

    Attributes:
        configs: the conditions.
        slices: what each was measured to be.
        joint_dropout: share of the samples of a training that lose the caption and all conditions at once.
    """

    configs: tuple[ConditionConfig, ...]
    slices: tuple[Classes | Number | Numbers, ...]
    joint_dropout: float = 0.0

    @classmethod
    def measured(
        cls, configs: Sequence[ConditionConfig], rows: Iterable[Row], joint_dropout: float = 0.0
    ) -> Conditioner:
        """Classes, means and deviations from the columns of the training set.

        A row may lack a column, or be empty there: its condition is null. Raises ConfigError naming
        the condition.
        """
        rows, slices = list(rows), []
        check_names(configs)
        for config in configs:
            if not any(config.source in row for row in rows):
                known = ", ".join(dict.fromkeys(name for row in rows for name in row)) or "none"
                raise ConfigError(f"{config.name}: there is no column {config.source}, the columns are: {known}")
            values = [value for row in rows if not _missing(value := row.get(config.source))]
            if not values:
                raise ConfigError(f"{config.name}: no sample has a value in column {config.source}")
            with _named(config.name):
                slices.append(KINDS[config.kind].measured(values))
        return cls(tuple(configs), tuple(slices), joint_dropout)

    def kept(self, before: Conditioner) -> Conditioner:
        """This one with what the values of ``before`` were measured to be.

        Raises ConfigError unless both have conditions of the same names and kinds.
        """
        mine, theirs = ([(c.name, c.kind) for c in one.configs] for one in (self, before))
        if mine != theirs:
            named = (", ".join(f"{name} ({kind})" for name, kind in one) or "none" for one in (mine, theirs))
            raise ConfigError("conditions: {}, and were before: {}".format(*named))
        return replace(self, slices=before.slices)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the conditions, in their order."""
        return tuple(config.name for config in self.configs)

    @property
    def width(self) -> int:
        """Length of the vector: ``vector_dim`` of the U-Net."""
        return sum(part.width for part in self.slices)

    def values(self, columns: Row) -> dict[str, Any]:
        """The values of one sample by condition, from its columns; None where it has none."""
        return {config.name: columns.get(config.source) for config in self.configs}

    def row(self, columns: Row) -> Float[Tensor, " width"]:
        """The vector of one sample, from its columns; null where it has no value. Raises ConfigError."""
        return self.encode([self.values(columns)])[0]

    def __call__(self, values: Values, count: int) -> Condition:
        """The condition of ``count`` samples, on the CPU; conditions without a value are null. Raises as ``each``."""
        return Condition(vector=self.encode(self.each(values, count)))

    def each(self, values: Values, count: int | None = None) -> list[dict[str, Any]]:
        """The values of each of ``count`` samples; None: of as many as the longest list has, or of one.

        Raises ConfigError for an unknown name, or another number of values than 1 or ``count``.
        """
        if not isinstance(values, Mapping):
            rows = [dict(self._known(row)) for row in values]
            if count not in (None, len(rows)):
                raise ConfigError(f"values of {len(rows)} samples for {count}: give them for each, or one for all")
            return rows
        several = {c.name for c in self.configs if c.name in self._known(values) and _several(c, values[c.name])}
        if count is None:
            count = max((len(values[name]) for name in several), default=1)
        for name in several:
            if len(values[name]) != count:
                raise ConfigError(
                    f"{name}: {len(values[name])} values for {count} samples: give one for all, or for each"
                )
        return [{name: v[i] if name in several else v for name, v in values.items()} for i in range(count)]

    def encode(self, rows: Sequence[Row]) -> Float[Tensor, "b w"]:
        """The vectors of samples with these values, on the CPU; null where there is none. Raises ConfigError."""
        parts = [torch.zeros(len(rows), 0)]
        for config, part in zip(self.configs, self.slices, strict=True):
            given = [row.get(config.name) for row in rows]
            with _named(config.name):
                encoded = [torch.zeros(part.width) if _missing(value) else part.encode(value) for value in given]
            parts.append(torch.stack(encoded) if encoded else torch.zeros(0, part.width))
        return torch.cat(parts, dim=1)

    def _known(self, values: Row) -> Row:
        """The values of one sample, or of several. Raises ConfigError for a name that is not a condition's."""
        if unknown := [name for name in values if name not in self.names]:
            raise ConfigError(f"no condition {unknown[0]}, the conditions are: {', '.join(self.names) or 'none'}")
        return values

    def dropping(self, vector: Float[Tensor, "b w"], dropped: Mapping[str, Bool[Tensor, " b"]]) -> Float[Tensor, "b w"]:
        """The vector with the slices of some conditions null in some samples."""
        at = 0
        for config, part in zip(self.configs, self.slices, strict=True):
            if config.name in dropped:
                keep = ~dropped[config.name].to(vector.device)[:, None]
                zeros = torch.zeros_like(vector[:, at : at + part.width])
                kept = torch.where(keep, vector[:, at : at + part.width], zeros)
                vector = torch.cat([vector[:, :at], kept, vector[:, at + part.width :]], dim=1)
            at += part.width
        return vector

    def to_dict(self) -> dict[str, Any]:
        """JSON from which ``from_dict`` makes it again."""
        parts = [{**asdict(c), **asdict(part)} for c, part in zip(self.configs, self.slices, strict=True)]
        return {"joint_dropout": self.joint_dropout, "parts": json.loads(json.dumps(parts))}

    @classmethod
    def from_dict(cls, described: Mapping[str, Any]) -> Conditioner:
        """The conditioner that ``to_dict`` described. Raises ConfigError for anything else."""
        configs, slices = [], []
        try:
            for entry in described["parts"]:
                rest: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
                configs.append(ConditionConfig(**{f.name: rest.pop(f.name) for f in fields(ConditionConfig)}))
                slices.append(KINDS[configs[-1].kind](**rest))
            return cls(tuple(configs), tuple(slices), described["joint_dropout"])
        except (TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"conditions are damaged: {error}") from None


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Put a condition's name before the text of a ConfigError."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _several(config: ConditionConfig, given: Any) -> bool:
    """True for a list of values, rather than one; a vector is a list itself."""
    first = given[0] if isinstance(given, (list, tuple)) and given else None
    return isinstance(first, (list, tuple)) if config.kind == "vector" else isinstance(given, (list, tuple))


def _missing(value: Any) -> bool:
    """True for what means that there is no value: None, and the empty text of a CSV."""
    return value is None or (isinstance(value, str) and not value)


def _number(value: Any) -> float:
    value = _read(plain(value))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"a finite number is needed, got {value!r}")
    return float(value)


def _read(value: Any) -> Any:
    """A text that is JSON as its value, since a table in CSV knows text alone; anything else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _numbers(value: Any) -> list[float]:
    value = _read(value)
    if not isinstance(value, (list, tuple)) or not value:
        raise ConfigError(f"a list of numbers is needed, got {value!r}")
    return [_number(one) for one in value]


def _moments(rows: Iterable[list[float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each column, in float64. Raises ConfigError for columns without spread."""
    listed = list(rows)
    if len({len(row) for row in listed}) > 1:
        raise ConfigError("vectors must have the same number of components in every sample")
    table = torch.tensor(listed, dtype=torch.float64)
    mean, std = table.mean(0), table.std(0, correction=0)
    if bool((std == 0).any()):
        raise ConfigError(f"it is {listed[0]} in every sample, so there is nothing to learn of it")
    return tuple(mean.tolist()), tuple(std.tolist())
