"""What the training commands share: a configuration file, overrides, and the loop."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ldm import config
from ldm.cli.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG and its overrides."""
    parser.add_argument("config", help="YAML file, such as configs/demo/ldm.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's, such as train.steps=100")


def run(arguments: argparse.Namespace, kind: type, make_task: Callable[[Any, Console], Any]) -> None:
    """Read the configuration, make the task and train it."""
    settings = config.load(kind, arguments.config, arguments.overrides)
    console = Console()
    from ldm.training.loop import Loop  # torch and accelerate: seconds

    task = make_task(settings, console)
    for note in task.notes:
        console.say(note)
    Loop(task, settings.train, settings, settings.run, settings.data.workers, console).train()
    console.say(f"done: {settings.run}")
