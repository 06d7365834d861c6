"""Two processes train as one does, also from the middle on.

Gradients, losses and draws compared. Wrong set-ups are refused.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file
from support.launches import started, torchrun
from support.ranks import Job, write
from support.stages import STUDENT

from ldm import config as configuration
from ldm.cli.main import main
from ldm.config import ClipTrainingConfig, ConfigError
from ldm.data.dataset import plan_batch
from ldm.runs.records import read_metrics

BASE, UPDATES = 4, 50  # updates before the checkpoint that all variants continue from, and after it
MIDDLE = BASE + UPDATES // 2  # where the number of processes changes
TRAIN = {
    "batch_size": 8, "lr": 1e-3, "ema_decay": 0.9, "log_every": 1, "validate_every": MIDDLE,
    "validation_size": 6, "sample_every": 1000,
    "checkpoint_every": MIDDLE, "trackers": [], "warmup": 40,
}  # fmt: skip
GAN = {
    "lr": 1e-4
}  # two networks against each other: at a rate of 1e-3 rounding grows to 3e-3 of a figure within 50 updates
TREES: dict[str, dict[str, Any]] = {
    "autoencoder": {
        "data": {"source": "textures", "image_size": 32, "size": 480},
        "model": {"channels": [8, 8, 8], "layers_per_level": 1, "groups": 4, "mid_attention": False},
        "loss": {
            "kl": 1e-3,
            "lpips": 0.0,
            "gan": 0.5,
            "gan_start": 1,
            "gan_ramp": 1,
            "disc_channels": 8,
            "disc_layers": 2,
        },
    },
    "clip": {
        "data": {"source": "shapes-two", "image_size": 32, "size": 480},
        "swap_relations": True,
        "model": {
            "width": 16,
            "layers": 1,
            "heads": 2,
            "max_length": 32,
            "merges": 32,
            "patch_size": 8,
            "projection": 8,
        },
    },
    "ldm": {
        "data": {"source": "shapes", "image_size": 32, "size": 480, "flip": True},
        "caption_dropout": 0.3,
        "unet": {"channels": [16, 16], "layers_per_level": 1, "attention_levels": [1], "heads": [2], "groups": 4},
        "sample": {"steps": 2, "guidance_scale": 2.0},
    },
    "classifier": {"model": {"channels": [8, 8], "groups": 4}},
}
TREES["lora"] = {**TREES["ldm"], "train": {"lora": {"rank": 2}}}
SMOOTH = {**STUDENT["distill"], "huber": 0.1}  # the gradient of |d| jumps at 0, and rounding with it
TREES["student"] = {**TREES["ldm"], **STUDENT, "distill": SMOOTH}
STAGE_2 = ("ldm", "lora", "student")
ACCUMULATED = ("autoencoder", "ldm")  # with accumulation on one process as well as on two; CLIP refuses it


def photos(folder: Path) -> dict[str, Any]:
    """Data with two classes of noise that differ a little."""
    for name, mean in (("dark", 110), ("light", 140)):
        (folder / name).mkdir(parents=True)
        for i in range(40):
            noise = np.random.default_rng(i + mean).normal(mean, 40, (32, 32, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noise).save(folder / name / f"{i}.png")
    return {"folder": str(folder), "captions": "class", "image_size": 32, "validation_fraction": 0.3}


def configured(folder: Path) -> None:
    """Each stage's configuration, and each trained for BASE updates by one process."""
    for name, tree in TREES.items():
        more = {"autoencoder": f"{folder}/autoencoder", "text": f"{folder}/clip"} if name in STAGE_2 else {}
        more |= {"init": f"{folder}/ldm"} if name in STAGE_2[1:] else {}
        more |= {"diffusion": f"{folder}/ldm", "data": photos(folder / "photos")} if name == "classifier" else {}
        config = folder / f"{name}.yaml"
        train = {**TRAIN, "steps": BASE + UPDATES, **tree.get("train", {})} | (GAN if name == "autoencoder" else {})
        config.write_text(yaml.safe_dump({"run": f"{folder}/{name}", **tree, **more, "train": train}))
        assert main([f"train-{'ldm' if name in STAGE_2 else name}", str(config), f"train.steps={BASE}"]) == 0


def jobs(folder: Path, which: dict[str, int | None], names: Iterable[str], **changes: Any) -> list[Job]:
    """Of each stage, one job for each name with its micro-batch."""
    return [
        Job(
            str(folder / variant / name), name, str(folder / f"{name}.yaml"),
            changes.get("base", f"{folder}/{{}}").format(name),
            changes.get("at", BASE), None if name == "clip" else micro_batch, (changes.get("at", BASE), MIDDLE),
        )
        for name in names
        for variant, micro_batch in which.items()
    ]  # fmt: skip


def trained(folder: Path) -> list[str]:
    """All stages on one process, on two, with accumulation, and with the number changed in the middle.

    Each launch does the jobs of all stages, since starting torch takes longer than most of them.
    """
    one = jobs(folder, {"1x8": 8}, TREES) + jobs(folder, {"1x2": 2}, ACCUMULATED)
    two = jobs(folder, {"2x4": 4}, TREES) + jobs(folder, {"2x2": 2}, ACCUMULATED)
    two += jobs(folder, {"1to2": 4}, TREES, base=f"{folder}/1x8/{{}}/run", at=MIDDLE)
    back = jobs(folder, {"2to1": 8}, TREES, base=f"{folder}/2x4/{{}}/run", at=MIDDLE)
    alone = [sys.executable]
    launches = {"one": (alone, one), "two": (torchrun(2), two), "back": (alone, back)}
    return [
        started(launcher, "train", str(write(work, folder / f"{name}.json")))
        for name, (launcher, work) in launches.items()
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    configured(folder)
    return folder


@pytest.fixture(scope="module")
def said(folder: Path) -> list[str]:
    return trained(folder)


def losses(run: Path, after: int = BASE) -> list[dict[str, float]]:
    """Losses and validation figures after an update; gradients are compared where the weights are still equal."""
    kept = [line for line in read_metrics(run) if line["step"] > after]
    return [
        {
            k: v
            for k, v in line.items()
            if isinstance(v, float) and not k.startswith(("updates", "grad_norm", "adaptive"))
        }
        for line in kept
    ]


def largest_share(place: Path, straight: Path, update: int) -> float:
    """Of the gradients of an update, the largest deviation in any network over its largest gradient."""
    found, expected = load_file(place / "gradients.safetensors"), load_file(straight / "gradients.safetensors")
    keys = [key for key in expected if key.startswith(f"{update}.")]
    assert keys and set(keys) == {key for key in found if key.startswith(f"{update}.")}
    shares = []
    for network in {key.split(".")[1] for key in keys}:
        mine = [key for key in keys if key.split(".")[1] == network]
        largest = max(float(expected[key].abs().max()) for key in mine)
        assert largest > 0
        shares.append(max(float((found[key] - expected[key]).abs().max()) for key in mine) / largest)
    return max(shares)


def check(place: Path, straight: Path, after: int = BASE) -> None:
    """Draws by position, not by rank; the gradients of the first update; losses to the end."""
    draws, all_draws = (json.loads((where / "draws.json").read_text()) for where in (place, straight))
    assert draws == {position: digest for position, digest in all_draws.items() if int(position) >= 8 * after}
    assert len(all_draws) == 8 * UPDATES and len(set(all_draws.values())) == len(
        all_draws
    )  # no two positions draw the same
    if after == BASE:
        assert largest_share(place, straight, BASE) <= 1e-5
    mine, alone = losses(place / "run", after), losses(straight / "run", after)
    assert len(mine) == len(alone) == BASE + UPDATES - after
    for a, b in zip(mine, alone, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", TREES)
def test_several_processes_train_as_one_does(folder: Path, said: list[str], name: str) -> None:
    assert (
        "global batch 8 = 2 processes × 4 × 1 accumulation" in said[1]
        and "global batch 8 = 1 process × 2 × 4 accumulation" in said[0]
    )
    straight = folder / "1x8" / name
    assert any(".discriminator." in key for key in load_file(straight / "gradients.safetensors")) == (
        name == "autoencoder"
    )
    for variant in ("2x4", *(("1x2", "2x2") if name in ACCUMULATED else ())):
        check(folder / variant / name, straight)


@pytest.mark.parametrize("variant", ["2to1", "1to2"])
@pytest.mark.parametrize("name", TREES)
def test_the_number_of_processes_may_change_at_a_resume(folder: Path, said: list[str], name: str, variant: str) -> None:
    assert said[{"1to2": 1, "2to1": 2}[variant]].count(f"resuming from update {MIDDLE} ") == len(TREES)
    check(folder / variant / name, folder / "1x8" / name, MIDDLE)


@pytest.mark.slow
def test_four_processes_train_as_one_does(folder: Path, said: list[str]) -> None:
    work = jobs(folder, {"4x2": 2}, TREES) + jobs(folder, {"4x1": 1}, ACCUMULATED)
    assert "= 4 processes × 2 × 1 acc" in started(torchrun(4), "train", str(write(work, folder / "four.json")))
    for job in work:
        check(Path(job.out), folder / "1x8" / job.command)


def test_what_cannot_be_split_over_processes_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"^train\.batch_size 8 is not a multiple of 3 processes$"):
        plan_batch(8, None, 3, 0)
    with pytest.raises(
        ConfigError, match=r"^train\.batch_size 8 is not a multiple of 2 processes × train\.micro_batch 8$"
    ):
        plan_batch(8, 8, 2, 0)
    with pytest.raises(
        ConfigError, match=r"train\.micro_batch must be null: the contrastive loss compares the whole global batch"
    ):
        configuration.build(
            ClipTrainingConfig, {"run": "r", **TREES["clip"], "train": {"batch_size": 8, "micro_batch": 4}}
        )


def test_a_wrong_set_up_stops_at_the_start(folder: Path, tmp_path: Path) -> None:
    said = started(torchrun(2), "sabotage", str(tmp_path), "ldm", str(folder / "ldm.yaml"))
    messages = {
        name: texts for line in said.splitlines() if line.startswith("{") for name, texts in json.loads(line).items()
    }
    assert messages.keys() == {"gradients", "weights", "positions", "noise"}
    wanted = {
        "gradients": "the processes differ in the gradients of unet",
        "weights": "the processes differ in the weights of unet",
        "positions": "processes read the same positions",
        "noise": "the draws 'eps' repeat at different positions",
    }
    for name, texts in messages.items():
        assert len(texts) == 2 and texts[0] == texts[1] and wanted[name] in texts[0], texts
