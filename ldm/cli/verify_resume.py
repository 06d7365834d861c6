"""Prove for a configuration that resuming is exact.

  ldm verify-resume configs/demo/ldm.yaml train.deterministic=true --updates 8
  torchrun --nproc-per-node 2 scripts/verify_resume.py configs/demo/ldm.yaml

Trains for a few updates in three new runs: twice without a break, and once killed within an update and
resumed; then compares all that they read, logged and saved. The run of the configuration is not touched;
its latent cache is read if there is one. Exit code 4 if resuming is not exact.
"""

from __future__ import annotations

import argparse
import glob
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ldm.cli import training
from ldm.cli.console import Console
from ldm.config import RUNS, ConfigError, load, load_any
from ldm.runs.status import is_locked

LEAST = 4  # updates: two before the checkpoint, one lost, one after it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG, its overrides, the length of the check, and where to keep it."""
    training.add_settings(parser)
    parser.add_argument("--updates", type=int, default=8, metavar="N", help="updates of each run (default 8)")
    parser.add_argument(
        "--keep", metavar="FOLDER", help="keep the three runs in this folder, which must be new or empty"
    )
    parser.add_argument(
        "--command", choices=RUNS, dest="of", help="the command that CONFIG is for, if its keys do not tell"
    )


def run(arguments: argparse.Namespace) -> None:
    """Train three times, compare, print the verdict."""
    if arguments.updates < LEAST:
        raise ConfigError(f"--updates must be at least {LEAST}, got {arguments.updates}")
    if arguments.of:
        settings: Any = load(RUNS[arguments.of], arguments.config, arguments.overrides)
    else:
        settings = load_any(arguments.config, arguments.overrides)
    console = Console()
    from ldm.distributed.launch import launched  # torch: seconds
    from ldm.runs.directory import RunDirectory
    from ldm.training.precision import accelerator_of

    processes, device = launched()
    accelerator_of(settings.train.mixed_precision)
    (folder, *_) = processes.each(lambda: _folder(settings.run, arguments.keep) if processes.main else Path())
    with ExitStack() as stack:
        if processes.main and arguments.keep is None:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            stack.enter_context(RunDirectory(folder))  # the next check sees by its lock whether this one is alive
        _verify(settings, folder, arguments.updates, device.type, console)


def _verify(settings: Any, folder: Path, updates: int, device: str, console: Console) -> None:
    from ldm.training.diagnostics.deviation import HEADER, verdict
    from ldm.training.diagnostics.verify_resume import NotExactError, Plan, settings_of_check, verify
    from ldm.training.start import make_task

    plan = Plan(updates)
    checked, changed = settings_of_check(settings, plan)
    console.say(f"for the check: {', '.join(changed)}; no sample grids, no export")
    rows = verify(checked, lambda one: make_task(one, Silence()), folder, plan, console.say)
    console.say(HEADER)
    for row in rows:
        console.say(row.line())
    good, sentence = verdict(rows, rounding=device != "cpu" and not settings.train.deterministic)
    if not good:
        raise NotExactError(f"NOT exact: {sentence}")
    console.say(f"verdict: {sentence}")


def _folder(run: str, keep: str | None) -> Path:
    """Folder for the runs of the check: beside the run, so on the same file system."""
    try:
        if keep is None:
            parent = Path(run).absolute().parent
            parent.mkdir(parents=True, exist_ok=True)
            prefix = f".verify-{Path(run).name}-"
            for left in parent.glob(f"{glob.escape(prefix)}*"):  # left by a check that was killed
                if (left / ".lock").is_file() and is_locked(left) is False:
                    shutil.rmtree(left, ignore_errors=True)
            return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        folder = Path(keep)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError(f"--keep {folder} is not empty: name a new folder")
        return folder
    except OSError as error:
        raise ConfigError(f"{keep or Path(run).parent} cannot hold the runs of the check: {error.strerror}") from None


class Silence(Console):
    """Drops the messages of a task, which are for its own command."""

    def say(self, text: str) -> None: ...
