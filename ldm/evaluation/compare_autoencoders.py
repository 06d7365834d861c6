"""Two autoencoders side by side: PSNR, SSIM, high-frequency energy, and the logits of a discriminator."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from autoencoder.discriminator import PatchDiscriminator
from autoencoder.metrics import SSIM_WINDOW, high_frequency_energy, psnr, ssim
from ldm import config as configuration
from ldm.config import AutoencoderTrainingConfig, ConfigError, DataConfig
from ldm.data.sample import readable
from ldm.data.sources import open_source
from ldm.data.transforms import prepare, to_uint8
from ldm.errors import DataError
from ldm.evaluation.figures.plots import captioned
from ldm.files.json import write_json
from ldm.files.tensors.finite import finite
from ldm.interop.weights import read_module
from ldm.pipeline.codec import load_codec
from ldm.runs.records import newest_checkpoint

IMAGES = 256  # measured
SHOWN = 8  # in the picture


@torch.no_grad()
def compare(plain: Path, adversarial: Path, file: Path) -> dict[str, Any]:
    """Measure both runs on the same validation images; save a picture to ``file`` and the metrics as JSON.

    ``adversarial`` was trained with a discriminator, which judges both. ``high_frequency`` is None if
    no original has such detail, ``ssim`` if the images are smaller than its window.

    Raises:
        ConfigError: it was trained without one, or the runs have different data.
        DataError: no image can be read.
    """
    configs = [configuration.load(AutoencoderTrainingConfig, run / "config.yaml") for run in (plain, adversarial)]
    if configs[0].data != configs[1].data:
        raise ConfigError(f"{plain} and {adversarial} were trained on different data: nothing to compare")
    if configs[1].loss.gan == 0:
        raise ConfigError(f"{adversarial} was trained without a discriminator: loss.gan is 0")
    images = _validation_images(configs[1].data)
    discriminator = _discriminator(adversarial, configs[1])
    names = [plain.name, adversarial.name]
    if len({"original", *names}) < 3:
        names = [str(plain), str(adversarial)]
    rows: dict[str, Any] = {"original": {"logits": float(discriminator(images).mean())}}
    pictures = [images[:SHOWN]]
    for run, name in zip((plain, adversarial), names, strict=True):
        decoded = finite(load_codec(run).autoencoder(images)[0], f"the reconstructions of {run}").clamp(-1, 1)
        energy = high_frequency_energy(decoded, images)
        energy = energy[torch.isfinite(energy)]
        rows[name] = {
            "psnr": float(psnr(decoded, images).mean()),
            "ssim": float(ssim(decoded, images).mean()) if images.shape[-1] >= SSIM_WINDOW else None,
            "high_frequency": float(energy.median()) if len(energy) else None,
            "logits": float(discriminator(decoded).mean()),
        }
        pictures.append(decoded[:SHOWN])
    shown = len(pictures[0])
    captions = [name for name in ("original", *names) for _ in range(shown)]
    captioned(np.concatenate([to_uint8(p) for p in pictures]), captions, file, columns=shown)
    write_json(file.with_suffix(".json"), rows)
    return rows


def _validation_images(data: DataConfig) -> Float[Tensor, "b C H W"]:
    """The first IMAGES validation images that can be read. Raises DataError if there is none."""
    samples = itertools.islice(readable(open_source(data, "validation")), IMAGES)
    images = [prepare(sample.image, data.image_size) for _, sample in samples]
    if not images:
        raise DataError(f"{data.folder}: none of the validation images can be read")
    return torch.stack(images)


def _discriminator(run: Path, config: AutoencoderTrainingConfig) -> PatchDiscriminator:
    """The discriminator in the newest checkpoint. Raises ConfigError if there is none."""
    newest = newest_checkpoint(run)
    if newest is None:
        raise ConfigError(f"{run} has no checkpoint with a discriminator: let its training finish")
    channels, layers = config.loss.disc_channels, config.loss.disc_layers
    return read_module(
        lambda: PatchDiscriminator(config.data.image_channels, channels, layers),
        newest[1] / "model_discriminator.safetensors",
    )
