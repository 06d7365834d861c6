"""Train a small CLIP on the captions and images of the data, for its text encoder.

  ldm train-clip configs/demo/clip.yaml

Writes RUN/model/text_encoder and RUN/model/tokenizer in transformers' format. If interrupted, the same
command resumes.
"""

from __future__ import annotations

import argparse

from ldm.cli import training
from ldm.config import ClipTrainingConfig

add_arguments = training.add_arguments


def run(arguments: argparse.Namespace) -> None:
    """Train."""
    training.run(arguments, ClipTrainingConfig)
