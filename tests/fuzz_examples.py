"""Small valid examples that `make fuzz` damages, and what a call of a command on them is."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from ldm.cli.main import main

DRAW = ["--steps", "2", "--prompt", "a photo", "--out", "out"]
HINTS = [  # what model.ckpt does not say
    "--groups", "4", "--vae-groups", "4", "--heads", "2", "--text-heads", "2", "--prediction", "eps", "--image-size",
    "32", "--text-act", "quick_gelu", "--scale", "1", "--tokenizer", "run/model/tokenizer",
]  # fmt: skip
READERS = (  # of a model
    ["sample", "{}", *DRAW], ["inspect", "{}"], ["inspect", "{}", "--json", "--no-hashes"],
    ["convert", "{}", "out/model.safetensors"], ["convert", "{}", "out", "--verify"],
    ["diff", "{}", "autoencoder/model"],
)  # fmt: skip
TRAIN = {
    "steps": 2, "batch_size": 2, "log_every": 1, "validate_every": 2, "validation_size": 2, "sample_every": 2,
    "checkpoint_every": 1, "trackers": [],
}  # fmt: skip
NETWORKS: dict[str, dict[str, Any]] = {
    "autoencoder": {"model": {"channels": [8, 8, 8], "layers_per_level": 1, "groups": 4, "mid_attention": False}},
    "clip": {
        "model": {
            "width": 16, "layers": 1, "heads": 2, "max_length": 16, "merges": 8, "patch_size": 8, "projection": 8,
        },
    },
    "ldm": {
        "autoencoder": "autoencoder", "text": "clip", "sample": {"steps": 2},
        "unet": {"channels": [8, 8], "layers_per_level": 1, "attention_levels": [1], "heads": [2], "groups": 4},
    },
}  # fmt: skip
TRAIN_LDM = ["train-ldm", "configs/ldm.yaml"]
RESUME = [*TRAIN_LDM, "train.steps=3"]

COMMANDS = [
    ["init", "images", "--out", "out"], [*TRAIN_LDM, "run=out"], ["train", "configs", "ldm.run=out"],
    ["checkpoints", "run"], ["cache-latents", "configs/ldm.yaml", "run=out"], ["sample", "run", *DRAW],
    ["status", "run"], ["diff", "run", "adapter"], ["reproduce", "pictures/00000-a-photo.png", "--out", "out"],
    ["report", "run", "--images", "4", "--out", "out"],
    ["plot", "reverse", "run", "--prompt", "a photo", "--out", "out.png"], ["plot", "schedules", "--out", "out.png"],
    ["replay", "run/incidents/x"], ["train-classifier", "classifier.yaml", "run=out"],
    ["convert", "model.ckpt", "out", *HINTS], ["convert", "run", "out.safetensors", "--verify"],
    ["inspect", "model.safetensors"], ["compare-autoencoders", "autoencoder", "autoencoder", "--out", "out"],
    ["train-autoencoder", "configs/autoencoder.yaml", "run=out"], ["train-clip", "configs/clip.yaml", "run=out"],
    ["evaluate", "run", "--images", "2", "--likelihood", "--timesteps", "2"],
    ["verify-resume", "configs/ldm.yaml", "--keep", "out"],
    ["sampler-report", "run", "--out", "out", "--steps", "2", "--samplers", "ddim", "--images", "2"],
]  # fmt: skip

TRAINING = (
    "train-autoencoder",
    "train-clip",
    "train-ldm",
    "train-classifier",
    "train",
    "cache-latents",
    "verify-resume",
)
LOOKS = [  # at a run
    ["status", "run"], ["status", "run", "--json"], ["checkpoints", "run"], ["checkpoints", "run", "--fast", "--json"],
    RESUME, ["report", "run", "--images", "0", "--out", "out/report.html"], ["diff", "run", "adapter"],
    ["sample", "run", *DRAW], ["plot", "forward", "run", "--images", "2"], ["replay", "run/incidents/update-1"],
]  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A command line, or a call of the pipeline, and what may come of it."""

    what: str  # was done to the input
    argv: list[str]
    codes: tuple[int, ...]  # with which it may be refused
    refused: bool = False  # it must be
    same: bool = False  # or else it gives what the undamaged input gives
    out: tuple[str, ...] = ("out",)  # where there is nothing after a refusal
    encoding: str = "utf-8"  # of the terminal
    disk: int | None = None  # bytes after which no file can grow
    python: Callable[[], Any] | None = None  # in place of a command; what it returns are pictures
    names: str = ""  # stands in the refusal


def build_examples() -> None:
    """Write images, runs of three stages and of a LoRA, two single files and a picture to this folder."""
    for name in ("images", "configs", "classes/even", "classes/odd"):
        Path(name).mkdir(parents=True)
    for i in range(12):
        pixels = np.arange(3 * 40 * (36 + i), dtype=np.uint8).reshape(40, 36 + i, 3) // (i + 1)
        for place in (f"images/{i}.png", f"classes/{'odd' if i % 2 else 'even'}/{i}.png"):
            Image.fromarray(pixels).save(place)
    rows = [{"file_name": f"{i}.png", "text": f"a photo of number {i}"} for i in range(12)]
    Path("images/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("prompts.txt").write_text("a photo\na photo of number 3\n")
    data = {"folder": "images", "image_size": 32, "validation_fraction": 0.3}
    for name, tree in NETWORKS.items():
        whole = {"run": "run" if name == "ldm" else name, "data": data, "train": TRAIN, **tree}
        Path(f"configs/{name}.yaml").write_text(yaml.safe_dump(whole))
    classes = {**data, "folder": "classes", "captions": "class"}
    classifier = {
        "run": "classifier",
        "data": classes,
        "diffusion": "run",
        "model": {"channels": [8], "groups": 4},
        "train": TRAIN,
    }
    Path("classifier.yaml").write_text(yaml.safe_dump(classifier))
    adapter = [*TRAIN_LDM, "init=run", "train.lora.rank=2", "run=adapter"]
    for argv in (["train", "configs"], adapter, ["sample", "run", *DRAW], ["convert", "run", "model.safetensors"]):
        if main(argv):
            raise RuntimeError(f"the examples cannot be built: {argv}")
    Path("out").rename("pictures")
    torch.save({"state_dict": load_file("model.safetensors"), "epoch": 1}, "model.ckpt")
    shutil.copytree("run/model", "pickled", ignore=shutil.ignore_patterns("ldm.json"))
    weights = Path("pickled/unet/diffusion_pytorch_model.safetensors")
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    for argv in (["inspect", "pickled"], ["inspect", "model.ckpt", *HINTS]):
        if main(argv):
            raise RuntimeError(f"the examples are not good: {argv}")


def reader(draw: random.Random, model: str) -> list[str]:
    return [word.format(model) for word in draw.choice(READERS)]
