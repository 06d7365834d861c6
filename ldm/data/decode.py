"""Decoding of image files to upright 8-bit pixels, with one-line errors."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from ldm.data.sample import BadSample
from ldm.data.stored import Stored, stored

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
BEGINNINGS = {b"\xff\xd8": "JPEG", b"\x89PNG": "PNG", b"RIFF": "WEBP", b"GIF8": "GIF", b"BM": "BMP"}
BEGINNINGS |= dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "TIFF")
PIXEL_LIMIT = 89_478_485  # 256 MiB of RGB, Pillow's own limit; a small file can declare far more
WHITE = (255, 255, 255)
ORIENTATION = 0x0112  # the EXIF tag
LONGEST_REASON = 200  # characters of Pillow's message, which may quote the file

logging.getLogger("PIL").addHandler(logging.NullHandler())  # else its log of damaged files goes to the terminal


def read_image(
    path: Path, channels: int, background: tuple[int, int, int] = WHITE, smallest_side: int = 1
) -> UInt8[np.ndarray, "h w {channels}"]:
    """Read an image file upright, with 1 or 3 channels; of an animation, its first frame.

    16 bits are scaled to 8, transparency is composited over ``background``, EXIF orientation is
    applied, colour profiles are not. The size is read from the header before anything is decoded.
    Raises BadSample, whatever is wrong with the file.
    """
    with _open(path) as opened, _named(path, "cannot be decoded"):
        if min(opened.size) < smallest_side:
            raise BadSample(str(path), f"{opened.width}×{opened.height} is smaller than {smallest_side} pixels")
        how = stored(opened)
        if how.refused:
            raise BadSample(str(path), how.refused)
        opened.load()
        pixels = _eight_bits(opened, how, channels, background)
        turn = 1 if opened.format == "TIFF" else _orientation(opened)[0]  # Pillow rotates a TIFF when it loads it
    pixels = np.ascontiguousarray(_upright(pixels, turn))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def too_long(width: int, height: int, size: int) -> str:
    """Reason that an image cannot be resized to a short side of ``size``; empty if it can.

    A long strip of few pixels may grow beyond PIXEL_LIMIT.
    """
    pixels = size * size * max(width, height) // min(width, height)
    if pixels <= PIXEL_LIMIT:
        return ""
    return f"{width}×{height} is so long that it has {pixels} pixels at {size} pixels of height"


@dataclass(frozen=True)
class Header:
    """An image's header: size as stored (before EXIF orientation), Pillow's mode, format, bits.

    ``turned``: EXIF rotates or mirrors it; ``animated``: it has several frames or pages;
    ``profile``: its colour space is not sRGB; ``odd_exif``: its EXIF cannot be read.
    """

    width: int
    height: int
    mode: str
    format: str
    turned: bool
    animated: bool
    bits: int = 8
    profile: bool = False
    odd_exif: bool = False


def read_header(path: Path) -> Header:
    """Read the header of an image file without decoding it. Raises BadSample."""
    with _open(path) as opened, _named(path, "cannot be opened"):
        # Pillow would decode a whole PNG to look for EXIF behind its pixels.
        exif_in_header = opened.format != "PNG" or "exif" in opened.info
        turn, odd = _orientation(opened) if exif_in_header else (1, False)
        how, animated = stored(opened), bool(getattr(opened, "is_animated", False))
        size, kind = opened.size, opened.format or ""
        return Header(*size, opened.mode, kind, turn != 1, animated, how.bits, _has_profile(opened), odd)


@contextmanager
def _named(path: Path, what: str) -> Iterator[None]:
    """Turn any exception of Pillow, which raises many kinds, into a BadSample; hide warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large images, which are refused below, and odd EXIF
            yield
    except BadSample:
        raise
    except Exception as error:
        text = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split())) if error.args else ""
        kind = "" if text and isinstance(error, (OSError, ValueError, SyntaxError)) else f"{type(error).__name__}: "
        raise BadSample(str(path), f"{what}: {kind}{text}"[:LONGEST_REASON].rstrip(": ")) from None


def _open(path: Path) -> ImageFile:
    """Open an image by its header. Raises BadSample for other formats and beyond PIXEL_LIMIT."""
    from PIL import Image

    with _named(path, "cannot be opened"):
        try:
            opened = Image.open(path, formats=FORMATS)
        except FileNotFoundError:
            raise BadSample(str(path), "no such file") from None
        except Image.DecompressionBombError:
            raise BadSample(str(path), f"more than {PIXEL_LIMIT} pixels: make it smaller") from None
        except Image.UnidentifiedImageError:
            raise BadSample(str(path), _unidentified(path)) from None
    if opened.width * opened.height > PIXEL_LIMIT:
        opened.close()
        raise BadSample(str(path), f"{opened.width}×{opened.height} is more than {PIXEL_LIMIT} pixels: make it smaller")
    return opened


def _unidentified(path: Path) -> str:
    with path.open("rb") as file:
        beginning = file.read(4)
    if not beginning:
        return "the file is empty"
    kind = next((kind for start, kind in BEGINNINGS.items() if beginning.startswith(start)), None)
    if kind:
        return (
            f"a {kind} whose header is damaged, or of a kind that is not read: save it again, with 8 bits per channel"
        )
    return f"not an image in one of the formats {', '.join(FORMATS)}"


def _has_profile(opened: ImageFile) -> bool:
    """True if the file declares colours other than sRGB; they are read as sRGB."""
    profile = opened.info.get("icc_profile")
    if isinstance(profile, bytes) and profile:
        return b"sRGB" not in profile and "sRGB".encode("utf-16-be") not in profile
    gamma = opened.info.get("gamma", 1 / 2.2)
    return "srgb" not in opened.info and not (isinstance(gamma, (int, float)) and 0.44 < gamma < 0.47)


def _orientation(opened: ImageFile) -> tuple[int, bool]:
    """EXIF orientation, 1 to 8 (1: upright), and True if there is EXIF that cannot be read.

    Reads this one tag alone: others may be of types that Pillow cannot write back.
    """
    from PIL import Image

    odd = False
    try:
        # A second time: Pillow has looked for the resolution already, and would not fail again.
        Image.Exif().load(opened.info.get("exif", b""))
    except Exception:  # a viewer shows the image anyway
        odd = True
    try:
        value = opened.getexif().get(ORIENTATION, 1)  # that of XMP if EXIF has none
    except Exception:
        return 1, True
    return (value if isinstance(value, int) and 1 <= value <= 8 else 1), odd


def _upright(pixels: np.ndarray, turn: int) -> np.ndarray:
    """Undo EXIF orientation ``turn`` on [h, w, …]: 5 to 8 swap rows and columns."""
    if turn >= 5:
        pixels = pixels.swapaxes(0, 1)
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if turn in (2, 3, 6, 7) else pixels


def _eight_bits(image: Image, how: Stored, channels: int, background: tuple[int, int, int]) -> np.ndarray:
    """Pixels of a loaded image, uint8 [h, w] or [h, w, 3]."""
    from PIL import Image

    transparent = image.has_transparency_data
    # Grey levels that Pillow would clip, leave negative, or compare with a key of another depth.
    if how.scaled or how.key is not None:
        values = np.asarray(image).astype(np.int64)
        grey = Image.fromarray(((values * 255 + how.white // 2) // how.white).astype(np.uint8))
        if how.negative:
            grey = grey.point([255 - v for v in range(256)])
        if transparent := how.key is not None:
            grey.putalpha(Image.fromarray(np.where(values == how.key, 0, 255).astype(np.uint8)))
        image = grey
    if transparent:
        if image.mode == "La":  # Pillow converts it to RGBA only by way of LA
            image = image.convert("LA")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    image = image.convert("RGB")  # first, because Pillow cannot convert every mode to grey
    return np.array(image.convert("L") if channels == 1 else image)
