"""scikit-learn's 1,797 handwritten digits of 8×8 pixels, enlarged and captioned."""

from __future__ import annotations

import hashlib
import json

import numpy as np

from ldm.config import DataConfig
from ldm.data.sample import Sample, Skipped
from ldm.errors import DataError

VERSION = 1  # raise it whenever the same index would give another sample: it is part of the key of a cache
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VALIDATION_EVERY = 5


def load() -> tuple[np.ndarray, np.ndarray]:
    """All digits, float32 [1797, 8, 8] from 0 (paper) to 16 (ink), and their labels.

    Raises DataError.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        message = "source digits needs scikit-learn: pip install scikit-learn (it is in the extra `digits`)"
        raise DataError(message) from None
    bunch = load_digits()
    return bunch.images.astype(np.float32), bunch.target.astype(int)  # type: ignore[attr-defined]


class DigitsSource:
    """Bright digits on black, captioned "a handwritten digit seven"; ``truth`` is the digit.

    Every fifth is for validation, the others for training; both sets are finite. Raises DataError.
    """

    def __init__(self, data: DataConfig, split: str) -> None:
        if data.image_channels not in (1, 3):
            raise DataError(f"digits have 1 or 3 channels: image_channels is {data.image_channels}")
        if data.image_size < 8:
            raise DataError(f"digits are 8 pixels wide and only enlarged: image_size is {data.image_size}")
        images, labels = load()
        chosen = (np.arange(len(labels)) % VALIDATION_EVERY == 0) == (split == "validation")
        self._images, self._labels = images[chosen], labels[chosen]
        self.side, self.channels = data.image_size, data.image_channels
        self.skipped: tuple[Skipped, ...] = ()
        self.length: int | None = len(self._labels)
        digest = hashlib.sha256(json.dumps([VERSION, self.side, self.channels, split]).encode())
        digest.update(self._images.tobytes() + self._labels.astype(np.int64).tobytes())
        self.fingerprint = digest.hexdigest()

    def __getitem__(self, index: int) -> Sample:
        from PIL import Image

        if not 0 <= index < len(self._labels):
            raise IndexError(f"index {index} is outside 0 to {len(self._labels)}")
        enlarged = Image.fromarray(self._images[index]).resize((self.side, self.side), Image.Resampling.BICUBIC)
        pixels = np.rint(np.asarray(enlarged) * (255 / 16)).clip(0, 255).astype(np.uint8)  # bicubic overshoots
        digit = int(self._labels[index])
        return Sample(np.repeat(pixels[..., None], self.channels, axis=2), caption(digit), digit)

    def text(self, index: int) -> str:
        """The caption of a sample."""
        return caption(int(self._labels[index]))

    def columns(self, index: int) -> dict[str, int]:
        """The ``digit``."""
        return {"digit": int(self._labels[index])}

    def captions(self, limit: int) -> list[str] | None:
        """The ten captions, sorted, or None if ``limit`` is below ten."""
        return sorted(caption(digit) for digit in range(10)) if limit >= 10 else None


def caption(digit: int) -> str:
    """The caption of a digit, 0 to 9."""
    return f"a handwritten digit {NAMES[digit]}"
