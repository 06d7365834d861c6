"""Train the diffusion model (stage 2). Interrupted, the same command goes on. Writes the whole pipeline to RUN/model."""

from __future__ import annotations

import argparse
from typing import Any

from ldm.cli import training
from ldm.cli.console import Console
from ldm.config import DiffusionRun

add_arguments = training.add_arguments


def _task(settings: DiffusionRun, console: Console) -> Any:
    from ldm.training.diffusion import DiffusionTask

    return DiffusionTask(settings, console.say)


def run(arguments: argparse.Namespace) -> None:
    """Train."""
    training.run(arguments, DiffusionRun, _task)
