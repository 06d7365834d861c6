"""A captioned image, the protocol of a source, and samples that cannot be used."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ldm.config import DataConfig
from ldm.errors import DataError

LONGEST = 300  # characters of a reason, which may quote the file


@dataclass(frozen=True)
class Skipped:
    """An image file or metadata row (`metadata.jsonl:7`) that is left out, and the reason.

    Unprintable characters are escaped.
    """

    file: str
    reason: str

    def __post_init__(self) -> None:
        for name in ("file", "reason"):
            escaped = (c if c.isprintable() else repr(c)[1:-1] for c in getattr(self, name))
            object.__setattr__(self, name, "".join(escaped))
        if len(self.reason) > LONGEST:
            object.__setattr__(self, "reason", self.reason[:LONGEST] + "…")


class BadSample(DataError):
    """A sample that cannot be used; the other samples of its source can."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(file, reason)
        self.skipped = Skipped(file, reason)

    def __str__(self) -> str:
        return f"{self.skipped.file}: {self.skipped.reason}"


@dataclass(frozen=True)
class Sample:
    """One image, uint8 [h, w, c], its caption, and its ground truth if known (drawn scenes)."""

    image: np.ndarray
    text: str
    truth: Any = None


@runtime_checkable
class Source(Protocol):
    """Captioned images by index. ``length`` is None for an endless source."""

    length: int | None
    fingerprint: str  # sha256 of everything that determines the samples; part of the key of a latent cache
    skipped: tuple[Skipped, ...]  # left out when the source was opened

    def __getitem__(self, index: int) -> Sample:
        """Read a sample. Raises BadSample if it cannot be read."""
        ...

    def text(self, index: int) -> str:
        """The caption of a sample; its image is not read."""
        ...

    def columns(self, index: int) -> Mapping[str, Any]:
        """Further facts of a sample by name, for conditions; its image is not read."""
        ...

    def captions(self, limit: int) -> list[str] | None:
        """The distinct captions in a fixed order, or None if there are more than ``limit``."""
        ...


def readable(source: Source, indices: Iterable[int] | None = None) -> Iterator[tuple[int, Sample]]:
    """Samples with their indices, in order (None: all); unreadable ones are skipped."""
    if indices is None:
        indices = itertools.count() if source.length is None else range(source.length)
    for index in indices:
        try:
            yield index, source[index]
        except BadSample:
            continue


def check_share(skipped: int, total: int, data: DataConfig, example: Skipped, listed: str = "") -> None:
    """Raise DataError if more of a folder is unusable than ``data.max_skipped`` allows."""
    if skipped > data.max_skipped * total:
        raise DataError(
            f"{data.folder}: {skipped} of {total} cannot be used, more than"
            f" data.max_skipped {data.max_skipped:g} allows, such as {example.file}: {example.reason}{listed}."
            f" `ldm init {data.folder}` lists all; fix or remove them, or raise data.max_skipped"
        )
