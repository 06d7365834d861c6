"""Inputs of stage 2: latents from the run's cache or encoded in the step, or the images themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoencoder.posterior import DiagonalGaussian
from ldm.config import DiffusionTrainingConfig
from ldm.data import latent_cache as cache
from ldm.data.dataset import Batch
from ldm.data.sample import Source
from ldm.distributed.processes import Processes
from ldm.pipeline.codec import LatentCodec, autoencoder_hash

MANY = 1000  # from this number of images on, encoding reports its progress


def diffused(codec: LatentCodec | None, batch: Batch) -> Tensor:
    """x_0 of a batch: a fresh draw of the latent from the posterior (never frozen in a cache), or the image."""
    if codec is None:
        return batch["image"]
    with torch.no_grad():
        cached = "moments" in batch
        posterior = (
            DiagonalGaussian.from_moments(batch["moments"]) if cached else codec.autoencoder.encode(batch["image"])
        )
        return codec.latent(posterior, batch["posterior"])


def ensure_cache(
    config: DiffusionTrainingConfig,
    autoencoder: Any,
    source: Source,
    say: Callable[[str], None],
    processes: Processes,
    device: torch.device,
) -> cache.LatentCache:
    """Open the run's latent cache, after encoding the data set if the cache is missing or damaged.

    Raises DataError if it was made from other data or another autoencoder.
    """
    folder = Path(config.run) / "latents"
    key = cache.cache_key(autoencoder_hash(config.autoencoder), source, config.data)
    try:
        return cache.LatentCache(folder, key, processes)
    except cache.DamagedCacheError as error:  # on all processes alike
        say(
            f"encoding {source.length} images into {folder}"
            if error.missing
            else f"{error}: encoding {source.length} images again"
        )
    tenths: set[int] = set()

    def progress(done: int, total: int) -> None:
        if total >= MANY and (tenth := done * 10 // total) not in tenths:
            tenths.add(tenth)
            say(f"encoded {done} of {total}")

    cache.write(
        folder, key, autoencoder.to(device), source, config.data, device, progress=progress, processes=processes
    )
    autoencoder.to("cpu")
    return cache.LatentCache(folder, key, processes)
