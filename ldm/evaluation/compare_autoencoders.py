"""Two autoencoders side by side: reconstructions, high-frequency energy, and what a discriminator says of them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoencoder.discriminator import PatchDiscriminator
from autoencoder.metrics import high_frequency_energy, psnr
from ldm import config as configuration
from ldm.config import AutoencoderTrainingConfig, ConfigError
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

IMAGES = 256
SHOWN = 8


@torch.no_grad()
def compare(plain: Path, adversarial: Path, file: Path) -> dict[str, Any]:
    """Measure both runs on the same validation images; save a picture to ``file`` and the figures beside it as JSON.

    ``adversarial`` was trained with a discriminator, which judges both. Raises ConfigError where it was not, or where
    the runs saw different data; DataError where no image can be read. ``high_frequency`` is None where no original has such detail.
    """
    configs = [configuration.load(AutoencoderTrainingConfig, run / "config.yaml") for run in (plain, adversarial)]
    if configs[0].data != configs[1].data:
        raise ConfigError(f"{plain} and {adversarial} were trained on different data: nothing to compare")
    loss, data = configs[1].loss, configs[1].data
    if loss.gan == 0:
        raise ConfigError(f"{adversarial} was trained without a discriminator: loss.gan is 0")
    source = open_source(data, "validation")
    read = [prepare(s.image, data.image_size) for _, s in itertools.islice(readable(source), IMAGES)]
    if not read:
        raise DataError(f"{data.folder}: none of the validation images can be read")
    images = torch.stack(read)
    newest = newest_checkpoint(adversarial)
    if newest is None:
        raise ConfigError(f"{adversarial} has no checkpoint with a discriminator: let its training finish")
    discriminator = read_module(
        lambda: PatchDiscriminator(data.image_channels, loss.disc_channels, loss.disc_layers),
        newest[1] / "model_discriminator.safetensors",
    )
    names = (
        [plain.name, adversarial.name]
        if len({"original", plain.name, adversarial.name}) == 3
        else [str(plain), str(adversarial)]
    )
    rows: dict[str, Any] = {"original": {"logits": float(discriminator(images).mean())}}
    pictures = [images[:SHOWN]]
    for run, name in zip((plain, adversarial), names, strict=True):
        decoded = finite(load_codec(run).autoencoder(images)[0], f"the reconstructions of {run}").clamp(-1, 1)
        energy = high_frequency_energy(decoded, images)
        energy = energy[torch.isfinite(energy)]
        rows[name] = {
            "psnr": float(psnr(decoded, images).mean()),
            "high_frequency": float(energy.median()) if len(energy) else None,
            "logits": float(discriminator(decoded).mean()),
        }
        pictures.append(decoded[:SHOWN])
    shown = len(pictures[0])
    captions = [name for name in ("original", *names) for _ in range(shown)]
    captioned(np.concatenate([to_uint8(p) for p in pictures]), captions, file, columns=shown)
    write_json(file.with_suffix(".json"), rows)
    return rows
