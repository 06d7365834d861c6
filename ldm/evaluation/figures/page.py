"""A white page measured in pixels: axes, text and tables of pictures, none of which is resampled twice."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from ldm.data.transforms import GAP, grid
from ldm.evaluation.figures.plots import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 100
CELL = 96  # side of a picture in a table, in pixels
FONT = 10.5  # points
HEADER = 26  # pixels over a table for the labels of its columns
GROUP = 14  # pixels between groups of rows
EDGE = 16  # pixels around everything


class Page:
    """A matplotlib figure whose positions are pixels from its top left corner."""

    def __init__(self, width: int, height: int) -> None:
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Add axes whose frame has this top left corner and size."""
        return self.figure.add_axes(
            (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        )

    def panel(self, x: float, y: float, width: float, height: float, *, title: str, across: str) -> Axes:
        """Add axes for curves, in the common style of all plots."""
        axes = self.axes(x, y, width, height)
        axes.set_title(title, fontsize=FONT + 1, loc="left")
        axes.set_xlabel(across, fontsize=FONT)
        axes.tick_params(labelsize=FONT - 1)
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        return axes

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Write text that starts at a point, vertically centred, unless ``style`` says otherwise."""
        self.figure.text(
            x / self.width, 1 - y / self.height, text, **{"fontsize": FONT, "ha": "left", "va": "center", **style}
        )

    def pictures(self, x: int, y: int, images: UInt8[np.ndarray, "r k h w c"], cell: int = CELL) -> None:
        """Show rows of pictures, each ``cell`` pixels wide, with their top left corner at (x, y)."""
        sheet = grid(fitted(images.reshape(-1, *images.shape[2:]), cell), images.shape[1])
        axes = self.axes(x, y, sheet.shape[1], sheet.shape[0])
        axes.imshow(sheet, interpolation="nearest", aspect="auto")
        axes.set_axis_off()

    def save(self, file: Path, about: Mapping[str, Any]) -> None:
        """Write the page; a PNG carries ``about`` in its metadata, as samples do."""
        save_figure(self.figure, file, json.dumps(about, ensure_ascii=False))


def fitted(images: UInt8[np.ndarray, "n h w c"], cell: int) -> UInt8[np.ndarray, "n cell2 cell2 3"]:
    """Convert to square RGB pictures ``cell`` pixels wide: enlarged by a whole factor on white, or reduced.

    One channel becomes grey; of more than three the first three are shown.
    """
    from PIL import Image

    side, channels = images.shape[1], images.shape[3]
    images = images[..., :1].repeat(3, axis=-1) if channels < 3 else images[..., :3]
    if side > cell:
        return np.stack(
            [np.asarray(Image.fromarray(image).resize((cell, cell), Image.Resampling.LANCZOS)) for image in images]
        )
    images = images.repeat(cell // side, axis=1).repeat(cell // side, axis=2)
    before = (cell - images.shape[1]) // 2
    after = cell - images.shape[1] - before
    return np.pad(images, ((0, 0), (before, after), (before, after), (0, 0)), constant_values=255)


def spread(count: int, cell: int = CELL) -> int:
    """Extent in pixels of ``count`` pictures in a row or column."""
    return count * (cell + GAP) - GAP


def table(
    groups: Sequence[tuple[str, UInt8[np.ndarray, "r k h w c"]]], rows: Sequence[str], columns: Sequence[str], *,
    title: str, left: int = 250,
) -> Page:  # fmt: skip
    """Page of groups of rows of pictures: texts of groups and labels of rows at the left, of columns at the top."""
    r, k = len(rows), len(columns)
    top, high = EDGE + 30, spread(r) + GROUP
    page = Page(EDGE + left + spread(k) + EDGE, top + HEADER + len(groups) * high - GROUP + EDGE)
    page.text(EDGE, EDGE + 8, title, fontsize=FONT + 1.5)
    labels(page, EDGE + left, top, columns)
    for g, (text, images) in enumerate(groups):
        y = top + HEADER + g * high
        page.text(EDGE, y + spread(r) / 2, wrapped(text, 18), parse_math=False)
        for i, row in enumerate(rows):
            page.text(EDGE + left - 10, y + i * (CELL + GAP) + CELL / 2, row, ha="right", color="0.35")
        page.pictures(EDGE + left, y, images)
    return page


def labels(page: Page, x: int, y: int, columns: Sequence[str], cell: int = CELL) -> None:
    """Write a label over each column of a table that begins at x."""
    for i, column in enumerate(columns):
        page.text(x + i * (cell + GAP) + cell / 2, y + HEADER / 2, column, ha="center")


def wrapped(text: str, width: int) -> str:
    """Wrap text into at most five lines of ``width`` characters."""
    return "\n".join(textwrap.wrap(text, width, max_lines=5, placeholder=" …"))
