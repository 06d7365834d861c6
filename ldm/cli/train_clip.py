"""Train a small CLIP on the captions and images of the data. Interrupted, the same command goes on.

Writes RUN/model/text_encoder and RUN/model/tokenizer, in transformers' format.
"""

from __future__ import annotations

import argparse
from typing import Any

from ldm.cli import training
from ldm.cli.console import Console
from ldm.config import ClipRun

add_arguments = training.add_arguments


def _task(settings: ClipRun, console: Console) -> Any:
    from ldm.training.clip import ClipTask

    return ClipTask(settings)


def run(arguments: argparse.Namespace) -> None:
    """Train."""
    training.run(arguments, ClipRun, _task)
