"""Checks that a run directory is a folder of its own, without other files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm.config import ConfigError
from ldm.files.disk import resolved

# Entries of which a started run has at least one (`.lock` comes first, with the folder), and all that a run may have.
RECORDS = (".lock", "status.json", "metrics.jsonl", "starts.jsonl", "checkpoints", "latents")
PARTS = {
    *RECORDS,
    *("config.yaml", "skipped.jsonl", "incidents", "model", "best", "samples"),
    *("tensorboard", "wandb", "wandb-id"),
}
FOLDERS = ("checkpoints", "samples", "model", "best", "latents")
LOGS = (".log", ".out", ".err", ".txt")  # a shell or a scheduler may have written them before the run


def check_place(settings: Any) -> None:
    """Raise ConfigError if ``run`` is the current folder, or among images or other files."""
    folder, run = settings.data.folder, Path(settings.run)
    if folder is not None and resolved(run).is_relative_to(resolved(folder)):
        raise ConfigError(f"run {settings.run} is inside data.folder {folder}, among the images: choose another place")
    for name in FOLDERS:
        if (run / name).exists() and not (run / name).is_dir():
            raise ConfigError(f"{run / name} is a file, but a run has a folder of that name: move it away")
    if any((run / name).exists() for name in RECORDS) or not run.is_dir():
        return
    if resolved(run) in (resolved(Path.cwd()), *resolved(Path.cwd()).parents):
        advice = "name a folder of its own, such as runs/photos"
        raise ConfigError(f"run {settings.run} is the current folder or one above it: {advice}")
    if (other := next((entry.name for entry in sorted(run.iterdir()) if _is_foreign(entry)), None)) is not None:
        advice = "name a new folder, or an existing run"
        raise ConfigError(f"run {settings.run} is a folder with other files in it ({other}): {advice}")


def _is_foreign(entry: Path) -> bool:
    """True for an entry that was not written by this run, a run below it, or a shell."""
    if entry.name in PARTS or entry.name.startswith(".") or entry.suffix in LOGS:
        return False
    return not (entry.is_dir() and any((entry / name).exists() for name in RECORDS))
