"""Train the stages configured in a folder, in order: autoencoder.yaml, clip.yaml, ldm.yaml.

  ldm train configs/demo
  ldm train configs/demo ldm.train.steps=3000

If interrupted, the same command resumes; finished stages are skipped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ldm import config
from ldm.cli import train_autoencoder, train_clip, train_ldm
from ldm.runs.place import check_place

STAGES = {"autoencoder": train_autoencoder, "clip": train_clip, "ldm": train_ldm}
CLASSES = {
    "autoencoder": config.AutoencoderTrainingConfig,
    "clip": config.ClipTrainingConfig,
    "ldm": config.DiffusionTrainingConfig,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder and its overrides."""
    parser.add_argument(
        "folder", metavar="FOLDER", help="a folder with the stages' configurations, such as configs/demo"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="STAGE.key=value",
        help="settings that replace those of a stage's file, such as ldm.train.lr=1e-4",
    )


def run(arguments: argparse.Namespace) -> None:
    """Check all stages, then train each."""
    folder = Path(arguments.folder)
    files = {stage: folder / f"{stage}.yaml" for stage in STAGES if (folder / f"{stage}.yaml").is_file()}
    if folder.is_file():
        raise config.ConfigError(f"{folder} is a file: name the folder that holds the configurations")
    if not files:
        raise config.ConfigError(f"{folder} holds none of {', '.join(f'{stage}.yaml' for stage in STAGES)}")
    overrides = _by_stage(arguments.overrides, list(files))
    settings = {stage: _load(stage, file, overrides[stage]) for stage, file in files.items()}
    for name in ("mixed_precision", "rank_timeout"):  # accelerate has one for the whole process
        if len(kinds := {str(getattr(s.train, name)) for s in settings.values()}) > 1:
            values = ", ".join(sorted(kinds))
            raise config.ConfigError(
                f"train.{name} differs between the stages ({values}): make it equal, or train each stage on its own"
            )
    for one in settings.values():
        check_place(one)
    for stage, file in files.items():
        STAGES[stage].run(argparse.Namespace(config=file, overrides=overrides[stage]))


def _load(stage: str, file: Path, overrides: list[str]) -> Any:
    try:
        return config.load(CLASSES[stage], file, overrides)
    except config.ConfigError as error:
        raise config.ConfigError(f"{file}: {error}") from None


def _by_stage(overrides: list[str], stages: list[str]) -> dict[str, list[str]]:
    """Group overrides by the stage that they name."""
    found: dict[str, list[str]] = {stage: [] for stage in stages}
    for override in overrides:
        stage, dot, setting = override.partition(".")
        if stage not in found or not dot:
            raise config.ConfigError(
                f"override {override!r} must begin with a stage of the folder: {', '.join(f'{s}.' for s in stages)}"
            )
        found[stage].append(setting)
    return found
