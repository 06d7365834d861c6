"""A captioned image, what a source of them is, and samples that cannot be used."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ldm.config import DataConfig
from ldm.errors import DataError

LONGEST = 300  # characters of a reason, which may quote the file


@dataclass(frozen=True)
class Skipped:
    """An image file, or a row of metadata (`metadata.jsonl:7`), that is left out, and why; characters that cannot be shown are escaped."""

    file: str
    reason: str

    def __post_init__(self) -> None:
        for name in ("file", "reason"):
            object.__setattr__(
                self, name, "".join(c if c.isprintable() else repr(c)[1:-1] for c in getattr(self, name))
            )
        if len(self.reason) > LONGEST:
            object.__setattr__(self, "reason", self.reason[:LONGEST] + "…")


class BadSample(DataError):
    """One sample cannot be used; others can."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(file, reason)
        self.skipped = Skipped(file, reason)

    def __str__(self) -> str:
        return f"{self.skipped.file}: {self.skipped.reason}"


@dataclass(frozen=True)
class Sample:
    """One image, uint8 [h, w, c], its caption, and what is known of it (drawn scenes know their truth)."""

    image: np.ndarray
    text: str
    truth: Any = None


@runtime_checkable
class Source(Protocol):
    """Captioned images. ``len`` is None for a source without end."""

    length: int | None
    fingerprint: str  # sha256 over what determines every sample; binds caches
    skipped: tuple[Skipped, ...]  # what was left out when the source was opened

    def __getitem__(self, index: int) -> Sample:
        """Raises BadSample where this one cannot be read."""
        ...

    def text(self, index: int) -> str:
        """The caption of a sample alone; no image is read for it."""
        ...

    def captions(self, limit: int) -> list[str] | None:
        """The distinct captions in a fixed order, or None where there are more than ``limit``."""
        ...


def readable(source: Source, indices: Iterable[int] | None = None) -> Iterator[tuple[int, Sample]]:
    """Samples with their indices (left out: all in order); those that cannot be read are passed over."""
    if indices is None:
        indices = itertools.count() if source.length is None else range(source.length)
    for index in indices:
        try:
            yield index, source[index]
        except BadSample:
            continue


def check_share(skipped: int, total: int, data: DataConfig, example: Skipped, listed: str = "") -> None:
    """Raise DataError where more of a folder is unusable than ``data.max_skipped`` allows."""
    if skipped > data.max_skipped * total:
        raise DataError(
            f"{data.folder}: {skipped} of {total} cannot be used, more than data.max_skipped {data.max_skipped:g} allows,"
            f" such as {example.file}: {example.reason}{listed}. `ldm init {data.folder}` lists all; fix or remove them, or raise"
            f" data.max_skipped"
        )
