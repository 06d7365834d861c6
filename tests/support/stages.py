"""Tiny networks of the three stages, and configuration files that train them."""

from pathlib import Path
from typing import Any

import yaml

from ldm import config as configuration
from ldm.cli.main import main
from ldm.config import AutoencoderTrainingConfig, ClipTrainingConfig, DiffusionTrainingConfig

TRAIN = {
    "steps": 6, "batch_size": 4, "micro_batch": 2, "lr": 1e-3, "warmup": 2, "ema_decay": 0.9, "log_every": 1,
    "validate_every": 6, "validation_size": 6, "sample_every": 6, "checkpoint_every": 2, "trackers": [],
}  # fmt: skip
AUTOENCODER = {
    "data": {"source": "textures", "image_size": 32, "size": 24},
    "model": {"channels": [8, 8, 8], "layers_per_level": 1, "groups": 4, "mid_attention": False},
    "loss": {
        "kl": 1e-3,
        "gan": 0.5,
        "gan_start": 2,
        "gan_ramp": 3,
        "disc_channels": 8,
        "disc_layers": 2,
        "disc_lr": 5e-4,
    },
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
STUDENT = {  # of a model of DIFFUSION, on top of it
    "distill": {"guidance_scale": 2.0, "intervals": 10},
    "caption_dropout": 0.0,
    "sample": {"sampler": "lcm", "grid": "lcm", "steps": 2, "guidance_scale": 1.0},
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
        cls = {"autoencoder": AutoencoderTrainingConfig, "clip": ClipTrainingConfig, "ldm": DiffusionTrainingConfig}[
            name
        ]
        return configuration.load(cls, self.folder / f"{name}.yaml", list(overrides))
