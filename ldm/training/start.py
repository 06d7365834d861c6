"""Start a training: check its place, make its task, run the loop. Importing this module does not import torch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import config
from ldm.distributed.processes import own_rank
from ldm.runs.place import check_place

if TYPE_CHECKING:
    from ldm.training.task import Reporter, Task


class Lines:
    """A reporter that prints lines, on the main process only: messages, metrics, and the seconds left.

    ``names``: the metrics to print; all by default.
    """

    def __init__(self, names: Sequence[str] | None = None) -> None:
        self.silent, self._names = own_rank() != 0, names
        self._begun: tuple[float, int] | None = None  # clock and step at the first report

    def say(self, text: str) -> None:
        """Print one line."""
        if not self.silent:
            print(text, flush=True)

    def progress(self, step: int, steps: int, values: Mapping[str, Any]) -> None:
        """Print that ``step`` of ``steps`` is done, with the chosen metrics of ``values``."""
        if self._begun is None:
            self._begun = time.monotonic(), step
        passed, done = time.monotonic() - self._begun[0], step - self._begun[1]
        metrics = "  ".join(f"{name} {value}" for name, value in self.chosen(values).items())
        left = f"{passed / done * (steps - step):.0f} s left" if done and step < steps else ""
        self.say(f"{step}/{steps}  {', '.join(part for part in (metrics, left) if part)}".rstrip())
        if step >= steps:
            self._begun = None

    def chosen(self, values: Mapping[str, Any]) -> dict[str, str]:
        """The metrics to print that are numbers, as text by name."""
        names = values if self._names is None else self._names
        return {k.replace("/", " "): f"{values[k]:.3g}" for k in names if isinstance(values.get(k), (int, float))}


def train(configuration: Any, *overrides: str, reporter: Reporter | None = None) -> Path:
    """Train a stage from Python, as its command does; returns the run directory. Interrupted, the same call resumes.

    Args:
        configuration: a YAML file, or a training configuration such as ldm.config.DiffusionTrainingConfig.
        overrides: settings that replace the file's, such as ``"train.steps=500"``.
        reporter: gets messages and progress; left out, they are printed.

    Raises:
        ConfigError, DataError, FolderError, CheckpointError, RunError, TrainingError: one line each, as the command
        prints.
    """
    if isinstance(configuration, (str, Path)):
        settings = config.load_any(configuration, overrides)
    elif overrides:
        raise config.ConfigError("overrides are for a configuration file: change the configuration's own fields")
    else:
        settings = configuration
    train_settings(settings, reporter or Lines())
    return Path(settings.run)


def train_settings(settings: Any, reporter: Reporter, start: str | None = None) -> None:
    """Train a configuration to its end, from the newest checkpoint or from ``start`` (an update or a folder)."""
    check_place(settings)
    if start is None and _finished(settings, reporter):
        return
    from ldm.runs.directory import require_same

    require_same(Path(settings.run), settings)  # before anything is read, encoded or put on the device
    from ldm.distributed.launch import launched
    from ldm.training.loop import Loop  # importing torch and accelerate takes seconds
    from ldm.training.precision import accelerator_of
    from ldm.training.stopping import end_with_launcher

    end_with_launcher()
    launched(patience=settings.train.rank_timeout)  # before the task, which may need the others
    try:
        accelerator_of(settings.train.mixed_precision)  # before the task, which may encode all images
        task = make_task(settings, reporter)
    except Exception as error:
        _fail(settings, error)
        raise
    for line in task.summary:
        reporter.say(line)
    with Loop(task, settings.train, settings, settings.run, settings.data.workers, reporter, start) as loop:
        loop.train()
    reporter.say(f"done: {settings.run}")


def make_task(settings: Any, reporter: Reporter) -> Task:
    """Make the task of a run's configuration, of whichever stage."""
    match settings:  # importing torch and transformers takes seconds
        case config.AutoencoderTrainingConfig():
            from ldm.training.stages.autoencoder import AutoencoderTask

            return AutoencoderTask(settings)
        case config.ClipTrainingConfig():
            from ldm.training.stages.clip import ClipTask

            return ClipTask(settings)
        case config.ClassifierTrainingConfig():
            from ldm.training.stages.classifier import ClassifierTask

            return ClassifierTask.from_config(settings, reporter.say)
        case config.DiffusionTrainingConfig() if settings.schedule.name == config.LEARNED:
            from ldm.training.stages.learned_schedule import LearnedScheduleTask

            return LearnedScheduleTask.from_config(settings, reporter.say)
        case config.DiffusionTrainingConfig() if settings.distill is not None:
            from ldm.training.stages.distillation import DistillationTask

            return DistillationTask.from_config(settings, reporter.say)
        case _:
            from ldm.training.stages.diffusion import DiffusionTask

            return DiffusionTask.from_config(settings, reporter.say)


def _fail(settings: Any, error: Exception) -> None:
    """Write to an existing run's status that this start failed, so that a script does not restart it forever."""
    from ldm.errors import RunError
    from ldm.runs.directory import RunDirectory

    if own_rank() == 0 and (Path(settings.run) / "config.yaml").is_file():
        with suppress(RunError), RunDirectory(settings.run) as run:  # another process may be at work on it
            run.start(settings)
            run.fail(error)


def _finished(settings: Any, reporter: Reporter) -> bool:
    """True if the run is finished, also by ``train.patience``, and exported; reports it."""
    from ldm.runs.directory import RunDirectory
    from ldm.runs.records import read_status

    path, train = Path(settings.run), settings.train
    status = read_status(path) or {}
    early = train.patience is not None and status.get("waited", 0) >= train.patience
    over = status.get("step", 0) >= train.steps or early
    exported = (path / "model").is_dir() and ((path / "best").is_dir() or not train.keep_best)
    if status.get("state") != "done" or not over or not exported:
        return False
    if own_rank() == 0:
        with RunDirectory(path) as run:
            run.start(settings)  # refuses another configuration
    if _lacks_its_base(path):  # all processes see it: the export is written anew only once they have met
        return False
    new = "; images added since are for another run: directory" if settings.data.folder is not None else ""
    reporter.say(f"{path}: already trained to update {status['step']} of {train.steps}{new}")
    return True


def _lacks_its_base(path: Path) -> bool:
    """True if the base of the run's exported LoRA is no longer where the export says."""
    from ldm.errors import FolderError
    from ldm.interop.diffusers.lora_folder import Reference

    try:
        Reference.read(path / "model")
    except FolderError:
        return True
    return False
