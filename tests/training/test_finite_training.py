"""Weights that become infinite or NaN: found before they are saved or exported, named, and older checkpoints stay."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from support.cut_runs import at_position, make_loop
from support.stages import DIFFUSION, TRAIN, Stages

from ldm.cli.main import main
from ldm.runs.checkpoints import files as checkpoint
from ldm.runs.checkpoints import folder as shelf
from ldm.runs.records import read_metrics, read_status
from ldm.training import optimizers
from ldm.training.finite import TrainingError, not_finite
from ldm.training.loop import Loop
from ldm.training.stages.autoencoder import AutoencoderTask

__all__ = ["make_loop"]  # a fixture

LEARNED = {
    **DIFFUSION,
    "autoencoder": "none",
    "text": "none",
    "caption_dropout": 0.0,
    "schedule": {"name": "learned", "num_steps": 100},
}


def updates(run: Path) -> list[int]:
    return [shelf.step_of(path) for path in shelf.steps(run / "checkpoints")]


# the check


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_large_numbers_are_finite_and_others_are_named(dtype: torch.dtype) -> None:
    largest = torch.full((7, 300), torch.finfo(dtype).max, dtype=dtype)  # whose sum of squares is not finite
    state: dict[str, dict[str, torch.Tensor]] = {
        "ema": {"a": largest, "none": torch.empty(0, dtype=dtype), "count": torch.tensor(3)},
        "model_unet": {"a": -largest, "b": largest.clone(), "c": largest.clone()},
        "optimizer_unet": {"a.exp_avg_sq": largest.clone()},
    }
    scalars = {"step": 3, "task": {"adaptive_weight": 0.5, "timesteps": {"losses": [[1.0, 2.0]]}}, "scaler": None}
    assert not_finite(state, scalars) is None
    scalars["task"]["timesteps"]["losses"][0][1] = math.inf
    assert not_finite(state, scalars) == "the state (task.timesteps.losses) is"
    state["optimizer_unet"]["a.exp_avg_sq"][6, 299] = math.inf
    assert not_finite(state, scalars) == "the optimizer's moments of unet (a.exp_avg_sq) are"
    state["model_unet"]["c"][0, 0], state["model_unet"]["b"][3, 3] = math.nan, -math.inf
    assert not_finite(state, scalars) == "the weights of unet (b and 1 more) are"
    state["ema"]["a"] = largest * math.nan
    assert not_finite(state, scalars) == "the averaged weights (a) are"


def test_every_group_of_a_checkpoint_is_looked_at_on_every_process(
    stages: Stages, make_loop: Callable[..., Loop]
) -> None:
    settings = stages.settings("autoencoder")
    loop = make_loop(AutoencoderTask(settings), settings)
    for name, network in loop.task.networks.items():
        sum(p.sum() for p in network.parameters()).backward()  # type: ignore[union-attr]
        loop.optimizers.each[name].step()
    groups = loop.state.tensors()
    assert set(groups) == {
        "ema",
        *(f"{kind}_{name}" for kind in ("model", "optimizer") for name in ("autoencoder", "discriminator")),
    }
    loop.step = 1
    for named in groups.values():
        tensor = next(t for t in named.values() if t.is_floating_point())
        with torch.no_grad():
            held = tensor.clone()
            tensor.view(-1)[-1] = math.inf
            with pytest.raises(TrainingError, match=r"not finite after update 1 \(after update 0 all was finite\)"):
                loop.guard.require_finite(loop.step)
            tensor.copy_(held)
    loop.guard._processes = replace(loop.processes, gather=lambda mine: [mine, "the weights of unet (x) are"])
    with pytest.raises(TrainingError, match=r"the weights of unet \(x\) are not finite"):  # of another process
        loop.guard.require_finite(loop.step)


# whole runs


@pytest.fixture(scope="module")
def configurations(stages: Stages) -> dict[str, list[str]]:
    """The command and the configuration of every stage."""
    folder = stages.folder
    for label in ("dark", "light"):
        (folder / "photos" / label).mkdir(parents=True)
        for i in range(12):
            noise = np.random.default_rng(i).integers(0, 128, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(noise + 127 * (label == "light")).save(folder / f"photos/{label}/{i}.png")
    own = {"autoencoder": f"{folder}/autoencoder", "text": f"{folder}/clip", "init": f"{folder}/ldm"}
    photos = {
        "source": "folder",
        "folder": f"{folder}/photos",
        "captions": "class",
        "image_size": 32,
        "validation_fraction": 0.3,
    }
    trees: dict[str, dict[str, Any]] = {
        "lora": {**DIFFUSION, **own, "train": {**TRAIN, "lora": {"rank": 2}}},
        "learned": LEARNED,
        "classifier": {
            "data": photos,
            "diffusion": f"{folder}/ldm",
            "model": {"channels": [8, 8], "groups": 4},
            "train": TRAIN,
        },
    }
    for name, tree in trees.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"run": str(folder / name), **tree}), encoding="utf-8")
    commands = {"lora": "train-ldm", "learned": "train-ldm"}
    names = ("autoencoder", "clip", "ldm", *trees)
    return {name: [commands.get(name, f"train-{name}"), str(folder / f"{name}.yaml")] for name in names}


def rate_at(monkeypatch: pytest.MonkeyPatch, update: int, rate: float) -> None:
    original = optimizers.learning_rate
    monkeypatch.setattr(optimizers, "learning_rate", lambda config, k: rate if k == update else original(config, k))


@pytest.mark.parametrize("name", ["autoencoder", "clip", "ldm", "lora", "learned", "classifier"])
def test_weights_that_a_finite_gradient_makes_infinite_end_the_run(
    configurations: dict[str, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    rate_at(monkeypatch, 4, 1e39)
    assert (
        main(
            [
                *configurations[name],
                f"run={tmp_path}/run",
                "train.steps=9",
                "train.checkpoint_every=4",
                "train.validate_every=9",
            ]
        )
        == 5
    )
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "are not finite after update 5 (after update 4 all was finite)" in error
    assert updates(tmp_path / "run") == [4] and not (tmp_path / "run/model").exists()
    assert read_metrics(tmp_path / "run")[-1]["step"] == 5  # not after ten that are skipped
    for path in shelf.steps(tmp_path / "run/checkpoints"):
        assert all(bool(t.isfinite().all()) for file in path.glob("*.safetensors") for t in load_file(file).values())
    status = read_status(tmp_path / "run") or {}
    assert (status["state"], status["code"]) == ("failed", 5)


@pytest.mark.parametrize("rate", [1e39, 1e30])
def test_weights_broken_by_the_last_updates_are_not_exported(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rate: float
) -> None:
    """At 1e30 they are finite, and what they compute is not."""
    rate_at(monkeypatch, 4, rate)
    assert stages.train("autoencoder", f"run={tmp_path}/run", "train.checkpoint_every=100") == 5
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ("update 5" in error)
    assert not (tmp_path / "run/model").exists() and updates(tmp_path / "run") == []


def test_skipped_updates_push_out_no_checkpoint(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = [f"run={tmp_path}/run", "train.checkpoint_every=1", "train.steps=20"]
    with monkeypatch.context() as patch:
        at_position(patch, lambda p: p >= 4 * 5, lambda sample: sample["image"].fill_(math.nan))
        assert stages.train("autoencoder", *every) == 5
    assert updates(tmp_path / "run")[:2] == [4, 5]
    assert stages.train("autoencoder", *every, "--from", "5") == 0
    assert updates(tmp_path / "run") == [19, 20]


def test_a_checkpoint_that_is_not_finite_is_not_resumed_from(
    stages: Stages, tmp_path: Path, make_loop: Callable[..., Loop], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stages.folder / "autoencoder", tmp_path / "run")
    (tmp_path / "run/status.json").unlink()
    newest = tmp_path / "run/checkpoints/step-00000006"
    tensors, state = checkpoint.load(newest)
    tensors["model_autoencoder"]["encoder.conv_in.weight"][0] = math.nan
    shutil.rmtree(newest)
    checkpoint.save(newest.parent, 6, tensors, state, stages.settings("autoencoder"))
    assert stages.train("autoencoder", f"run={tmp_path}/run") == 5
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and "the weights of autoencoder (encoder.conv_in.weight) are not finite at the start, after update 6" in error
    )
    assert stages.train("autoencoder", f"run={tmp_path}/run", "--from", "4") == 0
    assert json.loads((tmp_path / "run/status.json").read_text(encoding="utf-8"))["state"] == "done"
