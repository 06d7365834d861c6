"""Transforms between images and a network's input: resize, crop, flip, [−1, 1]; image grids."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from ldm.files.tensors.finite import finite


def prepare(
    image: UInt8[np.ndarray, "h w c"],
    size: int | tuple[int, int],
    place: tuple[float, float] = (0.5, 0.5),
    mirror: bool = False,
) -> Float[Tensor, "c s1 s2"]:
    """Resize until ``size`` is just covered, crop to it, mirror, and scale 0…255 to [−1, 1].

    ``size``: the side of a square, or (height, width).
    ``place``: offset of the crop as a share of the (vertical, horizontal) surplus; (½, ½) is the
    centre. ``mirror``: left–right.
    """
    down, across = (size, size) if isinstance(size, int) else size
    height, width = image.shape[:2]
    if height < down or width < across or (height > down and width > across):
        scale = max(down / height, across / width)
        height, width = max(down, round(height * scale)), max(across, round(width * scale))
        picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        resized = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS))
        image = resized.reshape(height, width, image.shape[2])
    surpluses = (height - down, width - across)
    top, left = (min(int(u * (surplus + 1)), surplus) for u, surplus in zip(place, surpluses, strict=True))
    image = image[top : top + down, left : left + across]
    if mirror:
        image = image[:, ::-1]
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def to_uint8(images: Float[Tensor, "b c h w"]) -> UInt8[np.ndarray, "b h w c"]:
    """Scale [−1, 1] to 0…255, clipped and rounded, channels last. Raises NonFiniteError."""
    levels = ((finite(images, "pixels of a picture").float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def to_pil(images: UInt8[np.ndarray, "b h w c"]) -> list[Image.Image]:
    """One- and three-channel arrays as Pillow images.

    Raises ValueError for other channel counts.
    """
    if images.shape[-1] not in (1, 3):
        raise ValueError(f"a picture has 1 or 3 channels, this array has {images.shape[-1]}: take the array itself")
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in images]


GAP = 2  # pixels between the images of a grid


def grid(images: UInt8[np.ndarray, "n h w c"], columns: int) -> UInt8[np.ndarray, "H W c2"]:
    """Images in rows on white; of other channel counts than 1 and 3, the first 3 (or 1)."""
    n, h, w, c = images.shape
    if c not in (1, 3):
        images = images[..., :3] if c > 3 else images[..., :1]
    if images.shape[-1] == 1:
        images = images.repeat(3, axis=-1)
    rows = -(-n // columns)
    sheet = np.full((rows * (h + GAP) - GAP, columns * (w + GAP) - GAP, 3), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (h + GAP), i % columns * (w + GAP)
        sheet[y : y + h, x : x + w] = image
    return sheet
