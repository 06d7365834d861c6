"""The comparison of `make torture`, and two of its trials."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torture
from torture import STEPS, Stage, differing, moment


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """What a finished run leaves, in the names alone."""
    run = tmp_path / "run"
    for name in (f"checkpoints/step-{STEPS:08d}", "model/vae"):
        (run / name).mkdir(parents=True)
    for name in ("ema", "model_a", "optimizer_a", "model_b", "optimizer_b"):
        (run / f"checkpoints/step-{STEPS:08d}/{name}.safetensors").write_bytes(name.encode())
    (run / f"checkpoints/step-{STEPS:08d}/state.json").write_text("{}")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (run / f"model/vae/{name}").write_text(name)
    lines = [json.dumps({"step": k, "loss": k / 3, "updates_per_second": 1.0}) + "\n" for k in range(1, STEPS + 1)]
    (run / "metrics.jsonl").write_text("".join(lines))
    return run


def test_whatever_differs_at_the_end_is_found(finished: Path, tmp_path: Path) -> None:
    last = f"checkpoints/step-{STEPS:08d}"
    other = Path(shutil.copytree(finished, tmp_path / "other"))
    metrics = other / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"updates_per_second": 1.0', '"updates_per_second": 2.0'))
    assert differing(other, finished) == []
    for name in (
        f"{last}/ema.safetensors",
        f"{last}/optimizer_b.safetensors",
        f"{last}/state.json",
        "model/vae/config.json",
    ):
        whole = (other / name).read_bytes()
        (other / name).write_bytes(whole + b"x")
        assert differing(other, finished) == [name]
        (other / name).unlink()
        assert differing(other, finished) != []
        (other / name).write_bytes(whole)
    lines = metrics.read_text().splitlines(keepends=True)
    for wrong in (lines[:-1], [*lines, lines[4]], [lines[0].replace("0.333", "0.334"), *lines[1:]]):
        metrics.write_text("".join(wrong))
        assert len(differing(other, finished)) == 1


def test_moments_cover_the_run_evenly() -> None:
    stage = Stage("ldm", Path(), Path(), [0.0, *(1.0 + k for k in range(STEPS)), 2.0 + STEPS])
    draw = random.Random(0)
    drawn = [moment(stage, 0, draw) for _ in range(3000)]
    assert all(0 <= seconds <= 2 and 0 <= updates <= STEPS for updates, seconds in drawn)
    counts = [sum(updates == k for updates, _ in drawn) for k in range(STEPS + 1)]
    assert min(counts) > 50 and counts[STEPS] > 130  # the last span, export and all, is twice as long
    assert all(moment(stage, 20, draw)[0] >= 20 for _ in range(100))


@pytest.mark.slow
def test_two_trials_of_each_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert torture.main(["--trials", "2", "--seed", "1", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert (
        "autoencoder: 2 of 2 identical" in said and "ldm: 2 of 2 identical" in said and said.count(": identical") == 4
    )
