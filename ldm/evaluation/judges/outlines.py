"""Outlines of the strict judge: variants of a drawn shape, and decoys that resemble one and no caption means.

An outline is a function of x and y (y points down) that returns a mask of the points inside; like those of
``ldm.data.shapes.inside``, outlines fit in [−1, 1] up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from ldm.data.shapes import inside

Outline = Callable[[np.ndarray, np.ndarray], np.ndarray]


def turned(outline: Outline, degrees: float) -> Outline:
    """The outline turned clockwise about the origin."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return lambda x, y: outline(c * x + s * y, c * y - s * x)


def stretched(outline: Outline, across: float, down: float) -> Outline:
    """The outline with x scaled by ``across`` and y by ``down``."""
    return lambda x, y: outline(x / across, y / down)


def less(outline: Outline, hole: Outline) -> Outline:
    """The outline without what lies in ``hole``."""
    return lambda x, y: outline(x, y) & ~hole(x, y)


def disc(radius: float, x0: float = 0.0, y0: float = 0.0) -> Outline:
    """A disc about (x0, y0)."""
    return lambda x, y: np.hypot(x - x0, y - y0) <= radius


def box(across: float, down: float, corner: float = 0.0) -> Outline:
    """A rectangle of half-sides ``across`` and ``down`` whose corners are rounded with radius ``corner``."""

    def outline(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        dx, dy = abs(x) - across + corner, abs(y) - down + corner
        return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0) <= corner

    return outline


def cross(width: float, corner: float = 0.0) -> Outline:
    """A cross with arms of half-width ``width`` whose ends are rounded."""
    across, down = box(1, width, corner), box(width, 1, corner)
    return lambda x, y: across(x, y) | down(x, y)


def polygon(corners: int, turn: float = 0.0) -> Outline:
    """A regular polygon with its corners on the unit circle, one of them on top where ``turn`` is 0 degrees."""
    sector = 2 * math.pi / corners

    def outline(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        angle = (np.arctan2(x, -y) - math.radians(turn)) % sector - sector / 2
        return np.hypot(x, y) * np.cos(angle) <= math.cos(sector / 2)

    return outline


def star(points: int, notch: float) -> Outline:
    """A star with points on the unit circle, one of them on top; ``notch``: radius of the corners between them."""
    sector = 2 * math.pi / points

    def outline(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        angle = np.arctan2(x, -y) % sector
        angle = np.minimum(angle, sector - angle)
        across, along = np.hypot(x, y) * np.sin(angle), np.hypot(x, y) * np.cos(angle)
        deep = notch * math.cos(sector / 2)
        return across * (1 - deep) <= (1 - along) * notch * math.sin(sector / 2)

    return outline


def blossom(lobes: int, depth: float) -> Outline:
    """A blob whose radius swings by ``depth`` about its mean, with ``lobes`` lobes, one of them on top."""
    return lambda x, y: np.hypot(x, y) * (1 + depth) <= 1 + depth * np.cos(lobes * np.arctan2(x, -y))


def triangle(corner: float) -> Outline:
    """The drawn triangle with corners rounded to the radius ``corner``: within that distance of a smaller one."""
    height = math.sqrt(3) / 2
    middle, inner = height / 3, math.sqrt(3) / 3  # of the circle inscribed: its y, its radius
    kept = 1 - corner / inner
    points = [(0.0, middle - kept * 2 * inner), (kept, middle + kept * inner), (-kept, middle + kept * inner)]

    def outline(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        near = partial(inside, "triangle")(x / kept, (y - middle) / kept + middle)
        for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
            along = ((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / ((x1 - x0) ** 2 + (y1 - y0) ** 2)
            along = np.clip(along, 0, 1)
            near = near | (np.hypot(x - x0 - along * (x1 - x0), y - y0 - along * (y1 - y0)) <= corner)
        return near

    return outline


def _shape(name: str) -> Outline:
    return partial(inside, name)


def _fat_star(notch: float) -> Outline:
    """A star with the area of the drawn one: its points are as much shorter as its notches are less deep."""
    scale = math.sqrt(0.45 / notch)
    return stretched(star(5, notch), scale, scale)


def _without_a_corner(x0: float, y0: float) -> Outline:
    """The drawn triangle without the corner that lies in a direction from its middle."""
    middle = math.sqrt(3) / 6
    return lambda x, y: inside("triangle", x, y) & (x * x0 + (y - middle) * y0 < 0.62)


_QUARTERS = (0, 90, 180, 270)
_RING = _shape("ring")

# What is still the shape to the eye and too far from its outline for one template: fat stars, crosses with rounded,
# thick, thin, short or leaning arms, rings with another hole.
VARIANTS: dict[str, tuple[Outline, ...]] = {
    "star": (_fat_star(0.54),),
    "cross": (
        cross(0.36, 0.36),
        cross(0.44, 0.3),
        cross(0.28),
        *(turned(cross(0.38, 0.25), a) for a in (-14, 14)),
        *(stretched(cross(0.38, 0.2), across, down) for across, down in ((1, 0.86), (0.86, 1))),
    ),
    "ring": (
        less(disc(1), disc(0.36)),
        less(disc(1), disc(0.42)),
        less(disc(1), disc(0.58)),
        *(turned(less(disc(1), disc(0.48, 0, -0.1)), a) for a in _QUARTERS),
    ),
}
# What is another thing, by the name that a refusal gives.
DECOYS: dict[str, tuple[Outline, ...]] = {
    "ellipse": tuple(turned(stretched(disc(1), 1, 0.72), a) for a in (0, 45, 90, 135)),
    "disc with a hole": (less(disc(1), disc(0.22)),),
    "rounded square": (box(0.9, 0.9, 0.6),),
    "rectangle": (box(0.9, 0.62), box(0.62, 0.9)),
    "turned square": tuple(turned(box(0.9, 0.9), a) for a in (20, 45, 70)),
    "rounded triangle": (triangle(0.4),),
    "stretched triangle": (stretched(_shape("triangle"), 1, 0.66), stretched(_shape("triangle"), 0.66, 1)),
    "turned triangle": tuple(turned(_shape("triangle"), a) for a in (-25, 25, 180)),
    "cut triangle": (
        _without_a_corner(0, -1),
        _without_a_corner(math.sqrt(0.75), 0.5),
        _without_a_corner(-math.sqrt(0.75), 0.5),
    ),
    "pentagon": (polygon(5), polygon(5, 36)),
    "rounded star": (blossom(5, 0.15), blossom(5, 0.25)),
    "fat star": (star(5, 0.76),),
    "other star": (star(4, 0.4), star(6, 0.5), turned(star(5, 0.45), 36)),
    "thick cross": (cross(0.66),),
    "rounded cross": (blossom(4, 0.22), blossom(4, 0.32)),
    "turned cross": tuple(turned(cross(0.36), a) for a in (30, 45, 60)),
    "ring with a wide hole": (less(disc(1), disc(0.74)),),
    "uneven ring": tuple(turned(less(disc(1), disc(0.5, 0, -0.26)), a) for a in _QUARTERS),
    "open ring": tuple(turned(less(_RING, lambda x, y: (x > 0) & (abs(y) < 0.2)), a) for a in _QUARTERS),
    "square ring": (
        less(box(0.9, 0.9), box(0.45, 0.45)),
        less(box(0.9, 0.9), disc(0.5)),
        less(disc(1), box(0.45, 0.45)),
    ),
}
