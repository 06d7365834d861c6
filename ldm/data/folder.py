"""A folder of images as a source; captions.py finds their captions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ldm.config import DataConfig
from ldm.data.captions import read_rows
from ldm.data.decode import read_image, too_long
from ldm.data.sample import BadSample, Sample, check_share
from ldm.errors import DataError


class FolderSource:
    """Captioned images of a folder at their own size; ``truth`` holds the other columns.

    A hash of its name assigns a file to a split, so adding files moves no other. Unusable rows and
    files are in ``skipped``; one that only fails to decode is a BadSample when it is read. Raises
    DataError.
    """

    def __init__(self, data: DataConfig, split: str) -> None:
        if data.image_channels not in (1, 3):
            raise DataError(f"a folder's images are read with 1 or 3 channels: image_channels is {data.image_channels}")
        self.data, self.folder = data, Path(data.folder or "")
        rows, skipped = read_rows(data)
        self.skipped = tuple(skipped)
        if skipped:
            check_share(len(skipped), len(rows) + len(skipped), data, skipped[0])
        fraction = data.validation_fraction
        self.rows = [row for row in rows if in_validation(row.file_name, fraction) == (split == "validation")]
        if not self.rows:
            works = working_fraction([row.file_name for row in rows])
            advice = "add images" if works is None else f"set data.validation_fraction={works:g}, or add images"
            raise DataError(
                f"{self.folder}: the {split} split is empty, none of {len(rows)} files fell into it"
                f" (validation_fraction {fraction:g}): {advice}"
            )
        self.length: int | None = len(self.rows)
        facts = sorted([r.file_name, r.text, r.file_size, json.dumps(r.columns, sort_keys=True)] for r in self.rows)
        reading = [data.image_channels, list(data.background), data.smallest_side]
        self.fingerprint = hashlib.sha256(json.dumps([facts, split, reading]).encode()).hexdigest()

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self.rows):
            raise IndexError(f"index {index} is outside 0 to {len(self.rows)}")
        row, data = self.rows[index], self.data
        file = self.folder / row.file_name
        image = read_image(file, data.image_channels, data.background, data.smallest_side)
        if problem := too_long(image.shape[1], image.shape[0], data.image_size):
            raise BadSample(str(file), problem)
        return Sample(image, row.text, row.columns)

    def text(self, index: int) -> str:
        """The caption of an image; the image is not read."""
        return self.rows[index].text

    def columns(self, index: int) -> Mapping[str, Any]:
        """The other columns of a row of the metadata, or `class`, where captions are made of folder names."""
        return self.rows[index].columns

    def captions(self, limit: int) -> list[str] | None:
        """The distinct captions, sorted, or None if there are more than ``limit``."""
        texts = {row.text for row in self.rows}
        return sorted(texts) if len(texts) <= limit else None


def in_validation(file_name: str, fraction: float) -> bool:
    """True if a file belongs to the validation split."""
    return _place(file_name) < fraction * 2**64


def working_fraction(file_names: Iterable[str]) -> float | None:
    """Smallest validation share, of two decimals if possible, that fills both splits, or None."""
    places = sorted(map(_place, file_names))
    for digits in range(2, 17):
        fraction = (places[0] * 10**digits // 2**64 + 1) / 10**digits
        if fraction <= 0.5 and places[0] < fraction * 2**64 <= places[-1]:
            return fraction
    return None


def _place(file_name: str) -> int:
    """Hash of a file's name, a number below 2⁶⁴."""
    return int.from_bytes(hashlib.sha256(file_name.encode()).digest()[:8], "big")
