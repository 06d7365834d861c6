"""The autoencoder in use: images to normalised latents and back."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import max_pool2d

from autoencoder.config import AutoencoderConfig
from autoencoder.layout import from_diffusers, latent_scale
from autoencoder.model import AutoencoderKL
from autoencoder.posterior import DiagonalGaussian
from autoencoder.strips import decode_in_strips, encode_in_strips
from ldm.files.known import known_hash
from ldm.interop.bundle import Part
from ldm.interop.open import read_autoencoder
from ldm.interop.weights import fill


@dataclass(frozen=True)
class LatentCodec:
    """Image to latent and back, with an autoencoder's scale and shift (ours: 1 and 0, folded into its weights)."""

    autoencoder: AutoencoderKL
    scale: float = 1.0
    shift: float = 0.0
    files: tuple[Path, ...] = ()  # where the weights were read

    @property
    def hash(self) -> str | None:
        """sha256 of the weights' file (of the hashes of several); None if it was not read from a file."""
        return files_hash(self.files) if self.files else None

    def latent(self, posterior: DiagonalGaussian, noise: Tensor) -> Float[Tensor, "b c h w"]:
        """The normalised latent of a draw from the posterior."""
        return (posterior.sample(noise) - self.shift) * self.scale

    def decode(self, latent: Float[Tensor, "b c h w"], strips: int | None = None) -> Float[Tensor, "b C H W"]:
        """Images in about [−1, 1]; computed in float32, since half precision overflows in published autoencoders.

        ``strips``: rows that are computed at a time; None: all, which is faster.
        """
        autoencoder, latent = self._in_float32(), latent.float() / self.scale + self.shift
        return autoencoder.decode(latent) if strips is None else decode_in_strips(autoencoder, latent, strips)

    def encode(self, images: Float[Tensor, "b C H W"], strips: int | None = None) -> Float[Tensor, "b c h w"]:
        """The normalised mean latents of images in [−1, 1]; computed in float32, and in strips as ``decode``."""
        autoencoder, images = self._in_float32(), images.float()
        posterior = autoencoder.encode(images) if strips is None else encode_in_strips(autoencoder, images, strips)
        return (posterior.mean - self.shift) * self.scale

    def _in_float32(self) -> AutoencoderKL:
        """The autoencoder, or a copy for one call: other threads may use the weights."""
        if next(self.autoencoder.parameters()).dtype == torch.float32:
            return self.autoencoder
        return copy.deepcopy(self.autoencoder).float()


def masked_condition(
    codec: LatentCodec | None,
    images: Float[Tensor, "b C H W"],
    masks: Float[Tensor, "b 1 H W"],
    strips: int | None = None,
) -> Float[Tensor, "b k h w"]:
    """The further channels of a U-Net that fills masked parts: the mask, and what is diffused of the rest.

    Stable Diffusion's order and values: 1 where the image is to be drawn, and a known image that is
    gray (0) there. A cell of the latent is to be drawn if any of its pixels is.
    """
    known = images * (1 - masks)
    known = known if codec is None else codec.encode(known, strips)
    return torch.cat([cells(masks, known), known], dim=1)


def cells(masks: Float[Tensor, "b 1 H W"], diffused: Float[Tensor, "n c h w"]) -> Float[Tensor, "b 1 h w"]:
    """Masks at the size of what is diffused: 1 where any pixel of a cell is."""
    factor = masks.shape[-1] // diffused.shape[-1]
    return max_pool2d(masks, factor) if factor > 1 else masks


def codec_of(part: Part) -> LatentCodec:
    """The autoencoder of a model, frozen, float32, with its latent scale. Raises FolderError or ConfigError."""
    config = from_diffusers(part.config)
    autoencoder = fill(lambda: AutoencoderKL(config), part, "autoencoder").float()
    return LatentCodec(autoencoder, *latent_scale(part.config), part.files)


def load_codec(path: str | Path) -> LatentCodec:
    """The autoencoder of a run, folder or single file, as ``codec_of`` has it. Raises FolderError or ConfigError."""
    return codec_of(read_autoencoder(path))


def autoencoder_config(path: str | Path) -> AutoencoderConfig:
    """The settings of the autoencoder of a run, folder or file. Raises FolderError or ConfigError."""
    return from_diffusers(read_autoencoder(path).config)


def autoencoder_hash(path: str | Path) -> str:
    """sha256 of the autoencoder's weights file."""
    return files_hash(read_autoencoder(path).files)


def files_hash(files: Sequence[Path]) -> str:
    """sha256 of one file, or of the hashes of several."""
    return known_hash(files[0]) if len(files) == 1 else joined_hash(files)


def joined_hash(files: Sequence[Path]) -> str:
    """sha256 of the hashes of files."""
    return sha256("".join(known_hash(file) for file in files).encode()).hexdigest()
