"""Train a classifier of noisy latents, for classifier guidance. Interrupted, the same command continues.

Its latents and schedule are those of a finished diffusion run; its classes are the captions of the training images.
Writes RUN/model/classifier.
"""

from __future__ import annotations

import argparse

from ldm.cli import training
from ldm.config import ClassifierTrainingConfig

add_arguments = training.add_arguments


def run(arguments: argparse.Namespace) -> None:
    """Train."""
    training.run(arguments, ClassifierTrainingConfig)
