"""Runs that resume: newest or given checkpoint, damage, changed frozen models, failing saves."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import updates
from support.stages import Stages

from ldm.interop.intact import write_hashes
from ldm.runs.checkpoints import files as checkpoint
from ldm.runs.checkpoints.folder import steps
from ldm.runs.records import read_metrics


def test_from_an_earlier_checkpoint_a_run_ends_as_before(
    stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stages.folder / "autoencoder", run)
    assert stages.train("autoencoder", "--from", "4", f"run={run}") == 0
    out = capsys.readouterr().out
    assert (
        "resuming from update 4" in out
        and f"set aside in {run}/checkpoints/set-aside-1: the checkpoints of update 6" in out
    )
    assert updates(run / "checkpoints") == [4, 6] and updates(run / "checkpoints/set-aside-1") == [6]
    for file in (stages.folder / "autoencoder/checkpoints/step-00000006").glob("*.safetensors"):
        assert file.read_bytes() == (run / "checkpoints/step-00000006" / file.name).read_bytes()
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 7))
    assert stages.train("autoencoder", f"run={run}", "--from", "5") == 4
    assert capsys.readouterr().err.endswith("there are 4, 6\n") and updates(run / "checkpoints") == [4, 6]


def test_a_run_without_one_intact_checkpoint_is_left_as_it_is(
    stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stages.folder / "autoencoder", run)
    (run / "status.json").unlink()
    for path in steps(run / "checkpoints"):
        (path / "optimizer_autoencoder.safetensors").unlink()
    assert stages.train("autoencoder", f"run={run}") == 4
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and "none of its 2 checkpoints is intact" in error
        and "optimizer_autoencoder.safetensors: is missing" in error
    )
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 7))


def test_half_written_checkpoints_are_removed_at_the_start(
    stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stages.folder / "autoencoder", run)
    half = run / "checkpoints/.tmp-step-00000005-99999999"  # no process has so large a number
    half.mkdir()
    (run / "status.json").unlink()
    assert stages.train("autoencoder", f"run={run}") == 0 and not half.exists()
    assert capsys.readouterr().out.count("left half-written") == 1


@pytest.mark.parametrize("changed", ["autoencoder", "text"])
def test_a_resume_with_another_frozen_model_is_refused_by_name(
    stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: str
) -> None:
    run = tmp_path / "run"
    again = "autoencoder" if changed == "autoencoder" else "clip"
    shutil.copytree(stages.folder / "ldm", run)
    shutil.rmtree(run / "latents")
    (run / "status.json").unlink()
    assert stages.train("ldm", f"run={run}") == 0  # as it was: the files may be read again
    held = stages.folder / again / "model"
    shutil.copytree(held, tmp_path / "held")
    try:
        (run / "status.json").unlink()
        shutil.rmtree(run / "latents")
        weights = next(held.glob("vae/*.safetensors" if changed == "autoencoder" else "text_encoder/*.safetensors"))
        content = bytearray(weights.read_bytes())
        content[-2] ^= 1  # a low bit of one weight
        weights.write_bytes(content)
        write_hashes(held, [weights])  # as another training would
        assert stages.train("ldm", f"run={run}") == 4
        assert (
            f"{changed} {stages.folder}/{again}: its weights have changed since this run began"
            in capsys.readouterr().err
        )
    finally:
        shutil.rmtree(held)
        shutil.copytree(tmp_path / "held", held)


# saves that fail


def failing_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """The disk is full for the checkpoints of these updates."""
    original: Callable[..., None] = checkpoint._fill

    def fill(folder: Path, step: int, *arguments: Any) -> None:
        if step in steps:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(folder, step, *arguments)

    monkeypatch.setattr(checkpoint, "_fill", fill)


def test_by_default_training_stops_at_a_failing_save(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing_at(monkeypatch, 4)
    assert stages.train("autoencoder", f"run={tmp_path}/run") == 4
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and "step-00000004: the checkpoint could not be written: No space left on device" in error
    )
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000002"]
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "failed"
    monkeypatch.undo()
    assert stages.train("autoencoder", f"run={tmp_path}/run") == 0
    assert "first checkpoint: " in capsys.readouterr().out


def test_or_goes_on_and_tries_again_but_never_without_its_last_save(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing_at(monkeypatch, 2)
    assert stages.train("autoencoder", f"run={tmp_path}/run", "train.save_errors=continue") == 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("warning: ") and "2 updates since 0 are not saved" in error
    assert updates(tmp_path / "run/checkpoints") == [4, 6]
    for name in ("model_autoencoder", "optimizer_autoencoder", "ema"):
        file = f"checkpoints/step-00000006/{name}.safetensors"
        assert (tmp_path / "run" / file).read_bytes() == (stages.folder / "autoencoder" / file).read_bytes()
    failing_at(monkeypatch, 6)
    assert stages.train("autoencoder", f"run={tmp_path}/other", "train.save_errors=continue") == 4
    assert "step-00000006: the checkpoint could not be written" in capsys.readouterr().err
    assert not (tmp_path / "other/model").exists()
    monkeypatch.undo()
    assert stages.train("autoencoder", f"run={tmp_path}/other", "train.save_errors=stop") == 0  # a resume may change it
