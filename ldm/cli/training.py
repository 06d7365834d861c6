"""Shared by the training commands: the configuration file with its overrides, and the loop."""

from __future__ import annotations

import argparse

from ldm import config
from ldm.cli.console import Console
from ldm.training.start import train_settings


def add_settings(parser: argparse.ArgumentParser) -> None:
    """CONFIG and its overrides."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, such as those in configs/demo")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that replace those of the file, such as train.steps=100",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG, its overrides, and the checkpoint to resume from."""
    add_settings(parser)
    newest = "resume from this checkpoint of the run instead of the newest (later ones are set aside)"
    parser.add_argument("--from", dest="start", metavar="UPDATE_OR_FOLDER", help=newest)


def run(arguments: argparse.Namespace, kind: type) -> None:
    """Train the stage of this kind of configuration."""
    settings = config.load(kind, arguments.config, arguments.overrides)
    train_settings(settings, Console(lasting=True), getattr(arguments, "start", None))  # `train` has no such argument
