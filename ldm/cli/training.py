"""Common parts of the training commands: a configuration file, overrides, and the loop."""

from __future__ import annotations

import argparse

from ldm import config
from ldm.cli.console import Console
from ldm.training.start import train_settings


def add_settings(parser: argparse.ArgumentParser) -> None:
    """CONFIG and its overrides."""
    parser.add_argument(
        "config", help="YAML file: autoencoder.yaml, clip.yaml or ldm.yaml of configs/demo, for example"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace the file's, such as train.steps=100"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG, its overrides, and where to continue from."""
    add_settings(parser)
    parser.add_argument(
        "--from", dest="start", metavar="UPDATE_OR_FOLDER",
        help="continue from this checkpoint of the run, not from the newest (later ones are set aside)",
    )  # fmt: skip


def run(arguments: argparse.Namespace, kind: type) -> None:
    """Read the configuration and train it."""
    settings = config.load(kind, arguments.config, arguments.overrides)
    train_settings(settings, Console(lasting=True), getattr(arguments, "start", None))  # `train` has no such argument
