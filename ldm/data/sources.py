"""Sources of samples, by name. Sample ``i`` of a source depends on its settings and ``i`` alone."""

from __future__ import annotations

from collections.abc import Callable

from ldm.config import DataConfig
from ldm.data.sample import Source
from ldm.errors import DataError


def _shapes(data: DataConfig, split: str) -> Source:
    from ldm.data.shapes import ShapesSource

    return ShapesSource(data, split, objects=1)


def _shapes_two(data: DataConfig, split: str) -> Source:
    from ldm.data.shapes import ShapesSource

    return ShapesSource(data, split, objects=2)


def _shapes_striped(data: DataConfig, split: str) -> Source:
    from ldm.data.shapes import ShapesSource

    return ShapesSource(data, split, objects=1, striped=True)


def _shapes_columns(data: DataConfig, split: str) -> Source:
    from ldm.data.shapes import ShapesSource

    return ShapesSource(data, split, objects=1, sized=True)


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
    "shapes-columns": _shapes_columns,
    "digits": _digits,
    "textures": _textures,
}

SPLITS = ("train", "validation", "held_out")  # held_out: for drawn scenes only, combinations that are never trained on


def open_source(data: DataConfig, split: str) -> Source:
    """Open the source named by ``data.source``, for one of SPLITS. Raises DataError."""
    if split not in SPLITS or (split == "held_out" and not data.source.startswith("shapes")):
        raise DataError(f"{data.source} has no split {split!r}")
    return OPENERS[data.source](data, split)
