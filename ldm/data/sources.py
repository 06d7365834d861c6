"""Where samples come from. A source is indexable and deterministic per index; `open_source` finds it by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ldm.config import DataConfig


class DataError(RuntimeError):
    """The data on disk is not as it should be; the message names the file or row."""

    exit_code = 3


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

    def __getitem__(self, index: int) -> Sample: ...

    def captions(self, limit: int) -> list[str] | None:
        """The distinct captions in a fixed order, or None where there are more than ``limit``."""
        ...


def _shapes(data: DataConfig, split: str) -> Source:
    from ldm.data.shapes import ShapesSource

    return ShapesSource(data, split, objects=1)


def _shapes_two(data: DataConfig, split: str) -> Source:
    from ldm.data.shapes import ShapesSource

    return ShapesSource(data, split, objects=2)


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
    "digits": _digits,
    "textures": _textures,
}

SPLITS = ("train", "validation", "held_out")  # held_out: drawn scenes alone, combinations never trained on


def open_source(data: DataConfig, split: str) -> Source:
    """The source named by ``data.source``, for one of SPLITS. Raises DataError."""
    if split not in SPLITS or (split == "held_out" and not data.source.startswith("shapes")):
        raise DataError(f"{data.source} has no split {split!r}")
    return OPENERS[data.source](data, split)
