"""The place of a run: a folder of its own, never among other files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm.config import ConfigError
from ldm.files.disk import resolved

PARTS = (  # that only a run has; `.lock` comes first, with the folder
    ".lock", "config.yaml", "status.json", "metrics.jsonl", "starts.jsonl", "skipped.jsonl", "checkpoints", "incidents", "latents", "model",
    "samples", "tensorboard", "wandb", "wandb-id",
)  # fmt: skip
RECORDS = (
    ".lock",
    "status.json",
    "metrics.jsonl",
    "starts.jsonl",
    "checkpoints",
    "latents",
)  # of which a run that was begun has some
FOLDERS = ("checkpoints", "samples", "model", "latents")
LOGS = (".log", ".out", ".err", ".txt")  # what a shell or a scheduler writes may lie there first


def check_place(settings: Any) -> None:
    """Raise ConfigError where ``run`` cannot hold a run: among the images, the current folder, a folder of other things."""
    folder, run = settings.data.folder, Path(settings.run)
    if folder is not None and resolved(run).is_relative_to(resolved(folder)):
        raise ConfigError(
            f"run {settings.run} lies inside data.folder {folder}, among the images: choose another place"
        )
    for name in FOLDERS:
        if (run / name).exists() and not (run / name).is_dir():
            raise ConfigError(f"{run / name} is a file, where a run has a folder: move it away")
    if any((run / name).exists() for name in RECORDS) or not run.is_dir():
        return
    if resolved(run) in (resolved(Path.cwd()), *resolved(Path.cwd()).parents):
        raise ConfigError(
            f"run {settings.run} is the current folder or one above it: name a folder of its own, such as runs/photos"
        )
    if (other := next((entry.name for entry in sorted(run.iterdir()) if _is_foreign(entry)), None)) is not None:
        raise ConfigError(
            f"run {settings.run} is a folder with other things in it ({other}): name a new folder, or an earlier run"
        )


def _is_foreign(entry: Path) -> bool:
    """True for an entry that neither this run, nor one below it, nor a shell has written."""
    if entry.name in PARTS or entry.name.startswith(".") or entry.suffix in LOGS:
        return False
    return not (entry.is_dir() and any((entry / name).exists() for name in RECORDS))
