"""Pictures for people: grids of images, captions under them, curves of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from ldm.evaluation.record import Points

GAP = 2  # pixels between images


def grid(images: UInt8[np.ndarray, "n h w c"], columns: int) -> UInt8[np.ndarray, "H W c2"]:
    """Images side by side on white, row by row; channel counts other than 1 and 3 show their first three (or one)."""
    n, h, w, c = images.shape
    if c not in (1, 3):
        images = images[..., :3] if c > 3 else images[..., :1]
    if images.shape[-1] == 1:
        images = images.repeat(3, axis=-1)
    rows = -(-n // columns)
    sheet = np.full((rows * (h + GAP) - GAP, columns * (w + GAP) - GAP, 3), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (h + GAP), i % columns * (w + GAP)
        sheet[y : y + h, x : x + w] = image
    return sheet


def captioned(
    images: UInt8[np.ndarray, "n h w c"],
    captions: Sequence[str],
    file: Path,
    columns: int = 8,
    wrong: Sequence[bool] | None = None,
    title: str = "",
) -> None:
    """Save a picture of the images, each with its caption below; those marked ``wrong`` have a red frame and caption."""
    from matplotlib.figure import Figure

    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.55 * columns, 2.0 * rows + 0.4), dpi=110)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        bad = wrong is not None and wrong[i]
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color("red" if bad else "none")
            spine.set_linewidth(3)
        axes.set_xlabel(_wrap(caption, 22), fontsize=6.5, color="red" if bad else "black")
    if title:
        figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def curves(series: Mapping[str, Points], file: Path) -> None:
    """Draw figures over updates, one panel each; what was not finite is a gap."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * max(len(series), 1), 2.8), dpi=110)
    for i, (name, points) in enumerate(series.items()):
        axes = figure.add_subplot(1, len(series), i + 1)
        axes.plot(*zip(*points, strict=True), marker="." if len(points) < 20 else None)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("update", fontsize=8)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _wrap(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))
