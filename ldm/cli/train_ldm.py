"""Train the diffusion model (stage 2). Interrupted, the same command continues. Writes the whole pipeline to RUN/model."""

from __future__ import annotations

import argparse

from ldm.cli import training
from ldm.config import DiffusionTrainingConfig

add_arguments = training.add_arguments


def run(arguments: argparse.Namespace) -> None:
    """Train."""
    training.run(arguments, DiffusionTrainingConfig)
