"""Random masks of what an image model is trained to fill: strokes, boxes, sides (docs/equations.md C3)."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from ldm.config import InpaintConfig

STROKES, SEGMENTS = 5, 5  # at most
LENGTH, WIDTH = 0.8, (0.05, 0.4)  # of a segment at most, and of a stroke, as shares of the side
BOXES, BOX = 4, (0.12, 0.6)  # at most, and sides of one
SIDE = (0.04, 0.4)  # depth of a side


def draw_mask(rng: np.random.Generator, side: int, config: InpaintConfig) -> UInt8[np.ndarray, "side side"]:
    """A mask, 1 where the image is to be drawn and 0 where it is known.

    Everything with probability ``config.everything``, else one of ``config.masks``: strokes and boxes after those
    of LaMa (Suvorov et al. 2022), and up to four sides, of which one at least is masked, for outpainting.
    """
    if rng.random() < config.everything:
        return np.ones((side, side), np.uint8)
    kind = config.masks[int(rng.integers(len(config.masks)))]
    mask = Image.new("L", (side, side))
    {"strokes": _strokes, "boxes": _boxes, "sides": _sides}[kind](rng, side, ImageDraw.Draw(mask))
    return np.array(mask)


def _strokes(rng: np.random.Generator, side: int, canvas: ImageDraw.ImageDraw) -> None:
    """Bent lines with round ends and joints."""
    for _ in range(int(rng.integers(1, STROKES + 1))):
        width = max(1, round(float(rng.uniform(*WIDTH)) * side))
        x, y = (float(v) for v in rng.random(2) * (side - 1))
        for _ in range(int(rng.integers(1, SEGMENTS + 1))):
            angle, length = float(rng.random()) * 2 * math.pi, float(rng.random()) * LENGTH * side
            u, v = (min(max(a + length * b, 0.0), side - 1.0) for a, b in ((x, math.cos(angle)), (y, math.sin(angle))))
            canvas.line([(x, y), (u, v)], fill=1, width=width)
            for a, b in ((x, y), (u, v)):
                canvas.ellipse([a - width / 2, b - width / 2, a + width / 2, b + width / 2], fill=1)
            x, y = u, v


def _boxes(rng: np.random.Generator, side: int, canvas: ImageDraw.ImageDraw) -> None:
    for _ in range(int(rng.integers(1, BOXES + 1))):
        width, height = (max(1, round(float(rng.uniform(*BOX)) * side)) for _ in range(2))
        x, y = (int(rng.integers(0, side - length + 1)) for length in (width, height))
        canvas.rectangle([x, y, x + width - 1, y + height - 1], fill=1)


def _sides(rng: np.random.Generator, side: int, canvas: ImageDraw.ImageDraw) -> None:
    chosen = rng.random(4) < 0.5
    chosen[int(rng.integers(4))] = True
    depths = [max(1, round(float(depth) * side)) for depth in rng.uniform(*SIDE, 4)]
    last = side - 1
    rectangles = [
        (0, 0, depths[0] - 1, last),
        (0, 0, last, depths[1] - 1),
        (side - depths[2], 0, last, last),
        (0, side - depths[3], last, last),
    ]
    for masked, rectangle in zip(chosen, rectangles, strict=True):
        if masked:
            canvas.rectangle(rectangle, fill=1)
