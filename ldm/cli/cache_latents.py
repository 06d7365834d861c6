"""Encode the images of a diffusion run once, into RUN/latents.

  ldm cache-latents configs/demo/ldm.yaml

train-ldm does this automatically if there is no cache; an existing one is checked.
"""

from __future__ import annotations

import argparse

from ldm import config
from ldm.cli import training
from ldm.cli.console import Console
from ldm.runs.place import check_place

add_arguments = training.add_settings


def run(arguments: argparse.Namespace) -> None:
    """Write the cache, or check an existing one."""
    settings = config.load(config.DiffusionTrainingConfig, arguments.config, arguments.overrides)
    check_place(settings)
    if settings.autoencoder == config.NONE or not settings.cache_latents:
        raise config.ConfigError("nothing to cache: autoencoder is none, or cache_latents is false")
    from ldm.data.sources import open_source
    from ldm.distributed.launch import launched
    from ldm.pipeline.codec import load_codec
    from ldm.training.stages.latents import ensure_cache

    console = Console()
    autoencoder, source = load_codec(settings.autoencoder).autoencoder, open_source(settings.data, "train")
    cache = ensure_cache(settings, autoencoder, source, console.say, *launched())
    console.say(f"{cache.length} images in {cache.folder}")
