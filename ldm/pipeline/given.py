"""An image that a call starts from, with or without a mask: read, checked, and brought to the size that is drawn."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from autoencoder.config import shown
from ldm.config import ConfigError, SampleConfig
from ldm.data.decode import read_image, too_long
from ldm.data.sample import BadSample
from ldm.data.transforms import prepare
from ldm.diffusion.completion import Known
from ldm.diffusion.samplers.registry import SAMPLERS
from ldm.pipeline.codec import LatentCodec, cells, masked_condition

STRENGTH = 0.8  # of an image without a mask, where none is given; diffusers' too
HALF = 128  # the grey from which a mask's pixel is to be drawn


@dataclass(frozen=True)
class Given:
    """Images that pictures start from.

    Attributes:
        images: in [−1, 1], one for all pictures or one for each.
        masks: likewise, 1 where a picture is drawn and 0 where it is kept; None: no mask.
    """

    images: Float[Tensor, "n C H W"]
    masks: Float[Tensor, "m 1 H W"] | None = None

    def of(self, places: Sequence[int]) -> Given:
        """The images of the pictures at these places of a call."""
        several = torch.as_tensor(places)

        def chosen(tensor: Tensor) -> Tensor:
            return tensor[several if len(tensor) > 1 else torch.zeros_like(several)]

        return Given(chosen(self.images), None if self.masks is None else chosen(self.masks))

    def extended(self, left: int, top: int, right: int, bottom: int) -> Given:
        """On a larger canvas, whose new part repeats the edges and is to be drawn."""
        sides = (left, right, top, bottom)
        masks = torch.zeros_like(self.images[:1, :1]) if self.masks is None else self.masks
        return Given(pad(self.images, sides, mode="replicate"), pad(masks, sides, value=1.0))

    def known(self, codec: LatentCodec | None, device: torch.device, strips: int | None = None) -> Known:
        """The images as they are diffused; a latent is drawn if any pixel of its cell is."""
        images = self.images.to(device)
        x0 = images if codec is None else codec.encode(images, strips)
        masks = torch.ones_like(images[:, :1]) if self.masks is None else self.masks.to(device)
        return Known(x0, cells(masks, x0))

    def condition(self, codec: LatentCodec | None, device: torch.device, strips: int | None) -> Tensor | None:
        """The further channels of a model that was trained to fill masks; None without a mask."""
        if self.masks is None:
            return None
        return masked_condition(codec, self.images.to(device), self.masks.to(device), strips)

    def pasted(self, drawn: Float[Tensor, "b C H W"]) -> Float[Tensor, "b C H W"]:
        """The pictures with the known pixels of their images."""
        if self.masks is None:
            return drawn
        return torch.lerp(self.images.to(drawn), drawn, self.masks.to(drawn))


def read_given(
    image: Any,
    mask: Any,
    sides: tuple[int, int],
    channels: int,
    count: int,
    extend: tuple[int, int, int, int] | None = None,
    stacklevel: int = 1,
) -> Given | None:
    """The image and the mask of a call: each a file, a picture, an array uint8 [h, w, c], or one of these per picture.

    What has another size is resized until it covers ``sides`` and cut to its middle, with a warning
    naming ``image``. ``extend``: pixels added beyond left, top, right and bottom, all of them to be
    drawn. Raises ConfigError.
    """
    if image is None:
        if mask is not None:
            raise ConfigError("mask is for an image: give image, or leave mask out")
        return None
    arrays = _arrays(image, "image", channels, count)
    images = [prepare(one, sides) for one in arrays]
    if resized := {one.shape[:2] for one in arrays} - {sides}:
        (height, width), *_ = sorted(resized)
        warnings.warn(
            f"image of {height}×{width} pixels is resized and cut to {sides[0]}×{sides[1]} (height × width): give"
            " size for another",
            stacklevel=stacklevel + 1,
        )
    masks = None
    if mask is not None:
        masks = torch.stack(
            [(prepare(one, sides) >= HALF / 127.5 - 1).float() for one in _arrays(mask, "mask", 1, count)]
        )
    given = Given(torch.stack(images), masks)
    return given if extend is None else given.extended(*extend)


def _arrays(value: Any, name: str, channels: int, count: int) -> list[UInt8[np.ndarray, "h w c"]]:
    """Each image as an array. Raises ConfigError for another kind, or another number than 1 or ``count``."""
    values = value if isinstance(value, (list, tuple)) else [value]
    if len(values) not in (1, count):
        raise ConfigError(f"{name} must be one, or one for each of the {count} pictures, got {len(values)}")
    return [_array(one, name, channels) for one in values]


def _array(value: Any, name: str, channels: int) -> UInt8[np.ndarray, "h w c"]:
    if isinstance(value, (str, PathLike)):
        try:
            array = read_image(Path(value), channels)
        except BadSample as bad:
            raise ConfigError(f"{name} {bad}") from None
    elif isinstance(value, Image.Image):
        array = np.asarray(value.convert("L" if channels == 1 else "RGB"))
    elif isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim in (2, 3):
        array = value
    else:
        raise ConfigError(f"{name} must be a file, a picture of Pillow or an array of uint8, got {shown(value)}")
    array = array[..., None] if array.ndim == 2 else array
    if array.shape[2] != channels:
        raise ConfigError(f"{name} must have {channels} channels, got {array.shape[2]}")
    if not array.size or too_long(array.shape[1], array.shape[0], max(array.shape[:2])):
        raise ConfigError(f"{name} is {array.shape[1]}×{array.shape[0]}: it must have pixels, and not too many")
    return array


def started(settings: SampleConfig, image: bool, mask: bool) -> SampleConfig:
    """The settings with the strength of a call that is given an image and a mask, or not.

    Raises ConfigError for settings of an image or a mask that is not given, or that a sampler
    cannot follow.
    """
    mask = mask or settings.extend is not None
    for name, there, owner in (
        ("strength", image, "image"),
        ("strength_by", image, "image"),
        ("invert", image, "image"),
        ("extend", image, "image"),
        ("completion", mask, "mask"),
        ("paste", mask, "mask"),
    ):
        if not there and getattr(settings, name) != getattr(SampleConfig, name):
            raise ConfigError(f"{name} is for a call with {owner}: give {owner}, or leave {name} out")
    if settings.completion == "repaint" and settings.repaint_jump >= settings.steps:
        raise ConfigError(
            f"repaint_jump must be below the {settings.steps} steps, got {settings.repaint_jump}: 25 steps, with 5 of"
            " both jump and repeats, are 105 network calls"
        )
    if settings.completion == "repaint" and SAMPLERS[settings.sampler].fewest > 1:
        raise ConfigError(f"completion repaint makes single steps, which {settings.sampler} cannot: take ddpm or ddim")
    if settings.invert and (mask or SAMPLERS[settings.sampler].stochastic or settings.eta):
        what = "a mask" if mask else f"{settings.sampler} with eta {settings.eta:g}, which draws noise at its steps"
        raise ConfigError(f"invert is not for {what}: take sampler ddim with eta 0, and no mask")
    if not image or settings.strength is not None:
        return settings
    return dataclasses.replace(settings, strength=1.0 if mask or settings.invert else STRENGTH)
