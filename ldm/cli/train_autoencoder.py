"""Train the autoencoder (stage 1); writes RUN/model/vae.

  ldm train-autoencoder configs/demo/autoencoder.yaml train.steps=3000

If interrupted, the same command resumes.
"""

from __future__ import annotations

import argparse

from ldm.cli import training
from ldm.config import AutoencoderTrainingConfig

add_arguments = training.add_arguments


def run(arguments: argparse.Namespace) -> None:
    """Train."""
    training.run(arguments, AutoencoderTrainingConfig)
