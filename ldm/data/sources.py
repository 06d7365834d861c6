"""Where samples come from. A source is indexable and deterministic per index; `open_source` finds it by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ldm.config import DataConfig

LONGEST = 300  # characters of a reason, which may quote the file


class DataError(RuntimeError):
    """The data on disk is not as it should be; the message names the file or row."""

    exit_code = 3


@dataclass(frozen=True)
class Skipped:
    """An image file, or a row of metadata (`metadata.jsonl:7`), that is left out, and why; characters that cannot be shown are escaped."""

    file: str
    reason: str

    def __post_init__(self) -> None:
        for name in ("file", "reason"):
            object.__setattr__(self, name, "".join(c if c.isprintable() else repr(c)[1:-1] for c in getattr(self, name)))
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


def _shapes(data: DataConfig, split: str) -> Source:
    from ldm.data.shapes import ShapesSource

    return ShapesSource(data, split, objects=1)


def _shapes_two(data: DataConfig, split: str) -> Source:
    from ldm.data.shapes import ShapesSource

    return ShapesSource(data, split, objects=2)


def _shapes_striped(data: DataConfig, split: str) -> Source:
    from ldm.data.shapes import ShapesSource

    return ShapesSource(data, split, objects=1, striped=True)


def _digits(data: DataConfig, split: str) -> Source:
    from ldm.data.digits import DigitsSource

    return DigitsSource(data, split)


def _textures(data: DataConfig, split: str) -> Source:
    from ldm.data.textures import TexturesSource

    return TexturesSource(data, split)


def _folder(data: DataConfig, split: str) -> Source:
    from ldm.data.folder import FolderSource

    return FolderSource(data, split)


OPENERS: dict[str, Callable[[DataConfig, str], Source]] = {
    "folder": _folder,
    "shapes": _shapes,
    "shapes-two": _shapes_two,
    "shapes-striped": _shapes_striped,
    "digits": _digits,
    "textures": _textures,
}

SPLITS = ("train", "validation", "held_out")  # held_out: drawn scenes alone, combinations never trained on


def open_source(data: DataConfig, split: str) -> Source:
    """The source named by ``data.source``, for one of SPLITS. Raises DataError."""
    if split not in SPLITS or (split == "held_out" and not data.source.startswith("shapes")):
        raise DataError(f"{data.source} has no split {split!r}")
    return OPENERS[data.source](data, split)


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
            f" such as {example.file}: {example.reason}{listed}. `ldm init {data.folder}` lists all; mend or remove them, or raise"
            f" data.max_skipped"
        )
