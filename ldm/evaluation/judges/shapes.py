"""Reads a picture of drawn shapes: the nearest scene, in squared error, of all that could have been drawn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.shapes import BACKGROUNDS, COLOURS, RADII, SHAPES, SIZES, STRIPE, Object, Scene, coverage, parse
from ldm.evaluation.metrics import proportion

Reading = Scene  # a picture is read as the scene that it shows; two objects come left to right or top to bottom
Report = dict[str, dict[str, float]]

ATTRIBUTES = {
    1: ("background", "size", "colour", "shape", "all"),
    2: ("background", "colours", "shapes", "relation", "all"),
}
Kind = tuple[str | None, float | None]  # size, and height of the stripes
PLAIN: Kind = (None, None)
_CHUNK = 2**23  # hypotheses weighed at once


def check(images: np.ndarray, side: int) -> None:
    """Raises ValueError unless the images are uint8 [n, side, side, 3]."""
    if images.ndim != 4 or images.shape[1:] != (side, side, 3) or images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 [n, {side}, {side}, 3], got {images.dtype} {list(images.shape)}")


class ShapesJudge:
    """Reads pictures by exhaustive template matching.

    With D = image − b and the coverage M of a shape, drawing it in colour c on background b lowers the squared error
    |D|² by 2⟨D, M⟩·(c − b) − |M|²|c − b|². ⟨D, M⟩ at every place is a correlation, so no scene is ever drawn. Shapes
    that do not overlap lower the error independently of each other.

    ``striped``: one object may be striped.
    """

    def __init__(self, side: int, objects: int, striped: bool = False) -> None:
        if objects not in ATTRIBUTES:
            raise ValueError(f"scenes have 1 or 2 objects, got {objects}")
        self.side, self.objects = side, objects
        self._backgrounds = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32) / 255  # [b, 3]
        self._contrasts = (
            torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 255 - self._backgrounds[:, None]
        )  # [b, c, 3]
        sizes: tuple[str | None, ...] = SIZES if objects == 1 else (None,)
        self._templates: dict[Kind, Tensor] = {
            kind: torch.from_numpy(np.stack([coverage(shape, RADII[kind[0]] * side, kind[1]) for shape in SHAPES]))[
                :, None
            ]
            for kind in itertools.product(sizes, (None, STRIPE * side) if striped else (None,))
        }  # [s, 1, k, k]

    def read(self, images: np.ndarray, grounds: Sequence[int] | None = None) -> list[Reading]:
        """The nearest scene of each image, uint8 [n, side, side, 3].

        ``grounds``: for two objects, the index of each image's background if it is known; makes the search faster.
        """
        check(images, self.side)
        one = (self._backgrounds.shape[0] if grounds is None else 1) * self._contrasts.shape[1] * len(SHAPES)
        places = max((self.side - t.shape[-1] + 1) ** 2 for t in self._templates.values())
        step = max(1, _CHUNK // (one * places))
        readings: list[Reading] = []
        with torch.inference_mode():
            for start in range(0, len(images), step):
                batch = torch.from_numpy(images[start : start + step]).permute(0, 3, 1, 2).float() / 255
                if self.objects == 1:
                    readings += self._singles(batch)
                else:
                    known = None if grounds is None else torch.tensor(grounds[start : start + step])
                    readings += self._pairs(batch, known)
        return readings

    def _error(self, batch: Tensor) -> Tensor:
        """|image − b|², [n, b]."""
        return (batch[:, None] - self._backgrounds[:, :, None, None]).square().sum((2, 3, 4))

    def _reductions(self, batch: Tensor, kind: Kind, known: Tensor | None = None) -> Tensor:
        """By how much each hypothesis lowers the squared error, [n, place, s, b, c]; places row by row.

        ``known``: [n] number of each image's background; b is then 1.
        """
        n, templates = batch.shape[0], self._templates[kind]
        inner = F.conv2d(batch.reshape(-1, 1, self.side, self.side), templates)  # ⟨image, M⟩: [n·3, s, places, places]
        inner = inner.reshape(n, 3, len(SHAPES), -1).permute(0, 3, 2, 1)  # [n, place, s, 3]
        area, square = templates.sum((1, 2, 3)), templates.square().sum((1, 2, 3))
        on_background = (self._backgrounds[:, None] * self._contrasts).sum(-1)  # b·(c − b): [b, c]
        constant = 2 * area[:, None, None] * on_background + square[:, None, None] * self._contrasts.square().sum(-1)
        if known is not None:
            weights = 2 * self._contrasts[known].transpose(1, 2)  # [n, 3, c]
            products = (inner.flatten(1, 2) @ weights).reshape(*inner.shape[:3], 1, -1)
            return products.sub_(constant[:, known].transpose(0, 1)[:, None, :, None])
        weights = 2 * self._contrasts.reshape(-1, 3).T  # [3, b·c]
        return (inner @ weights).reshape(*inner.shape[:3], *on_background.shape).sub_(constant)

    def _place(self, place: int, kind: Kind) -> tuple[int, int]:
        kernel = self._templates[kind].shape[-1]
        y, x = divmod(place, self.side - kernel + 1)
        return x + kernel // 2, y + kernel // 2

    def _singles(self, batch: Tensor) -> list[Reading]:
        error = self._error(batch)
        best_error = torch.full((len(batch),), math.inf)
        readings = [Reading("", ())] * len(batch)
        for kind in self._templates:
            reduction, place = self._reductions(batch, kind).max(1)  # over places: [n, s, b, c]
            rest = (error[:, None, :, None] - reduction).flatten(1)
            smallest, which = rest.min(1)
            for i in torch.nonzero(smallest < best_error).flatten().tolist():
                s, b, c = (int(v) for v in np.unravel_index(int(which[i]), reduction.shape[1:]))
                x, y = self._place(int(place[i, s, b, c]), kind)
                found = Object(kind[0], list(COLOURS)[c], SHAPES[s], x, y, striped=kind[1] is not None)
                readings[i] = Reading(list(BACKGROUNDS)[b], (found,))
            best_error = torch.minimum(best_error, smallest)
        return readings

    def _pairs(self, batch: Tensor, known: Tensor | None = None) -> list[Reading]:
        """For every background the best object, the best second beside it, then each again given the other."""
        reduction, shape = self._reductions(batch, PLAIN, known).max(2)  # over shapes: [n, place, b, c]
        reduction = reduction.permute(0, 2, 3, 1)  # [n, b, c, place]
        first = reduction.flatten(2).argmax(-1)
        second = self._partner(reduction, first)
        first = self._partner(reduction, second)
        second = self._partner(reduction, first)
        flat = reduction.flatten(2)
        gain = flat.gather(2, first[..., None]) + flat.gather(2, second[..., None])
        best = torch.zeros_like(first[:, 0]) if known is not None else (self._error(batch) - gain[..., 0]).argmin(1)
        background = (best if known is None else known).tolist()
        shape = shape.permute(0, 2, 3, 1).flatten(2)
        readings = []
        for i, (b, ground) in enumerate(zip(best.tolist(), background, strict=True)):
            objects = []
            for which in (int(first[i, b]), int(second[i, b])):
                c, place = divmod(which, reduction.shape[-1])
                objects.append(
                    Object(None, list(COLOURS)[c], SHAPES[int(shape[i, b, which])], *self._place(place, PLAIN))
                )
            readings.append(ordered(list(BACKGROUNDS)[ground], objects[0], objects[1]))
        return readings

    def _partner(self, reduction: Tensor, other: Tensor) -> Tensor:
        """The best object of another colour whose square does not touch the other's: index into [c · place], [n, b]."""
        kernel = self._templates[PLAIN].shape[-1]
        width = self.side - kernel + 1
        place = torch.arange(width * width)
        at, colour = other % (width * width), other // (width * width)
        apart = (
            torch.maximum(
                (place % width - at[..., None] % width).abs(), (place // width - at[..., None] // width).abs()
            )
            >= kernel
        )
        allowed = (
            apart[:, :, None] & (torch.arange(reduction.shape[2]) != colour[..., None])[..., None]
        )  # [n, b, c, place]
        return reduction.masked_fill(~allowed, -math.inf).flatten(2).argmax(-1)


def ordered(background: str, one: Object, two: Object) -> Reading:
    """The scene of two objects, left to right or top to bottom, whichever they lie farther apart along."""
    if abs(one.x - two.x) >= abs(one.y - two.y):
        return Reading(background, (one, two) if one.x <= two.x else (two, one), "left of")
    return Reading(background, (one, two) if one.y <= two.y else (two, one), "above")


_INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def agreement(reading: Reading, asked: Scene, striped: bool = False) -> dict[str, bool]:
    """The attributes of the caption's scene that the picture shows; ``striped``: stripes count as one.

    Two objects may come in either order, whichever agrees in more colours and shapes; the relation is then judged in
    that order. So a picture with the right objects in the wrong places is wrong in its relation alone.
    """
    if len(reading.objects) != len(asked.objects):
        raise ValueError(
            f"a caption of {len(asked.objects)} object(s) was given for a reading of {len(reading.objects)}"
        )
    found, relation = matched(reading, asked)
    right = {"background": reading.background == asked.background}
    colours = all(a.colour == b.colour for a, b in zip(found, asked.objects, strict=True))
    shapes = all(a.shape == b.shape for a, b in zip(found, asked.objects, strict=True))
    if len(found) == 1:
        right |= {"size": found[0].size == asked.objects[0].size, "colour": colours, "shape": shapes}
    else:
        right |= {"colours": colours, "shapes": shapes, "relation": relation == asked.relation}
    if striped:
        right["stripes"] = found[0].striped == asked.objects[0].striped
    return right | {"all": all(right.values())}


def matched(reading: Reading, asked: Scene) -> tuple[tuple[Object, ...], str | None]:
    """The reading's objects in the order that agrees best with the caption, and their relation in that order."""
    found, relation = reading.objects, reading.relation
    if relation is not None and _matches(found[::-1], asked.objects) > _matches(found, asked.objects):
        return found[::-1], _INVERSE[relation]
    return found, relation


def _matches(found: Sequence[Object], asked: Sequence[Object]) -> int:
    return sum((a.colour == b.colour) + (a.shape == b.shape) for a, b in zip(found, asked, strict=True))


def score(readings: Sequence[Reading], captions: Sequence[str]) -> Report:
    """The share of pictures that show what their caption asks for, by attribute, with 95 % intervals.

    Raises ValueError for captions that no drawn scene has, and where the counts differ.
    """
    if not readings or len(readings) != len(captions):
        raise ValueError(
            f"one caption for each reading, and at least one: got {len(readings)} readings and {len(captions)} captions"
        )
    rows = [agreement(reading, parse(text)) for reading, text in zip(readings, captions, strict=True)]
    return {
        name: proportion(sum(row[name] for row in rows), len(rows)) for name in ATTRIBUTES[len(readings[0].objects)]
    }
