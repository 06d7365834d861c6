"""Two processes train as one does, with gradients, losses and draws compared; wrong set-ups are refused at the start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from ldm.cli.main import main
from ldm.evaluation.record import read_metrics

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(HERE.parent)}
BASE, UPDATES = 4, 50  # updates before the checkpoint that all variants go on from, and after it
TRAIN = {
    "batch_size": 4, "lr": 1e-3, "ema_decay": 0.9, "log_every": 1, "validate_every": 25, "validation_size": 6, "sample_every": 1000,
    "checkpoint_every": 1000, "trackers": [],
}  # fmt: skip
LR_GAN = 1e-4  # two networks against each other: at 1e-3 rounding grows to 5e-5 of a logit within 50 updates
TREES: dict[str, dict[str, Any]] = {
    "autoencoder": {
        "data": {"source": "textures", "image_size": 32, "size": 240},
        "model": {"channels": [8, 8, 8], "layers_per_level": 1, "groups": 4, "mid_attention": False},
        "loss": {"kl": 1e-3, "lpips": 0.0, "gan": 0.5, "gan_start": 1, "gan_ramp": 1, "disc_channels": 8, "disc_layers": 2},
    },
    "clip": {
        "data": {"source": "shapes", "image_size": 32, "size": 240},
        "model": {"width": 16, "layers": 1, "heads": 2, "max_length": 32, "merges": 32, "patch_size": 8, "projection": 8},
    },
    "ldm": {
        "data": {"source": "shapes", "image_size": 32, "size": 240, "flip": True},
        "caption_dropout": 0.3,
        "unet": {"channels": [16, 16], "layers_per_level": 1, "attention_levels": [1], "heads": [2], "groups": 4},
        "sample": {"steps": 2, "guidance_scale": 2.0},
    },
}
VARIANTS = {"autoencoder": ("2", "1"), "clip": ("null",), "ldm": ("2", "1")}  # micro-batches of two processes; CLIP refuses accumulation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each stage trained for BASE updates by one process, and the configurations to go on for UPDATES more."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, tree in TREES.items():
        more = {"autoencoder": f"{folder}/autoencoder", "text": f"{folder}/clip"} if name == "ldm" else {}
        config = folder / f"{name}.yaml"
        train = {**TRAIN, "steps": BASE + UPDATES} | ({"lr": LR_GAN} if name == "autoencoder" else {})
        config.write_text(yaml.safe_dump({"run": f"{folder}/{name}", **tree, **more, "train": train}))
        assert main([f"train-{name}", str(config), f"train.steps={BASE}"]) == 0
    return folder


def torchrun(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]


def started(launcher: list[str], *arguments: str) -> str:
    done = subprocess.run([*launcher, str(HERE / "ranks.py"), *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "FutureWarning" not in done.stderr
    return done.stdout


def losses(run: Path) -> list[dict[str, float]]:
    """Losses and validation figures after the checkpoint; gradients are compared where the weights are still equal."""
    kept = [line for line in read_metrics(run) if line["step"] > BASE]
    return [
        {k: v for k, v in line.items() if isinstance(v, float) and not k.startswith(("updates", "grad_norm", "adaptive"))} for line in kept
    ]


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TREES)
def test_several_processes_train_as_one_does(folder: Path, tmp_path: Path, name: str, processes: int) -> None:
    config, base = str(folder / f"{name}.yaml"), str(folder / name)
    variants = VARIANTS[name] if processes == 2 else ("null",)
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    whole = ("null",) if name == "clip" else ("4", "2")  # alone, and accumulated
    started([sys.executable], "train", str(one), name, config, base, *whole)
    said = started(torchrun(processes), "train", str(two), name, config, base, *variants)
    assert f"global batch 4 = {processes} processes × {4 // processes} × 1 accumulation" in said
    assert said.count("going on from update 4") == len(variants)
    expected, draws = load_file(one / "0.safetensors"), json.loads((one / "0.json").read_text())
    assert len(draws) == 4 * UPDATES and len(set(draws.values())) == len(draws)  # no two positions draw the same
    assert any(key.startswith("discriminator.") for key in expected) == (name == "autoencoder")
    others = [(one, i) for i in range(1, len(whole))] + [(two, i) for i in range(len(variants))]
    for place, number in others:
        assert json.loads((place / f"{number}.json").read_text()) == draws  # by position, not by rank
        gradients = load_file(place / f"{number}.safetensors")
        assert gradients.keys() == expected.keys()
        for network in {key.split(".")[0] for key in expected}:
            mine = {key: value for key, value in expected.items() if key.startswith(f"{network}.")}
            largest = max(float(value.abs().max()) for value in mine.values())
            assert largest > 0 and max(float((gradients[key] - value).abs().max()) for key, value in mine.items()) <= 1e-5 * largest
        logged, alone = losses(place / f"run{number}"), losses(one / "run0")
        assert len(logged) == len(alone) == UPDATES
        for a, b in zip(logged, alone, strict=True):
            assert a == pytest.approx(b, rel=1e-5, abs=1e-5)


def test_a_wrong_set_up_stops_at_the_start(folder: Path, tmp_path: Path) -> None:
    said = started(torchrun(2), "sabotage", str(tmp_path), "ldm", str(folder / "ldm.yaml"))
    messages = {name: texts for line in said.splitlines() if line.startswith("{") for name, texts in json.loads(line).items()}
    assert messages.keys() == {"gradients", "weights", "positions", "noise"}
    wanted = {
        "gradients": "the processes differ in the gradients of unet",
        "weights": "the processes differ in the weights of unet",
        "positions": "processes read the same positions",
        "noise": "the draws 'eps' repeat at different positions",
    }
    for name, texts in messages.items():
        assert len(texts) == 2 and texts[0] == texts[1] and wanted[name] in texts[0], texts
