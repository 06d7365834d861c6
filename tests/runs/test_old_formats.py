"""Runs, checkpoints, model folders and latent caches of an older version still open, with the same numbers.

`old_runs.zip` holds three tiny runs (autoencoder, CLIP, latent diffusion on scenes of 32×32) as commit c5812a8 wrote
them, before the modules moved to their rooms, and `drawn/a.png`, which it drew with them. That commit also computed the
losses below. Their files were cut to what a resumed run, a sample and the latent cache need.
"""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.command_line import caller

from ldm.config import DiffusionTrainingConfig, load_run
from ldm.data import latent_cache
from ldm.data.sources import open_source
from ldm.pipeline.codec import autoencoder_hash
from ldm.runs.checkpoints.folder import newest_valid, step_of
from ldm.runs.records import read_metrics

LOSS = 1.1701757907867432  # of update 3
VALIDATION = 1.1171556115150452


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The old runs, in the current folder."""
    with zipfile.ZipFile(Path(__file__).with_name("old_runs.zip")) as archive:
        archive.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_old_model_folder_draws_the_same_image(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "a small red circle on a white background"
    for model, out in (("ldm", "of the run"), ("ldm/model", "of the folder")):
        code, _, err = caller(capsys)("sample", model, "--prompt", prompt, "--steps", "2", "--seed", "3", "--out", out)
        assert code == 0, err
        (picture,) = Path(out).glob("*.png")
        old, new = (np.asarray(Image.open(file)).astype(int) for file in ("drawn/a.png", picture))
        assert old.shape == (32, 32, 3) and old.std() > 10
        assert np.abs(new - old).max() <= 1  # rounding on another processor
    code, out, err = caller(capsys)("reproduce", "drawn/a.png")
    assert code in (0, 1), out + err  # its record is read; 1: other bytes, on another processor


def test_an_old_run_continues_with_the_same_loss(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest, problems = newest_valid(place / "ldm/checkpoints")
    assert newest is not None and step_of(newest) == 2 and problems == []
    call = caller(capsys)
    for command in (["status", "ldm"], ["checkpoints", "ldm"], ["diff", "ldm", "ldm"], ["inspect", "autoencoder"]):
        code, out, err = call(*command)
        assert code == 0, out + err
    cache = {file.name: file.stat().st_mtime_ns for file in (place / "ldm/latents").iterdir()}
    code, out, err = call("train-ldm", "ldm.yaml", "train.steps=3")
    assert code == 0 and "encoding" not in out, out + err
    assert {file.name: file.stat().st_mtime_ns for file in (place / "ldm/latents").iterdir()} == cache
    logged = read_metrics(place / "ldm")
    assert [line["step"] for line in logged] == [1, 2, 3]
    assert logged[2]["loss"] == pytest.approx(LOSS, rel=1e-4)
    assert logged[2]["validation/loss"] == pytest.approx(VALIDATION, rel=1e-4)


def test_an_old_latent_cache_is_opened_by_its_key(place: Path) -> None:
    config = load_run("ldm")
    assert isinstance(config, DiffusionTrainingConfig)
    source = open_source(config.data, "train")
    key = latent_cache.cache_key(autoencoder_hash(config.autoencoder), source, config.data)
    held = json.loads((place / "ldm/latents/cache.json").read_text(encoding="utf-8"))
    assert {name: held[name] for name in key} == key
    cache = latent_cache.LatentCache(place / "ldm/latents", key)
    assert cache.length == 4 and cache.moments(0).shape == (8, 8, 8)
    assert [cache.text(i) for i in range(4)] == [source.text(i) for i in range(4)]
