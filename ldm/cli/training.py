"""Common parts of the training commands: a configuration file, overrides, and the loop."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path
from typing import Any

from ldm import config
from ldm.cli.console import Console, rank
from ldm.cli.place import check_place


def add_settings(parser: argparse.ArgumentParser) -> None:
    """CONFIG and its overrides."""
    parser.add_argument("config", help="YAML file: autoencoder.yaml, clip.yaml or ldm.yaml of configs/demo, for example")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's, such as train.steps=100")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG, its overrides, and where to continue from."""
    add_settings(parser)
    parser.add_argument(
        "--from", dest="start", metavar="UPDATE_OR_FOLDER",
        help="continue from this checkpoint of the run, not from the newest (later ones are set aside)",
    )  # fmt: skip


def make_task(settings: Any, console: Console) -> Any:
    """The task of a run's configuration, whichever command it is of."""
    match settings:  # each brings torch, and some transformers: seconds
        case config.AutoencoderTrainingConfig():
            from ldm.training.stages.autoencoder import AutoencoderTask

            return AutoencoderTask(settings)
        case config.ClipTrainingConfig():
            from ldm.training.stages.clip import ClipTask

            return ClipTask(settings)
        case config.ClassifierTrainingConfig():
            from ldm.training.stages.classifier import ClassifierTask

            return ClassifierTask(settings, console.say)
        case _:
            from ldm.training.stages.diffusion import DiffusionTask

            return DiffusionTask(settings, console.say)


def run(arguments: argparse.Namespace, kind: type) -> None:
    """Read the configuration, make the task and train it."""
    settings = config.load(kind, arguments.config, arguments.overrides)
    check_place(settings)
    console = Console(lasting=True)
    start = getattr(arguments, "start", None)  # `train` has no such argument
    if start is None and _finished(settings, console):
        return
    from ldm.runs.directory import require_same

    require_same(Path(settings.run), settings)  # before anything is read, encoded or put on the device
    from ldm.distributed.launch import launched
    from ldm.training.loop import Loop  # torch and accelerate: seconds
    from ldm.training.precision import accelerator_of
    from ldm.training.stopping import end_with_launcher

    end_with_launcher()
    launched(patience=settings.train.rank_timeout)  # before the task, which may need the others
    try:
        accelerator_of(settings.train.mixed_precision)  # before the task, which may encode all images
        task = make_task(settings, console)
    except Exception as error:
        _fail(settings, error)
        raise
    for note in task.summary:
        console.say(note)
    Loop(task, settings.train, settings, settings.run, settings.data.workers, console, start).train()
    console.say(f"done: {settings.run}")


def _fail(settings: Any, error: Exception) -> None:
    """Say in the status of a run that exists how this start of it ended: a script that asks would begin again for ever."""
    from ldm.errors import RunError
    from ldm.runs.directory import RunDirectory

    if rank() == 0 and (Path(settings.run) / "config.yaml").is_file():
        with suppress(RunError), RunDirectory(settings.run) as run:  # another process may be at work on it
            run.start(settings)
            run.fail(error)


def _finished(settings: Any, console: Console) -> bool:
    """True if the run is trained to its end and exported; prints so."""
    from ldm.runs.directory import RunDirectory
    from ldm.runs.records import read_status

    path, steps = Path(settings.run), settings.train.steps
    status = read_status(path)
    if status is None or status.get("state") != "done" or status.get("step", 0) < steps or not (path / "model").is_dir():
        return False
    if rank() == 0:
        with RunDirectory(path) as run:
            run.start(settings)  # refuses another configuration
    if _lacks_its_base(path):  # all processes see it: the export is written anew only once they have met
        return False
    new = "; images added since are for another run: directory" if settings.data.folder is not None else ""
    console.say(f"{path}: already trained to update {status['step']} of {steps}{new}")
    return True


def _lacks_its_base(path: Path) -> bool:
    """True if the run has exported a LoRA whose base is no longer where the export says."""
    from ldm.errors import FolderError
    from ldm.interop.diffusers.lora_folder import Reference

    try:
        Reference.read(path / "model")
    except FolderError:
        return True
    return False
