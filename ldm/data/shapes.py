"""Captioned scenes of one or two coloured shapes, drawn on demand, with known ground truth."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from ldm.config import DataConfig
from ldm.data.rng import generator
from ldm.data.sample import Sample, Skipped
from ldm.errors import DataError

VERSION = 2  # raise it whenever the same index would give another sample: it is part of the key of a cache
RGB = tuple[int, int, int]
# The closest two of these 14 colours (white and beige) are 117 apart; the cube's diagonal is 442.
COLOURS: dict[str, RGB] = {
    "red": (210, 10, 45),
    "green": (20, 170, 55),
    "blue": (45, 100, 255),
    "yellow": (242, 240, 0),
    "orange": (255, 122, 0),
    "purple": (136, 15, 205),
    "cyan": (15, 228, 235),
    "pink": (255, 95, 205),
}
BACKGROUNDS: dict[str, RGB] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "navy": (15, 28, 122),
    "brown": (105, 68, 15),
    "beige": (245, 205, 150),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# Radii as shares of the side; None: each of two objects.
RADII: dict[str | None, float] = {"small": 9.5 / 32, "large": 12.5 / 32, None: 7 / 48}
OFF_CENTRE = 1 / 8  # of the side: largest offset of a single object from the centre of the canvas, along either axis
SIZES = ("small", "large")
RADIUS_RANGE = (0.22, 0.4)  # of radii that are a number, as shares of the side
RADIUS_GAP = (0.29, 0.33)  # radii of that range that are held out
# Direction (x, y) from the first object to the second.
RELATIONS: dict[str, tuple[int, int]] = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}
SMALLEST_SIDE = 24
EPOCH = 2**20  # length of the splits other than training
OFFSETS = {"train": 0, "validation": 2**40, "held_out": 2**41}  # positions of the stream, disjoint


@dataclass(frozen=True)
class Object:
    """One shape, centred on pixel (x, y).

    ``size`` is None if its caption names none. ``radius``: a share of the side, in the place of a
    size; the caption then says nothing of stripes either.
    """

    size: str | None
    colour: str
    shape: str
    x: int = 0
    y: int = 0
    striped: bool = False
    radius: float | None = None

    def reach(self, side: int) -> float:
        """The radius in pixels."""
        return (RADII[self.size] if self.radius is None else self.radius) * side


@dataclass(frozen=True)
class Scene:
    """Contents of an image: one object, or two with the relation of the first to the second."""

    background: str
    objects: tuple[Object, ...]
    relation: str | None = None


def caption(scene: Scene) -> str:
    """The one English sentence of a scene."""
    names = []
    if len(scene.objects) == 1 and scene.objects[0].striped and scene.objects[0].radius is None:
        o = scene.objects[0]
        # Short: the demo's text encoder reads 12 tokens, and `striped` takes four of them.
        return f"a {o.size} striped {o.colour} {o.shape} on {scene.background}"
    for o in scene.objects:
        name = f"{o.size} {o.colour} {o.shape}" if o.size else f"{o.colour} {o.shape}"
        names.append(("an " if name[0] in "aeiou" else "a ") + name)
    return f" {scene.relation} ".join(names) + f" on a {scene.background} background"


def _one(words: tuple[str, ...] | dict[str, tuple[int, ...]]) -> str:
    return f"({'|'.join(words)})"


_THING = rf"an? {_one(COLOURS)} {_one(SHAPES)}"
_PLAIN = re.compile(rf"{_THING} on a {_one(BACKGROUNDS)} background")
_SINGLE = re.compile(rf"a {_one(SIZES)} {_one(COLOURS)} {_one(SHAPES)} on a {_one(BACKGROUNDS)} background")
_STRIPED = re.compile(rf"a {_one(SIZES)} striped {_one(COLOURS)} {_one(SHAPES)} on {_one(BACKGROUNDS)}")
_DOUBLE = re.compile(rf"{_THING} {_one(RELATIONS)} {_THING} on a {_one(BACKGROUNDS)} background")


def parse(text: str) -> Scene:
    """The scene of a caption, with positions 0.

    Raises ValueError for text that ``caption`` does not write.
    """
    scene = None
    if match := _SINGLE.fullmatch(text):
        size, colour, shape, background = match.groups()
        scene = Scene(background, (Object(size, colour, shape),))
    elif match := _PLAIN.fullmatch(text):
        colour, shape, background = match.groups()
        scene = Scene(background, (Object(None, colour, shape),))
    elif match := _STRIPED.fullmatch(text):
        size, colour, shape, background = match.groups()
        scene = Scene(background, (Object(size, colour, shape, striped=True),))
    elif match := _DOUBLE.fullmatch(text):
        colour_1, shape_1, relation, colour_2, shape_2, background = match.groups()
        scene = Scene(background, (Object(None, colour_1, shape_1), Object(None, colour_2, shape_2)), relation)
    if scene is None or caption(scene) != text:
        example = "a small red circle on a white background"
        raise ValueError(f"{text!r} is not a caption of a drawn scene, such as {example!r}")
    return scene


def inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mask of the points inside a shape with bounding box [−1, 1]; y points down."""
    radius = np.hypot(x, y)
    if shape == "circle":
        return radius <= 1
    if shape == "ring":
        return (radius <= 1) & (radius >= 0.5)
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.9  # a full one would look larger than the circle
    if shape == "cross":
        return (np.maximum(abs(x), abs(y)) <= 1) & (np.minimum(abs(x), abs(y)) <= 0.36)
    if shape == "triangle":
        height = math.sqrt(3) / 2  # equilateral, half its height at y = 0
        return (y <= height) & (abs(x) <= (y + height) / (2 * height))
    if shape != "star":
        raise ValueError(f"unknown shape {shape!r}: known are {', '.join(SHAPES)}")
    outer = 1 / math.sin(0.4 * math.pi)  # five points, the widest pair at ±1, half its height at y = 0
    y = y - outer * (1 - math.cos(0.2 * math.pi)) / 2
    # Fold into one tenth of the star: from the axis through a point (angle 0) to the notch beside it (36°).
    radius, angle = np.hypot(x, y), np.arctan2(x, -y) % (0.4 * math.pi)
    angle = np.minimum(angle, 0.4 * math.pi - angle)
    inner = 0.45 * outer
    notch = inner * math.sin(0.2 * math.pi), inner * math.cos(0.2 * math.pi)
    across, along = radius * np.sin(angle), radius * np.cos(angle)
    return across * (outer - notch[1]) <= (outer - along) * notch[0]


STRIPE = 1 / 8  # of the side: height of a stripe, and of the gap between two stripes


@lru_cache(maxsize=256)
def coverage(shape: str, radius: float, stripe: float | None = None) -> np.ndarray:
    """Coverage of each pixel by a shape: float32 [2h+1, 2h+1] in [0, 1], with h = ceil(radius − ½).

    The shape is centred on pixel (h, h). ``stripe``: height of horizontal stripes in pixels, one of
    them across the centre; None: no stripes.
    """
    half, fine = math.ceil(radius - 0.5), 8
    points = ((np.arange((2 * half + 1) * fine) + 0.5) / fine - half - 0.5) / radius
    covered = inside(shape, points[None, :], points[:, None])
    if stripe is not None:
        covered = covered & (np.floor(points * radius / stripe + 0.5) % 2 == 0)[:, None]
    mask = covered.reshape(2 * half + 1, fine, 2 * half + 1, fine).mean((1, 3), dtype=np.float32)
    mask.flags.writeable = False  # shared by all callers
    return mask


def draw(scene: Scene, side: int) -> np.ndarray:
    """Antialiased image, uint8 [side, side, 3].

    Raises ValueError if an object leaves the canvas.
    """
    image = np.empty((side, side, 3), dtype=np.float32)
    image[:] = BACKGROUNDS[scene.background]
    for o in scene.objects:
        mask = coverage(o.shape, o.reach(side), STRIPE * side if o.striped else None)[..., None]
        half = mask.shape[0] // 2
        if min(o.x, o.y) < half or max(o.x, o.y) >= side - half:
            raise ValueError(f"the {o.shape} at ({o.x}, {o.y}) leaves the canvas of {side} pixels")
        patch = image[o.y - half : o.y + half + 1, o.x - half : o.x + half + 1]
        patch += mask * (np.array(COLOURS[o.colour], dtype=np.float32) - patch)
    return np.rint(image).astype(np.uint8)


def margin(thing: Object, side: int) -> int:
    """Smallest coordinate of an object wholly on the canvas; the largest is side − 1 − margin."""
    return math.ceil(thing.reach(side) - 0.5)


# Held out: one value in seven of a weighted sum of the attributes' indices. 7 is prime and the weights are not
# multiples of it. So with all attributes but one fixed, at most every seventh value of that one is held out, and
# every pair of attribute values stays in training.
Look = tuple[str, str]  # colour, shape


def _held_out_single(colour: str, shape: str, background: str) -> bool:
    c, s, b = list(COLOURS).index(colour), SHAPES.index(shape), list(BACKGROUNDS).index(background)
    return (c + 2 * s + 3 * b) % 7 == 0


def _held_out_pair(first: Look, second: Look) -> bool:
    """True if a pair is held out. Symmetric: A left of B shows the same as B right of A."""
    return sum(list(COLOURS).index(c) + 2 * SHAPES.index(s) for c, s in (first, second)) % 7 == 0


@lru_cache
def looks(held_out: bool) -> tuple[Scene, ...]:
    """Scenes of one object without size, of the same combinations."""
    found = {}
    for scene in combinations(1, held_out):
        thing = replace(scene.objects[0], size=None)
        found[scene.background, thing] = Scene(scene.background, (thing,))
    return tuple(found.values())


@lru_cache
def combinations(objects: int, held_out: bool) -> tuple[Scene, ...]:
    """All scenes, without positions, that are held out, or that training and validation share."""
    looks = tuple(itertools.product(COLOURS, SHAPES))
    if objects == 1:
        return tuple(
            Scene(background, (Object(size, colour, shape),))
            for (colour, shape), background, size in itertools.product(looks, BACKGROUNDS, SIZES)
            if _held_out_single(colour, shape, background) == held_out
        )
    things = {look: Object(None, *look) for look in looks}
    return tuple(
        Scene(background, pair, relation)
        for first, second in itertools.product(looks, looks)
        if first[0] != second[0] and _held_out_pair(first, second) == held_out
        for pair in [(things[first], things[second])]
        for background, relation in itertools.product(BACKGROUNDS, RELATIONS)
    )


def place(scene: Scene, side: int, rng: np.random.Generator) -> Scene:
    """Draw positions: one object near the centre, two apart along the relation's axis."""
    low = margin(scene.objects[0], side)
    high = side - 1 - low
    if len(scene.objects) == 1:
        first = max(low, math.ceil((side - 1) / 2 - OFF_CENTRE * side))
        x, y = (int(v) for v in rng.integers(first, side - first, 2))
        return Scene(scene.background, (_at(scene.objects[0], x, y),))
    assert scene.relation is not None
    step = RELATIONS[scene.relation]
    apart = int(rng.integers(2 * low + 2, high - low + 1))  # distance along the axis; the shapes never touch
    aside = int(rng.integers(-(apart // 3), apart // 3 + 1))  # offset across it: at most a third of that
    along_1 = int(rng.integers(low, high - apart + 1))
    across_1 = int(rng.integers(low + max(0, -aside), high - max(0, aside) + 1))
    near, far = (along_1, across_1), (along_1 + apart, across_1 + aside)
    if sum(step) < 0:
        near, far = far, near
    if step[0] == 0:
        near, far = near[::-1], far[::-1]
    return Scene(scene.background, (_at(scene.objects[0], *near), _at(scene.objects[1], *far)), scene.relation)


def _sized(scene: Scene, rng: np.random.Generator, everywhere: bool) -> Scene:
    """The scene with a radius, in RADIUS_GAP only if ``everywhere``, and striped in every second case, on average."""
    (low, high), (begin, end) = RADIUS_RANGE, RADIUS_GAP
    radius = low + float(rng.random()) * (high - low - (0 if everywhere else end - begin))
    if not everywhere and radius >= begin:
        radius += end - begin
    return Scene(
        scene.background, (replace(scene.objects[0], radius=round(radius, 4), striped=bool(rng.random() < 0.5)),)
    )


def stripe(scene: Scene) -> Scene:
    """The scene with every object striped."""
    return replace(scene, objects=tuple(replace(o, striped=True) for o in scene.objects))


def _at(o: Object, x: int, y: int) -> Object:
    return replace(o, x=x, y=y)


class ShapesSource:
    """Scenes by index, of side ``data.image_size``, with 1 or 2 ``objects``. Raises DataError.

    ``striped``: half of the scenes, on average, have striped objects, and their captions say so.
    ``sized``: that, with a number as radius, and both are columns of which the captions say
    nothing. Radii in RADIUS_GAP are in the held-out split only.
    """

    def __init__(self, data: DataConfig, split: str, objects: int, striped: bool = False, sized: bool = False) -> None:
        if data.image_channels != 3:
            raise DataError(f"{data.source} are drawn in colour: image_channels must be 3, got {data.image_channels}")
        if data.image_size < SMALLEST_SIDE:
            raise DataError(
                f"{data.source} cannot be distinguished below {SMALLEST_SIDE} pixels: image_size is {data.image_size}"
            )
        self.side, self.objects = data.image_size, objects
        self.skipped: tuple[Skipped, ...] = ()
        self.length: int | None = data.size if split == "train" else EPOCH
        self._offset = OFFSETS[split]
        self._combinations = combinations(objects, split == "held_out")
        self._name = f"shapes-{objects}"
        if striped:
            self._combinations += tuple(stripe(scene) for scene in self._combinations)
            self._name += "-striped"
        facts = [VERSION, COLOURS, BACKGROUNDS, SHAPES, RADII["small"], RADII["large"], RADII[None], OFF_CENTRE]
        facts += [self.side, objects, split, self.length] + ([STRIPE] if striped else [])
        self._sized, self._held_out = sized, split == "held_out"
        if sized:
            self._combinations, self._name = looks(self._held_out), "shapes-columns"
            facts += [STRIPE, RADIUS_RANGE, RADIUS_GAP, "columns"]
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def __getitem__(self, index: int) -> Sample:
        scene = self._scene(index)
        return Sample(draw(scene, self.side), caption(scene), scene)

    def _scene(self, index: int) -> Scene:
        if index < 0 or (self.length is not None and index >= self.length):
            raise IndexError(f"index {index} is outside 0 to {self.length}")
        rng = generator(0, self._name, self._offset + index)  # not the run's seed: the data set is fixed
        scene = self._combinations[int(rng.integers(len(self._combinations)))]
        return place(_sized(scene, rng, self._held_out) if self._sized else scene, self.side, rng)

    def text(self, index: int) -> str:
        """The caption of a scene, which is not drawn."""
        return caption(self._scene(index))

    def columns(self, index: int) -> dict[str, Any]:
        """The scene's background and relation, and what its objects are; of the second with `2` after each name."""
        scene = self._scene(index)
        found: dict[str, Any] = {"background": scene.background, "relation": scene.relation}
        for number, thing in zip(("", "2"), scene.objects, strict=False):
            found |= {f"{name}{number}": value for name, value in asdict(thing).items()}
        return {name: value for name, value in found.items() if value is not None}

    def captions(self, limit: int) -> list[str] | None:
        """All captions of this split, sorted, or None if there are more than ``limit``."""
        if len(self._combinations) > limit:
            return None
        return sorted(caption(scene) for scene in self._combinations)
