"""Train a classifier of noisy latents, for classifier guidance; writes RUN/model/classifier.

  ldm train-classifier configs/digits/classifier.yaml

Latents and noise schedule are those of a finished diffusion run; the classes are the captions of the
training images. If interrupted, the same command resumes.
"""

from __future__ import annotations

import argparse

from ldm.cli import training
from ldm.config import ClassifierTrainingConfig

add_arguments = training.add_arguments


def run(arguments: argparse.Namespace) -> None:
    """Train."""
    training.run(arguments, ClassifierTrainingConfig)
