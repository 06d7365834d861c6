"""Compute a non-finite update again, and name the first module whose output or gradient is not finite.

  ldm replay runs/demo/incidents/update-00000123

Exit code 1 if everything is finite on this machine.
"""

from __future__ import annotations

import argparse

from ldm.cli.console import Console
from ldm.config import ClipTrainingConfig, load_run
from ldm.files.disk import resolved


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recorded update."""
    parser.add_argument(
        "incident",
        metavar="INCIDENT",
        help="a folder RUN/incidents/update-N, written when training met a non-finite update",
    )


def run(arguments: argparse.Namespace) -> None:
    """Read, compute and print. Raises NotReproducedError if everything is finite."""
    from ldm.training.diagnostics.nonfinite import read
    from ldm.training.diagnostics.replay import NotReproducedError, replay
    from ldm.training.precision import accelerator_of
    from ldm.training.start import make_task

    folder, console = resolved(arguments.incident), Console()
    incident, weights = read(folder)
    settings = load_run(folder.parent.parent)
    accelerator_of(settings.train.mixed_precision)  # fails fast, before the slow part
    task = make_task(settings, console)
    positions = incident.positions
    console.say(f"update {incident.update}: positions {positions.start} to {positions.stop - 1} of the training stream")
    is_clip = isinstance(settings, ClipTrainingConfig)
    lines = replay(task, incident, weights, settings.train.mixed_precision, is_clip).lines()
    if not lines:
        split = f"{incident.processes} × {incident.micro_batch}"
        raise NotReproducedError(
            f"all of update {incident.update} is finite here (it was split {split}; devices round differently)"
        )
    for line in lines:
        console.say(line)
