"""For every test: shapes and types in signatures are checked, one thread, no network."""

import json
import os
import signal
import threading

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # sub-processes too
os.environ["MPLBACKEND"] = "Agg"

import jaxtyping

# Before the first import of what is checked. The numeric tower: an int is a float to Python's type checkers.
jaxtyping.install_import_hook(["ldm", "autoencoder"], "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ldm import config as configuration
from ldm.cli.main import main
from ldm.config import SCHEDULES, AutoencoderRun, ClipRun, DiffusionRun, ScheduleConfig
from ldm.diffusion.schedule import Schedule

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it

torch.set_num_threads(1)


class PowerCut(BaseException):
    """An end that nothing catches, so that nothing is saved before it.

    Of the checkpoint being written it waits for the end, so that what is on the disk does not depend on the machine's speed.
    """

    def __init__(self) -> None:
        end_writes()


def end_writes() -> None:
    """Wait for checkpoints that are being written behind this process's back."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


def forget_hashes(model: Path) -> Path:
    """Do what a model folder asks for whose weights are meant to change: take their hashes out of its ldm.json."""
    about = json.loads((model / "ldm.json").read_text(encoding="utf-8"))
    del about["sha256"]
    (model / "ldm.json").write_text(json.dumps(about), encoding="utf-8")
    return model


@pytest.fixture
def seed() -> None:
    """torch's global generator as at every other test that asks for it."""
    torch.manual_seed(0)


@pytest.fixture(params=sorted(SCHEDULES))
def schedule(request: pytest.FixtureRequest) -> Schedule:
    """Each schedule with its defaults."""
    return Schedule.from_config(ScheduleConfig(request.param))


# tiny networks of the three stages

TRAIN = {
    "steps": 6, "batch_size": 4, "micro_batch": 2, "lr": 1e-3, "warmup": 2, "ema_decay": 0.9, "log_every": 1, "validate_every": 6,
    "validation_size": 6, "sample_every": 6, "checkpoint_every": 2, "trackers": [],
}  # fmt: skip
AUTOENCODER = {
    "data": {"source": "textures", "image_size": 32, "size": 24},
    "model": {"channels": [8, 8, 8], "layers_per_level": 1, "groups": 4, "mid_attention": False},
    "loss": {"kl": 1e-3, "gan": 0.5, "gan_start": 2, "gan_ramp": 3, "disc_channels": 8, "disc_layers": 2, "disc_lr": 5e-4},
    "train": TRAIN,
}
CLIP = {
    "data": {"source": "shapes", "image_size": 32, "size": 24},
    "model": {"width": 16, "layers": 1, "heads": 2, "max_length": 32, "merges": 32, "patch_size": 8, "projection": 8},
    "train": {**TRAIN, "steps": 3, "micro_batch": None},
}
DIFFUSION = {
    "data": {"source": "shapes", "image_size": 32, "size": 24, "flip": True},
    "caption_dropout": 0.3,
    "unet": {"channels": [16, 16], "layers_per_level": 1, "attention_levels": [1], "heads": [2], "groups": 4},
    "train": {**TRAIN, "lr_schedule": "cosine"},
    "sample": {"steps": 2, "guidance_scale": 2.0},
}


class Stages:
    """Configuration files of the three stages, and each trained once without interruption."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        trees = {
            "autoencoder": AUTOENCODER,
            "clip": CLIP,
            "ldm": {**DIFFUSION, "autoencoder": f"{folder}/autoencoder", "text": f"{folder}/clip"},
        }
        for name, tree in trees.items():
            (folder / f"{name}.yaml").write_text(yaml.safe_dump({"run": str(folder / name), **tree}))

    def train(self, name: str, *overrides: str) -> int:
        return main([f"train-{name}", str(self.folder / f"{name}.yaml"), *overrides])

    def settings(self, name: str, *overrides: str) -> Any:
        cls = {"autoencoder": AutoencoderRun, "clip": ClipRun, "ldm": DiffusionRun}[name]
        return configuration.load(cls, self.folder / f"{name}.yaml", list(overrides))


@pytest.fixture(autouse=True)
def _denormals() -> None:
    """Training flushes them to zero for its whole process, which hypothesis refuses to draw numbers under."""
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    trained = Stages(tmp_path_factory.mktemp("stages"))
    for name in ("autoencoder", "clip", "ldm"):
        assert trained.train(name) == 0
    return trained
