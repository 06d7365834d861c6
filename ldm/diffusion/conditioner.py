"""Named conditions as one vector, added to the timestep embedding (docs/equations.md C1, C7).

A class, a number and a vector each have a slice of it, with a null of zeros, so that each can be
dropped alone. The U-Net's embedding of the vector begins with a linear map: a one-hot slice through
it is a learned vector for each class, and the network stays diffusers' with ``class_embed_type``
``projection``. Nothing here is learned; what is measured on the data is kept with the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ldm.config import ConditionConfig, ConfigError
from ldm.config.values import plain
from ldm.diffusion.condition import Condition

FREQUENCIES = 16  # of a number's Fourier features
LOWEST, HIGHEST = 0.125, 8.0  # of them, in radians per standard deviation: what was trained between is interpolated
SHOWN = 8  # classes named in an error

Row = Mapping[str, Any]  # a sample's columns
Values = Mapping[str, Any]  # a value for each of several samples, or one for all; None: not known


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

    classes: tuple[str | int, ...]

    @classmethod
    def measured(cls, values: Iterable[Any]) -> Classes:
        """All classes that occur, in order."""
        found = set()
        for value in map(plain, values):
            if not isinstance(value, (str, int)) or isinstance(value, bool):
                raise ConfigError(f"a class must be text or an integer, got {value!r}")
            found.add(value)
        if len({type(value) for value in found}) > 1:
            raise ConfigError("classes must be all text or all integers")
        return cls(tuple(sorted(found)))

    @property
    def width(self) -> int:
        return len(self.classes)

    def encode(self, value: Any) -> Tensor:
        value = plain(value)
        if value not in self.classes:
            named = ", ".join(map(str, self.classes[:SHOWN])) + (", …" if self.width > SHOWN else "")
            raise ConfigError(f"{value!r} is not one of its {self.width} classes: {named}")
        slice_ = torch.zeros(self.width)
        slice_[self.classes.index(value)] = math.sqrt(self.width)
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
    """

    configs: tuple[ConditionConfig, ...]
    slices: tuple[Classes | Number | Numbers, ...]

    @classmethod
    def measured(cls, configs: Sequence[ConditionConfig], rows: Iterable[Row]) -> Conditioner:
        """Classes, means and deviations from the columns of the training set.

        A column may be None in some rows: there the condition is null. Raises ConfigError naming the
        condition.
        """
        rows, slices = list(rows), []
        if len({config.name for config in configs}) < len(configs):
            raise ConfigError("conditions: two have one name")
        for config in configs:
            if missing := next((row for row in rows if config.source not in row), None):
                known = ", ".join(missing) or "none"
                raise ConfigError(f"{config.name}: a sample has no column {config.source}, its columns are {known}")
            values = [value for row in rows if (value := row[config.source]) is not None]
            if not values:
                raise ConfigError(f"{config.name}: no sample has a value in column {config.source}")
            with _named(config.name):
                slices.append(KINDS[config.kind].measured(values))
        return cls(tuple(configs), tuple(slices))

    @property
    def width(self) -> int:
        """Length of the vector: ``vector_dim`` of the U-Net."""
        return sum(part.width for part in self.slices)

    def row(self, columns: Row) -> Float[Tensor, " width"]:
        """The vector of one sample, from its columns: null where a value is None. Raises ConfigError."""
        return self({config.name: columns[config.source] for config in self.configs}, 1).vector[0]  # type: ignore[index]

    def __call__(self, values: Values, count: int) -> Condition:
        """The condition of ``count`` samples, on the CPU; conditions without a value are null.

        Raises ConfigError for an unknown name, another number of values than 1 or ``count``, or a
        value of another kind.
        """
        names = [config.name for config in self.configs]
        if unknown := [name for name in values if name not in names]:
            raise ConfigError(f"no condition {unknown[0]}: there are {', '.join(names) or 'none'}")
        parts = []
        for config, part in zip(self.configs, self.slices, strict=True):
            with _named(config.name):
                given = self._several(config, values.get(config.name), count)
                rows = [torch.zeros(part.width) if value is None else part.encode(value) for value in given]
            parts.append(torch.stack(rows) if rows else torch.zeros(0, part.width))
        return Condition(vector=torch.cat(parts, dim=1) if parts else torch.zeros(count, 0))

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

    @staticmethod
    def _several(config: ConditionConfig, given: Any, count: int) -> Sequence[Any]:
        """A value for each sample."""
        first = given[0] if isinstance(given, (list, tuple)) and given else None
        several = isinstance(first, (list, tuple)) if config.kind == "vector" else isinstance(given, (list, tuple))
        if several and len(given) != count:
            raise ConfigError(f"{len(given)} values for {count} samples: give one for all, or one for each")
        return given if several else [given] * count

    def to_dict(self) -> list[dict[str, Any]]:
        """JSON from which ``from_dict`` makes it again."""
        return [
            {"name": c.name, "kind": c.kind, "column": c.column, "dropout": c.dropout, **vars(part)}
            for c, part in zip(self.configs, self.slices, strict=True)
        ]

    @classmethod
    def from_dict(cls, described: Sequence[Mapping[str, Any]]) -> Conditioner:
        """The conditioner that ``to_dict`` described."""
        configs, slices = [], []
        for entry in described:
            rest = dict(entry)
            configs.append(ConditionConfig(*(rest.pop(name) for name in ("name", "kind", "column", "dropout"))))
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in rest.items()}
            slices.append(KINDS[configs[-1].kind](**values))
        return cls(tuple(configs), tuple(slices))


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Put a condition's name before the text of a ConfigError."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _number(value: Any) -> float:
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"a finite number is needed, got {value!r}")
    return float(value)


def _numbers(value: Any) -> list[float]:
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
