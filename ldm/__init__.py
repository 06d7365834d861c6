"""Latent diffusion: train an autoencoder and a text-conditional diffusion model, and draw images with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline as Pipeline

__version__ = "0.1.0"
__all__ = ["Pipeline", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the pipeline, and torch with it, when it is first asked for."""
    if name == "Pipeline":
        from ldm.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module 'ldm' has no attribute {name!r}")
