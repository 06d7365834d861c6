"""Trained models and how they draw: text to images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.pipeline.pipeline import Pipeline as Pipeline

__all__ = ["Pipeline"]


def __getattr__(name: str) -> Any:
    """Import the pipeline, and torch with it, when it is first asked for."""
    if name == "Pipeline":
        from ldm.pipeline.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module 'ldm.pipeline' has no attribute {name!r}")
