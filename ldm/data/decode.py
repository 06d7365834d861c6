"""From an image file to upright 8-bit pixels, or one line that says why not."""

from __future__ import annotations

import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from ldm.data.sources import BadSample

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
PIXEL_LIMIT = 89_478_485  # 256 MiB of RGB, Pillow's own threshold; a small file can claim far more
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)  # what Pillow raises on damaged files
WHITE = (255, 255, 255)
ORIENTATION = 0x0112  # the EXIF tag


def read_image(
    path: Path, channels: int, background: tuple[int, int, int] = WHITE, smallest_side: int = 1
) -> UInt8[np.ndarray, "h w {channels}"]:
    """One image file upright with 1 or 3 channels; of an animation, its first frame.

    16 bits are scaled to 8, transparency is laid over ``background``, EXIF orientation is applied; the size is read from
    the header before anything is decoded. Colour profiles are not applied. Raises BadSample.
    """
    from PIL import ImageOps

    opened = _open(path)
    try:
        with opened:
            if min(opened.size) < smallest_side:
                raise BadSample(str(path), f"{opened.width}×{opened.height} is smaller than {smallest_side} pixels")
            pixels = _eight_bits(ImageOps.exif_transpose(opened), channels, background, path)
    except DECODE_ERRORS as error:
        raise BadSample(str(path), f"cannot be decoded: {' '.join(str(error).split())}") from None
    return pixels[..., None] if pixels.ndim == 2 else pixels


@dataclass(frozen=True)
class Header:
    """What a file says of its image: size as stored (before EXIF orientation), Pillow's mode, the format, whether it is turned or moves."""

    width: int
    height: int
    mode: str
    format: str
    turned: bool
    animated: bool


def read_header(path: Path) -> Header:
    """The header, without decoding. Raises BadSample."""
    with _open(path) as opened:
        try:
            told = opened.format != "PNG" or "exif" in opened.info  # else Pillow would decode all of a PNG to look behind it
            turned = told and opened.getexif().get(ORIENTATION, 1) not in (0, 1)
            return Header(opened.width, opened.height, opened.mode, opened.format or "", turned, getattr(opened, "is_animated", False))
        except DECODE_ERRORS as error:
            raise BadSample(str(path), f"cannot be opened: {' '.join(str(error).split())}") from None


def _open(path: Path) -> Image:
    """Open by the header alone, refusing what is no image, of another format, or larger than PIXEL_LIMIT."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below
            opened = Image.open(path, formats=FORMATS)
    except FileNotFoundError:
        raise BadSample(str(path), "no such file") from None
    except Image.DecompressionBombError:
        raise BadSample(str(path), f"more than {PIXEL_LIMIT} pixels: make it smaller") from None
    except Image.UnidentifiedImageError:
        empty = path.stat().st_size == 0
        raise BadSample(str(path), "the file is empty" if empty else f"no image in one of the formats {', '.join(FORMATS)}") from None
    except DECODE_ERRORS as error:
        raise BadSample(str(path), f"cannot be opened: {' '.join(str(error).split())}") from None
    if opened.width * opened.height > PIXEL_LIMIT:
        opened.close()
        raise BadSample(str(path), f"{opened.width}×{opened.height} is more than {PIXEL_LIMIT} pixels: make it smaller")
    return opened


def _eight_bits(image: Image, channels: int, background: tuple[int, int, int], path: Path) -> np.ndarray:
    from PIL import Image

    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip to white
        wide = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise BadSample(str(path), "32 bits per channel: save it with 8 or 16")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    image = image.convert("RGB")  # first, because Pillow has no way from every mode to grey
    return np.array(image.convert("L") if channels == 1 else image)
