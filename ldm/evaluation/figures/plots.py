"""Figures as files: captioned images, curves of a run, the terms of a likelihood."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.files.disk import replace
from ldm.runs.records import Points

SUFFIXES = (".png", ".pdf", ".svg")
MARK = "ldm figure"  # in the metadata of each kind of file
LONGEST = 200  # characters shown of a caption


def captioned(
    images: UInt8[np.ndarray, "n h w c"],
    captions: Sequence[str],
    file: Path,
    columns: int = 8,
    wrong: Sequence[bool] | None = None,
    title: str = "",
) -> None:
    """Save a picture of images with captions below them; those marked ``wrong`` have a red frame and caption."""
    from matplotlib.figure import Figure

    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.55 * columns, 2.0 * rows + 0.4), dpi=110)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        bad = wrong is not None and wrong[i]
        axes = figure.add_subplot(rows, columns, i + 1)
        shown = image[..., 0] if image.shape[-1] == 1 else image
        axes.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color("red" if bad else "none")
            spine.set_linewidth(3)
        text, colour = _wrap(caption[:LONGEST], 22), "red" if bad else "black"
        axes.set_xlabel(text, fontsize=6.5, color=colour, parse_math=False)  # a $ in a caption is a dollar
    if title:
        figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    save_figure(figure, file)


def curves(series: Mapping[str, Points], file: Path) -> None:
    """Plot metrics over updates, one panel each; values that are not finite are gaps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * max(len(series), 1), 2.8), dpi=110)
    for i, (name, points) in enumerate(series.items()):
        axes = figure.add_subplot(1, len(series), i + 1)
        axes.plot(*zip(*points, strict=True), marker="." if len(points) < 20 else None)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("update", fontsize=8)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    save_figure(figure, file)


def likelihood(found: Mapping[str, Any], file: Path) -> None:
    """Plot the ``likelihood`` of a report: bits per step, cumulated from noise to data, and by term."""
    from matplotlib.figure import Figure

    bins, terms = found["by_t"], found.get("terms", found["parts"])
    edges = np.array([bins[0]["from"], *(b["to"] + 1 for b in bins)], dtype=float)
    bits = np.array([b["bits_per_dim"] for b in bins])
    figure = Figure(figsize=(12.5, 3.6), dpi=110)
    per_step, cumulated, bars = (figure.add_subplot(1, 3, i) for i in (1, 2, 3))
    per_step.stairs(bits / np.diff(edges), edges, baseline=None)
    per_step.set(xscale="log", yscale="log", ylabel="bits per dimension and step", title="each denoising step")
    cumulated.plot(edges, found["parts"]["prior"] + np.append(np.cumsum(bits[::-1])[::-1], 0.0))
    cumulated.set(xscale="log", ylabel="bits per dimension", title="prior and all steps down to t", ylim=(0, None))
    for axes in (per_step, cumulated):
        axes.set_xlabel("t (0: least noise)")
        axes.grid(alpha=0.3)
    names = [name.replace("_", " ") for name in terms]
    shown = bars.barh(names, list(terms.values()))
    bars.bar_label(shown, [f"{value:.3f}" for value in terms.values()], padding=3, fontsize=8)
    bars.axvline(0, color="black", linewidth=0.8)
    bars.margins(x=0.35)
    bars.invert_yaxis()
    error = "" if found["error"] is None else f" ± {found['error']:.3f}"
    bars.set(xlabel="bits per dimension", title=f"total {found['bits_per_dim']:.3f}{error}")
    figure.tight_layout()
    save_figure(figure, file)


def save_figure(figure: Any, file: Path, about: str | None = None) -> None:
    """Write a figure atomically, marked for ``is_figure``; a PNG carries ``about`` as `ldm`. Raises OSError."""
    content, kind = io.BytesIO(), file.suffix.lower().removeprefix(".")
    metadata = {"Source": MARK} if kind == "png" else {"Creator": MARK}
    if kind == "png" and about is not None:
        metadata["ldm"] = about
    figure.savefig(content, format=kind, metadata=metadata)
    replace(file, content.getvalue())


def write_png(picture: Image.Image, file: Path, info: PngInfo) -> None:
    """Write a picture atomically. Raises OSError."""
    content = io.BytesIO()
    picture.save(content, format="PNG", pnginfo=info)
    replace(file, content.getvalue())


def is_figure(content: bytes) -> bool:
    """True if ``save_figure`` wrote a file of this content."""
    return MARK.encode() in content


def _wrap(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))
