"""Train the autoencoder (stage 1). Interrupted, the same command continues. Writes RUN/model/vae."""

from __future__ import annotations

import argparse

from ldm.cli import training
from ldm.config import AutoencoderTrainingConfig

add_arguments = training.add_arguments


def run(arguments: argparse.Namespace) -> None:
    """Train."""
    training.run(arguments, AutoencoderTrainingConfig)
