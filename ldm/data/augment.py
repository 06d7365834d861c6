"""Random changes of training images of which nothing needs to know, as the autoencoder's: no caption describes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ldm.config import AugmentConfig

DRAWS = ("turn", "zoom", "left", "top", "channels", "inverted", "contrast")  # numbers in [0, 1) of each sample


def augmented(
    images: Float[Tensor, "b c s s"], draws: Mapping[str, Any], config: AugmentConfig
) -> Float[Tensor, "b c s s"]:
    """Images in [−1, 1], changed as ``config`` says by their ``DRAWS``, [b] each."""
    if config.none:
        return images
    draws = {name: draws[name].to(images) for name in DRAWS}
    if config.turn or config.zoom < 1:
        images = _moved(images, draws, config)
    return _recoloured(images, draws) if config.colours else images


def _moved(images: Tensor, draws: Mapping[str, Tensor], config: AugmentConfig) -> Tensor:
    """One of the eight turns and mirrorings of a square, and a part of it enlarged, in one bilinear resampling."""
    turn = (draws["turn"] * 8).long() if config.turn else torch.zeros_like(draws["turn"], dtype=torch.long)
    quarter = turn // 2 * (torch.pi / 2)
    cos, sin, mirror = quarter.cos().round(), quarter.sin().round(), 1 - 2 * (turn % 2)
    share = config.zoom + (1 - config.zoom) * draws["zoom"] if config.zoom < 1 else torch.ones_like(draws["zoom"])
    centre = [(1 - share) * (2 * draws[name] - 1) for name in ("left", "top")]
    rows = [torch.stack([cos * share * mirror, -sin * share, centre[0]], 1)]
    rows += [torch.stack([sin * share * mirror, cos * share, centre[1]], 1)]
    places = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, places, padding_mode="border", align_corners=False)


def _recoloured(images: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
    """Channels rotated and inverted, each image its own way, and contrast between a half and all of it."""
    channels = images.shape[1]
    first = (draws["channels"] * channels).long()
    order = (first[:, None] + torch.arange(channels, device=images.device)) % channels
    bits = (draws["inverted"] * 2**channels).long()
    inverted = bits[:, None] // 2 ** torch.arange(channels, device=images.device) % 2
    factor = (1 - 2 * inverted) * (1 + draws["contrast"][:, None]) / 2
    return images[torch.arange(len(images), device=images.device)[:, None], order] * factor[:, :, None, None]
