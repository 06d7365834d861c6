"""Two-coloured patterns drawn on demand, of any size: for autoencoders and speed tests."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ldm.config import DataConfig
from ldm.data.rng import generator
from ldm.data.sample import Sample, Skipped
from ldm.data.shapes import COLOURS, EPOCH, OFFSETS
from ldm.errors import DataError

VERSION = 1  # raise it whenever the same index would give another sample: it is part of the key of a cache
KINDS = ("stripes", "checks", "noise", "gradient")
SHORTEST_PERIOD = 4.0  # pixels; finer patterns would alias


@dataclass(frozen=True)
class Texture:
    """A two-coloured pattern; ``period`` in pixels, ``angle`` in radians, ``phase`` in periods."""

    kind: str
    first: str
    second: str
    period: float
    angle: float
    phase: float


COMBINATIONS = tuple((kind, *pair) for kind in KINDS for pair in itertools.combinations(COLOURS, 2))


def _caption(kind: str, first: str, second: str) -> str:
    return f"{first} and {second} {kind}"


def _mixture(texture: Texture, side: int, rng: np.random.Generator) -> np.ndarray:
    """Share of the second colour, [side, side] in [0, 1]."""
    middle = (np.arange(side) - (side - 1) / 2) / texture.period
    x, y = np.meshgrid(middle, middle)
    along = np.cos(texture.angle) * x + np.sin(texture.angle) * y
    across = np.cos(texture.angle) * y - np.sin(texture.angle) * x
    sharpness = texture.period / 3  # a wave of slope 2π per period, steepened to edges about one pixel wide
    if texture.kind == "gradient":
        return 0.5 + 0.5 * along / max(1e-6, float(abs(along).max()))
    if texture.kind == "noise":
        frequency = np.hypot(*np.meshgrid(np.fft.rfftfreq(side), np.fft.fftfreq(side)))
        spectrum = np.fft.rfft2(rng.standard_normal((side, side)))
        smooth = np.fft.irfft2(spectrum * np.exp(-((frequency * texture.period) ** 2)), s=(side, side))
        return 0.5 + 0.5 * np.tanh((smooth - smooth.mean()) / max(1e-6, float(smooth.std())))
    wave = np.sin(2 * np.pi * (along + texture.phase))
    if texture.kind == "checks":
        wave = wave * np.sin(2 * np.pi * (across + texture.phase))
    return 0.5 + 0.5 * np.tanh(sharpness * wave)


class TexturesSource:
    """Patterns by index, of side ``data.image_size``; ``truth`` is the Texture.

    Raises DataError.
    """

    def __init__(self, data: DataConfig, split: str) -> None:
        if data.image_channels != 3:
            raise DataError(f"textures are drawn in colour: image_channels must be 3, got {data.image_channels}")
        self.side = data.image_size
        self.skipped: tuple[Skipped, ...] = ()
        self.length: int | None = data.size if split == "train" else EPOCH
        self._offset = OFFSETS[split]
        facts = [VERSION, COLOURS, KINDS, self.side, split, self.length]
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def __getitem__(self, index: int) -> Sample:
        if index < 0 or (self.length is not None and index >= self.length):
            raise IndexError(f"index {index} is outside 0 to {self.length}")
        rng = generator(0, "textures", self._offset + index)  # not the run's seed: the data set is fixed
        kind, first, second = COMBINATIONS[int(rng.integers(len(COMBINATIONS)))]
        longest = max(SHORTEST_PERIOD, self.side / 2)
        period = SHORTEST_PERIOD * (longest / SHORTEST_PERIOD) ** float(rng.random())  # log-uniform
        texture = Texture(kind, first, second, period, float(rng.uniform(0, 2 * np.pi)), float(rng.random()))
        share = _mixture(texture, self.side, rng)[..., None]
        image = (1 - share) * np.array(COLOURS[first]) + share * np.array(COLOURS[second])
        return Sample(np.rint(image).astype(np.uint8), _caption(kind, first, second), texture)

    def text(self, index: int) -> str:
        """The caption of a pattern."""
        return self[index].text

    def columns(self, index: int) -> dict[str, Any]:
        """The fields of the Texture."""
        return asdict(self[index].truth)

    def captions(self, limit: int) -> list[str] | None:
        """All captions, sorted, or None if there are more than ``limit``."""
        return sorted(_caption(*c) for c in COMBINATIONS) if len(COMBINATIONS) <= limit else None
