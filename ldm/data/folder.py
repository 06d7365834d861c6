"""A folder of images with metadata.jsonl: one row {"file_name": …, "text": …, any other columns} for each image."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import stat
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm.config import DataConfig
from ldm.data.sources import DataError, Sample

if TYPE_CHECKING:
    from PIL.Image import Image

METADATA = "metadata.jsonl"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
PIXEL_LIMIT = 89_478_485  # 256 MiB of RGB, Pillow's own threshold; a small file can claim far more
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)  # what Pillow raises on damaged files


@dataclass(frozen=True)
class Row:
    """One line of metadata.jsonl, with the size of its file in bytes."""

    file_name: str
    text: str
    columns: dict[str, Any]
    file_size: int


class FolderSource:
    """Images at their own size with their captions; ``truth`` holds the other columns. Raises DataError.

    A file belongs to validation by a hash of its name, so adding files moves none from one split to the other.
    """

    def __init__(self, data: DataConfig, split: str) -> None:
        if data.image_channels not in (1, 3):
            raise DataError(f"a folder's images are read with 1 or 3 channels: image_channels is {data.image_channels}")
        assert data.folder is not None  # DataConfig requires it
        self.folder, self.channels = Path(data.folder), data.image_channels
        rows = read_rows(self.folder)
        fraction = data.validation_fraction
        self.rows = [row for row in rows if _in_validation(row.file_name, fraction) == (split == "validation")]
        if not self.rows:
            advice = "raise data.validation_fraction" if split == "validation" else "lower data.validation_fraction"
            raise DataError(
                f"{self.folder}: the {split} split is empty, none of {len(rows)} files fell into it"
                f" (validation_fraction {fraction}): {advice} or add images"
            )
        self.length: int | None = len(self.rows)
        facts = sorted([r.file_name, r.text, r.file_size, json.dumps(r.columns, sort_keys=True)] for r in self.rows)
        self.fingerprint = hashlib.sha256(json.dumps([facts, split, self.channels]).encode()).hexdigest()

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self.rows):
            raise IndexError(f"index {index} is outside 0 to {len(self.rows)}")
        row = self.rows[index]
        return Sample(read_image(self.folder / row.file_name, self.channels), row.text, row.columns)

    def captions(self, limit: int) -> list[str] | None:
        """The distinct captions, sorted, or None where there are more than ``limit``."""
        texts = {row.text for row in self.rows}
        return sorted(texts) if len(texts) <= limit else None


def _in_validation(file_name: str, fraction: float) -> bool:
    return int.from_bytes(hashlib.sha256(file_name.encode()).digest()[:8], "big") < fraction * 2**64


def read_rows(folder: Path) -> list[Row]:
    """All rows of the folder's metadata.jsonl, checked. Raises DataError naming the line."""
    path = folder / METADATA
    if not path.is_file():
        raise DataError(_missing(folder))
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}: save it as UTF-8") from None
    rows: list[Row] = []
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _row(folder, line, f"{path}:{number}")
        if row.file_name in first_line:
            raise DataError(f"{path}:{number}: file_name {row.file_name!r} stands on line {first_line[row.file_name]} already")
        first_line[row.file_name] = number
        rows.append(row)
    if not rows:
        raise DataError(f'{path} has no rows: write one {{"file_name": "a.png", "text": "a caption"}} a line')
    return rows


def _row(folder: Path, line: str, where: str) -> Row:
    try:
        columns = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    if not isinstance(columns, dict):
        raise DataError(f'{where}: must be an object like {{"file_name": "a.png", "text": "a caption"}}, got {line.strip()[:80]}')
    for key in ("file_name", "text"):
        if key not in columns:
            raise DataError(f"{where}: no {key}, only {', '.join(columns) or 'an empty object'}")
        if not isinstance(columns[key], str):
            raise DataError(f"{where}: {key} must be text, got {columns[key]!r}")
        if any("\ud800" <= c <= "\udfff" for c in columns[key]):
            raise DataError(f"{where}: {key} holds half of a surrogate pair, which is no text")
    given = columns.pop("file_name")
    name = PurePosixPath(given)  # "./a.png" is "a.png"
    if name.is_absolute() or ".." in name.parts:
        raise DataError(f"{where}: file_name {given!r} leaves the folder: give a path relative to it, without '..'")
    try:
        status = os.stat(folder / name)
    except (OSError, ValueError):  # ValueError: a NUL byte in the name
        raise DataError(f"{where}: no file {given!r} in {folder}") from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{where}: file_name {given!r} is no regular file")
    return Row(str(name), columns.pop("text"), columns, status.st_size)


def _missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"no folder {folder}"
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    near = set(difflib.get_close_matches(METADATA, names, n=3, cutoff=0.6))
    near |= {name for name in names if name.lower().endswith((".jsonl", ".json1", ".ndjson", "metadata.csv", "captions.txt"))}
    hint = f" (found {', '.join(sorted(near)[:5])})" if near else ""
    return f'{folder} has no {METADATA}{hint}: it needs one, with a row {{"file_name": "a.png", "text": "a caption"}} for each image'


def read_image(path: Path, channels: int) -> np.ndarray:
    """One image file upright as uint8 [h, w, channels], transparency on white. Raises DataError naming the file."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the check below refuses it
            opened = Image.open(path, formats=FORMATS)
        with opened:
            width, height = opened.size
            if width * height > PIXEL_LIMIT:
                raise DataError(f"{path}: {width}×{height} is more than {PIXEL_LIMIT} pixels: make it smaller")
            pixels = _eight_bits(ImageOps.exif_transpose(opened), channels, path)
    except Image.DecompressionBombError:
        raise DataError(f"{path}: more than {PIXEL_LIMIT} pixels: make it smaller") from None
    except Image.UnidentifiedImageError:
        raise DataError(f"{path}: no image in one of the formats {', '.join(FORMATS)}") from None
    except DECODE_ERRORS as error:
        raise DataError(f"{path}: cannot be decoded: {' '.join(str(error).split())}") from None
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _eight_bits(image: Image, channels: int, path: Path) -> np.ndarray:
    from PIL import Image

    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip to white
        wide = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise DataError(f"{path}: 32 bits per channel: save it with 8 or 16")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")  # first, because Pillow has no way from every mode to grey
    return np.array(image.convert("L") if channels == 1 else image)
