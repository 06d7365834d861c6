"""Latent caches of small made-up images."""

from pathlib import Path
from typing import Any

import torch

from autoencoder.config import AutoencoderConfig
from autoencoder.model import AutoencoderKL
from ldm.config import DataConfig
from ldm.data import latent_cache as cache
from ldm.data.sources import open_source

FLIPPING = DataConfig(source="shapes", image_size=24, size=10, flip=True)


def autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        AutoencoderConfig(latent_channels=2, channels=(8, 8), layers_per_level=1, groups=4, mid_attention=False)
    ).eval()


def write(folder: Path, data: DataConfig = FLIPPING, **options: Any) -> tuple[AutoencoderKL, Any, dict[str, Any]]:
    network, source = autoencoder(), open_source(data, "train")
    key = cache.cache_key("abc", source, data)
    cache.write(folder, key, network, source, data, torch.device("cpu"), batch=4, **options)
    return network, source, key
