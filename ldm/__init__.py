"""Latent diffusion: train an autoencoder and a text-conditional diffusion model, and draw images with them.

The names below are the library's face, imported when they are first used; docs/library.md shows them at work.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoencoder.config import AutoencoderConfig as AutoencoderConfig
    from autoencoder.model import AutoencoderKL as AutoencoderKL
    from ldm.config import ConditionConfig as ConditionConfig
    from ldm.config import ConfigError as ConfigError
    from ldm.config import ObjectiveConfig as ObjectiveConfig
    from ldm.config import UNetConfig as UNetConfig
    from ldm.config import load_any as load_config
    from ldm.diffusion.condition import Condition as Condition
    from ldm.diffusion.conditioner import Conditioner as Conditioner
    from ldm.diffusion.denoiser import Denoiser as Denoiser
    from ldm.diffusion.guidance import Guidance as Guidance
    from ldm.diffusion.objective import Objective as Objective
    from ldm.diffusion.schedule import Schedule as Schedule
    from ldm.models.unet import UNet as UNet
    from ldm.pipeline.codec import load_codec as load_autoencoder
    from ldm.pipeline.draw import sample as sample
    from ldm.pipeline.pipeline import Pipeline as Pipeline
    from ldm.training.start import train as train

__version__ = "0.2.0"

_HOMES = {
    "AutoencoderConfig": ("autoencoder.config", "AutoencoderConfig"),
    "AutoencoderKL": ("autoencoder.model", "AutoencoderKL"),
    "Condition": ("ldm.diffusion.condition", "Condition"),
    "ConditionConfig": ("ldm.config", "ConditionConfig"),
    "Conditioner": ("ldm.diffusion.conditioner", "Conditioner"),
    "ConfigError": ("ldm.config", "ConfigError"),
    "Denoiser": ("ldm.diffusion.denoiser", "Denoiser"),
    "Guidance": ("ldm.diffusion.guidance", "Guidance"),
    "Objective": ("ldm.diffusion.objective", "Objective"),
    "ObjectiveConfig": ("ldm.config", "ObjectiveConfig"),
    "Pipeline": ("ldm.pipeline.pipeline", "Pipeline"),
    "Schedule": ("ldm.diffusion.schedule", "Schedule"),
    "UNet": ("ldm.models.unet", "UNet"),
    "UNetConfig": ("ldm.config", "UNetConfig"),
    "load_autoencoder": ("ldm.pipeline.codec", "load_codec"),
    "load_config": ("ldm.config", "load_any"),
    "sample": ("ldm.pipeline.draw", "sample"),
    "train": ("ldm.training.start", "train"),
}
__all__ = [
    "AutoencoderConfig",
    "AutoencoderKL",
    "Condition",
    "ConditionConfig",
    "Conditioner",
    "ConfigError",
    "Denoiser",
    "Guidance",
    "Objective",
    "ObjectiveConfig",
    "Pipeline",
    "Schedule",
    "UNet",
    "UNetConfig",
    "__version__",
    "load_autoencoder",
    "load_config",
    "sample",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a name, and torch with it, when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ldm' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
