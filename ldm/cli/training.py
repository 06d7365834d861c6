"""What the training commands share: a configuration file, overrides, and the loop."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm import config
from ldm.cli.console import Console, rank


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG and its overrides."""
    parser.add_argument("config", help="YAML file: autoencoder.yaml, clip.yaml or ldm.yaml of configs/demo, for example")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's, such as train.steps=100")


def run(arguments: argparse.Namespace, kind: type, make_task: Callable[[Any, Console], Any]) -> None:
    """Read the configuration, make the task and train it."""
    settings = config.load(kind, arguments.config, arguments.overrides)
    _check_place(settings)
    console = Console()
    if _finished(settings, console):
        return
    from ldm.training.loop import Loop  # torch and accelerate: seconds

    task = make_task(settings, console)
    for note in task.notes:
        console.say(note)
    Loop(task, settings.train, settings, settings.run, settings.data.workers, console).train()
    console.say(f"done: {settings.run}")


def _check_place(settings: Any) -> None:
    """A run inside the folder of images would add its pictures to them."""
    folder = settings.data.folder
    if folder is not None and Path(settings.run).resolve().is_relative_to(Path(folder).resolve()):
        raise config.ConfigError(f"run {settings.run} lies inside data.folder {folder}, among the images: choose another place")


def _finished(settings: Any, console: Console) -> bool:
    """Whether the run is trained to its end and exported; says so."""
    from ldm.evaluation.record import read_status
    from ldm.training.run import RunDirectory

    path, steps = Path(settings.run), settings.train.steps
    status = read_status(path)
    if status is None or status["state"] != "done" or status["step"] < steps or not (path / "model").is_dir():
        return False
    if rank() == 0:
        with RunDirectory(path) as run:
            run.start(settings)  # refuses another configuration
    new = "; images added since are for another run: directory" if settings.data.folder is not None else ""
    console.say(f"{path}: already trained to update {status['step']} of {steps}{new}")
    return True
