"""Storage of pixels that Pillow does not show: bits, negatives, transparent grey."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

# TIFF tags
BITS, PHOTOMETRIC, PLANAR, SUBSAMPLING, REFERENCE, SAMPLE_FORMAT = 258, 262, 284, 530, 532, 339
WHITE_IS_ZERO = 0
FULL_RANGE = (0, 255, 128, 255, 128, 255)  # of Y, Cb and Cr
WITH_8_OR_16 = "save it with 8 or 16 bits without a sign"


@dataclass(frozen=True)
class Stored:
    """Storage of an image's samples, read from its header.

    Attributes:
        bits: per sample.
        white: Pillow's pixel value of white.
        key: Pillow's pixel value of the one transparent grey.
        negative: True if white is stored as 0 and Pillow leaves it so.
        refused: reason that Pillow's pixels would be wrong.
    """

    bits: int = 8
    white: int = 255
    key: int | None = None
    negative: bool = False
    refused: str = ""

    @property
    def scaled(self) -> bool:
        """True if the values need scaling to 8 bits."""
        return self.white != 255


def stored(opened: ImageFile) -> Stored:
    """Storage of an image that is opened but not loaded."""
    if opened.format == "TIFF":
        return _tiff(opened)
    if opened.format == "PNG":
        return _png(opened)
    if opened.mode == "CMYK" and "adobe" not in opened.info:
        reason = "CMYK without Adobe's marker, which says whether the inks are stored inverted: save it as RGB"
        return Stored(refused=reason)
    return Stored()


def _png(opened: ImageFile) -> Stored:
    raw, key = str(opened.tile[0].args), opened.info.get("transparency")  # such as L;4 and I;16B
    bits = 16 if ";16" in raw else 1 if opened.mode == "1" else int(raw.partition(";")[2] or 8)
    if opened.mode == "RGB" and key is not None and bits == 16:
        return Stored(bits, refused="16 bits per channel and one transparent colour: save it with an alpha channel")
    if opened.mode not in ("1", "L", "I;16"):
        return Stored(bits)
    white = {"1": 1, "L": 255, "I;16": 65535}[opened.mode]
    levels = 2**bits - 1
    grey = (key & levels) * white // levels if isinstance(key, int) else None  # the lowest bits of the key count
    return Stored(bits, white, grey)


def _tiff(opened: ImageFile) -> Stored:
    tags: Any = opened.tag_v2  # type: ignore[attr-defined]
    bits, negative = int(tags.get(BITS, (1,))[0]), tags.get(PHOTOMETRIC) == WHITE_IS_ZERO
    if set(tags.get(SAMPLE_FORMAT, (1,))) != {1} or opened.mode in ("I", "F"):
        kind = f"{bits} bits per channel" if bits > 16 else "samples with a sign, or of an unknown kind"
        return Stored(bits, refused=f"{kind}: {WITH_8_OR_16}")
    if tags.get(PLANAR, 1) == 2 and bits != 8 and len(tags.get(BITS, (1,))) > 1:
        return Stored(bits, refused=f"{bits} bits per channel in separate planes: save it with interleaved channels")
    if opened.mode == "YCbCr" and (_subsampled(opened, tags) or tuple(tags.get(REFERENCE, FULL_RANGE)) != FULL_RANGE):
        return Stored(bits, refused="YCbCr that is subsampled or of a limited range: save it as RGB")
    if opened.mode.startswith("I;16"):
        return Stored(bits, 2**bits - 1, negative=negative)
    return Stored(bits)


def _subsampled(opened: ImageFile, tags: Any) -> bool:
    """True for subsampled colours that Pillow, unlike libtiff, unpacks incorrectly."""
    return opened.tile[0].codec_name == "raw" and tuple(tags.get(SUBSAMPLING, (2, 2))) != (1, 1)
