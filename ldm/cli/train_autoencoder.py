"""Train the autoencoder (stage 1). Interrupted, the same command goes on. Writes RUN/model/vae."""

from __future__ import annotations

import argparse
from typing import Any

from ldm.cli import training
from ldm.cli.console import Console
from ldm.config import AutoencoderRun

add_arguments = training.add_arguments


def _task(settings: AutoencoderRun, console: Console) -> Any:
    from ldm.training.autoencoder import AutoencoderTask

    return AutoencoderTask(settings)


def run(arguments: argparse.Namespace) -> None:
    """Train."""
    training.run(arguments, AutoencoderRun, _task)
