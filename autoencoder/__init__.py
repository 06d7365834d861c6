"""A KL autoencoder of images and its stage-1 loss; knows nothing of diffusion.

Importing it imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoencoder.config import AutoencoderConfig, LossConfig
    from autoencoder.model import AutoencoderKL
    from autoencoder.posterior import DiagonalGaussian

__all__ = ["AutoencoderConfig", "AutoencoderKL", "DiagonalGaussian", "LossConfig"]

_HOMES = {
    "AutoencoderConfig": "autoencoder.config",
    "LossConfig": "autoencoder.config",
    "AutoencoderKL": "autoencoder.model",
    "DiagonalGaussian": "autoencoder.posterior",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
