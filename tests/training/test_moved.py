"""Runs whose data and models lie elsewhere than when they began, and runs that continue under other circumstances."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from support.cut_runs import at_position, power_cut
from support.interrupts import PowerCut
from support.model_folders import forget_hashes
from support.stages import DIFFUSION, TRAIN, Stages

from ldm.cli.main import main
from ldm.runs import provenance as starts


def photos(folder: Path, shade: int = 0) -> None:
    """Two classes of noise."""
    for label in ("dark", "light"):
        (folder / label).mkdir(parents=True)
        for i in range(12):
            noise = np.random.default_rng(i).integers(0, 100 + shade, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(noise + 127 * (label == "light")).save(folder / f"{label}/{i}.png")


def trees(here: Path, base: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Of each kind of training that names something.

    Its command and configuration, all it names below ``here`` and ``base``.
    """
    data = {
        "source": "folder",
        "folder": f"{here}/photos",
        "captions": "class",
        "image_size": 32,
        "validation_fraction": 0.3,
    }
    own = {"autoencoder": f"{here}/autoencoder", "text": f"{here}/clip"}
    train = {**TRAIN, "steps": 4}
    ldm = {**DIFFUSION, "data": data, **own, "train": train}
    return {
        "whole": ("train-ldm", {**ldm, "init": str(base)}),
        "lora": ("train-ldm", {**ldm, "init": str(base), "train": {**train, "lora": {"rank": 2}}}),
        "classifier": (
            "train-classifier",
            {"data": data, "diffusion": str(base), "model": {"channels": [8, 8], "groups": 4}, "train": train},
        ),
    }


def run_of(name: str, run: Path, here: Path, base: Path) -> list[str]:
    command, tree = trees(here, base)[name]
    file = run.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({"run": str(run), **tree}), encoding="utf-8")
    return [command, str(file)]


@pytest.fixture(scope="module")
def here(stages: Stages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, an autoencoder, a text encoder and a diffusion model."""
    folder = tmp_path_factory.mktemp("here")
    photos(folder / "photos")
    for name in ("autoencoder", "clip", "ldm"):
        shutil.copytree(stages.folder / name / "model", folder / name)
    return folder


@pytest.fixture(scope="module")
def straight(here: Path) -> Path:
    """Each kind of training, done without interruption."""
    for name in ("whole", "lora", "classifier"):
        assert main(run_of(name, here / f"straight-{name}", here, here / "ldm")) == 0
    return here


def disturb(place: Path) -> None:
    """Move one weight of each file in a folder, as another training would."""
    for about in place.rglob("ldm.json"):
        if "sha256" in json.loads(about.read_text(encoding="utf-8")):
            forget_hashes(about.parent)
    for file in place.rglob("*.safetensors"):
        tensors = load_file(file)
        name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
        tensors[name].view(-1)[0] += 1.0
        save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("name", ["whole", "lora", "classifier"])
def test_a_run_continues_where_all_that_it_names_has_moved(
    here: Path,
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    cut = tmp_path / "cut"
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        at_position(patch, lambda p: p == 4 * 3 + 1, power_cut)
        main(run_of(name, cut, here, here / "ldm"))
    there = tmp_path / "there"
    shutil.copytree(here, there)
    cut = cut.rename(tmp_path / "moved")  # the run as well
    capsys.readouterr()
    assert main(run_of(name, cut, there, there / "ldm")) == 0
    assert "resuming from update 2" in capsys.readouterr().out
    for file in (straight / f"straight-{name}/checkpoints/step-00000004").glob("*.safetensors"):
        assert file.read_bytes() == (cut / "checkpoints/step-00000004" / file.name).read_bytes(), file.name
    assert str(there) in (cut / "config.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "changed", "key"),
    [
        ("whole", "photos", "data.folder"), ("whole", "autoencoder", "autoencoder"), ("whole", "clip", "text"),
        ("whole", "ldm", "init"), ("lora", "ldm", "init"), ("classifier", "ldm", "diffusion"),
    ],
)  # fmt: skip
def test_what_is_not_the_same_elsewhere_is_refused_with_the_reason(
    here: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, changed: str, key: str
) -> None:
    run, there = tmp_path / "run", tmp_path / "there"
    shutil.copytree(straight / f"straight-{name}", run)
    before = (run / "config.yaml").read_bytes()
    shutil.copytree(here / changed, there / changed)
    if changed == "photos":
        shutil.rmtree(there / "photos")
        photos(there / "photos", 100)
    else:
        disturb(there / changed)
    arguments = run_of(name, run, here, here / "ldm")
    capsys.readouterr()
    assert main([*arguments, f"{key}={there}/{changed}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{key} " in error and str(there) in error
    assert ("other images or captions" if changed == "photos" else "other weights: sha256 ") in error
    assert (run / "config.yaml").read_bytes() == before
    assert (
        main([*arguments, f"{key}={there}/{changed}", "train.lr=0.5"]) == 2
    )  # with another setting nothing is looked at
    assert "train.lr" in capsys.readouterr().err


def test_a_finished_lora_whose_base_has_moved_is_exported_with_its_new_place(
    here: Path, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight / "straight-lora", run)
    shutil.copytree(here / "ldm", tmp_path / "elsewhere")
    reference = json.loads((run / "model/lora.json").read_text(encoding="utf-8"))
    (run / "model/lora.json").write_text(json.dumps({**reference, "base": ["../../gone", "/gone"]}), encoding="utf-8")
    draw = [
        "sample",
        str(run),
        "--prompt",
        "dark",
        "--steps",
        "1",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "images"),
    ]
    assert main(draw) == 4
    assert main(run_of("lora", run, here, tmp_path / "elsewhere")) == 0
    assert main(draw) == 0
    (tmp_path / "both").mkdir()
    for place in ("elsewhere", "run"):
        (tmp_path / place).rename(tmp_path / "both" / place)  # together: found by its place beside the run
    assert main([*draw[:1], str(tmp_path / "both/run"), *draw[2:]]) == 0


def test_a_run_without_checkpoint_cannot_say_what_it_had(
    here: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight / "straight-whole", run)
    shutil.rmtree(run / "checkpoints")
    (run / "status.json").unlink()
    shutil.copytree(here / "clip", tmp_path / "clip")
    assert main([*run_of("whole", run, here, here / "ldm"), f"text={tmp_path}/clip"]) == 2
    assert "no checkpoint, which would identify what it used" in capsys.readouterr().err


# other circumstances


def test_another_number_of_threads_is_recorded_and_warned_about(
    stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for threads, steps in ((1, 1), (2, 2), (2, 3)):
        torch.set_num_threads(threads)
        try:
            assert stages.train("autoencoder", f"run={tmp_path}/run", "data.workers=0", f"train.steps={steps}") == 0
        finally:
            torch.set_num_threads(1)
        said.append(capsys.readouterr().err)
    expected = "warning: not as when the checkpoint was written: threads 1 → 2: the end may differ in the last bits"
    assert [text.count(expected) for text in said] == [0, 1, 0], said
    lines = [json.loads(line) for line in (tmp_path / "run/starts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["threads"] for line in lines] == [1, 2, 2] and all(line["processor"] for line in lines)
    state = json.loads((tmp_path / "run/checkpoints/step-00000003/state.json").read_text(encoding="utf-8"))
    assert state["surroundings"]["threads"] == 2 and state["surroundings"]["torch"] == torch.__version__


def test_what_else_may_move_the_last_bits_is_named() -> None:
    now = {"ldm": "0.1.0", "torch": "2.15", "device": "cpu", "device_name": "AVX2", "threads": 1}
    assert (
        starts.changed(None, now) is None and starts.changed({}, now) is None and starts.changed(dict(now), now) is None
    )
    line = starts.changed({**now, "torch": "2.14", "device_name": "AVX512"}, now)
    assert line == "not as when the checkpoint was written: torch 2.14 → 2.15, processor AVX512 → AVX2"
