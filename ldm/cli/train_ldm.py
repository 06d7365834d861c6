"""Train the diffusion model (stage 2); writes the whole pipeline to RUN/model.

  ldm train-ldm configs/demo/ldm.yaml train.lr=1e-4

If interrupted, the same command resumes.
"""

from __future__ import annotations

import argparse

from ldm.cli import training
from ldm.config import DiffusionTrainingConfig

add_arguments = training.add_arguments


def run(arguments: argparse.Namespace) -> None:
    """Train."""
    training.run(arguments, DiffusionTrainingConfig)
