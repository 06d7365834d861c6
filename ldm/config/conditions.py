"""Named conditions of a model beside its caption. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from autoencoder.config import ConfigError, between, one_of

KINDS = ("class", "scalar", "vector")
MASKS = ("strokes", "boxes", "sides")
RESERVED = ("caption", "all")


@dataclass(frozen=True)
class ConditionConfig:
    """One condition: a column of the data, and how often training drops it."""

    name: str
    kind: str  # class: one of several values; scalar: a number; vector: several numbers
    column: str | None = None  # of the data; null: that of the same name
    dropout: float = 0.1  # share of samples from which it is dropped, for guidance

    def __post_init__(self) -> None:
        if self.name in RESERVED:
            raise ConfigError(f"name must not be one of {', '.join(RESERVED)}, got {self.name}")
        if not self.name.isidentifier():
            raise ConfigError(f"name must be a word of letters, digits and _, got {self.name!r}")
        one_of(self, KINDS, "kind")
        between(self, 0.0, 1.0, "dropout")

    @property
    def source(self) -> str:
        """The column that it is read from."""
        return self.name if self.column is None else self.column


@dataclass(frozen=True)
class InpaintConfig:
    """Training to fill masked parts of an image: the mask and the rest of the image are further input channels."""

    everything: float = 0.25  # share of samples whose whole image is masked, so that it draws without an image too
    masks: tuple[str, ...] = MASKS  # of the other samples, each as often

    def __post_init__(self) -> None:
        between(self, 0.0, 1.0, "everything")
        if not self.masks or not set(self.masks) <= set(MASKS):
            raise ConfigError(f"masks must be some of {', '.join(MASKS)}, got {', '.join(self.masks) or 'none'}")


def check_names(conditions: Iterable[ConditionConfig]) -> None:
    """Raise ConfigError where two conditions have one name."""
    names = [condition.name for condition in conditions]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise ConfigError(f"conditions: two are called {twice}")
