"""`train.keep_best` and `train.patience` in whole runs: what is kept, where they end, and that kills change nothing.

The validation losses are given, one for each update; all else is the training of the tests' tiny latent diffusion.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.cut_runs import at_position, lines, power_cut
from support.interrupts import PowerCut
from support.launches import side_by_side
from support.stages import DIFFUSION, TRAIN, Stages
from torch import nn

from ldm.cli.main import main
from ldm.config import Figure, TrainConfig
from ldm.distributed.processes import Processes
from ldm.interop.text import read_text
from ldm.pipeline import Pipeline
from ldm.pipeline.codec import load_codec
from ldm.runs import best as record
from ldm.runs.directory import RunDirectory
from ldm.runs.records import read_status
from ldm.training.best import BestModel
from ldm.training.ema import EMA
from ldm.training.loop import Loop
from ldm.training.stages.diffusion import DiffusionTask

STEPS, BEST = 8, 3
LOSSES = {1: 5.0, 2: 4.0, 3: 2.0, 4: 3.0, 5: 2.2, 6: 3.0, 7: 3.0, 8: 3.0}
EVERY = [f"train.steps={STEPS}", "train.lr_schedule=constant", "train.validate_every=1", "train.sample_every=100"]
KEPT = [*EVERY, "train.keep_best=true"]
OPENED: dict[str, Any] = {"autoencoder": load_codec, "clip": read_text}


@pytest.fixture(autouse=True, scope="module")
def losses() -> Iterator[None]:
    """Validation losses of LOSSES, with a standard error of 0.5."""

    def validate(self: Any, update: int, *rest: Any) -> dict[str, Any]:
        return {"loss": LOSSES[update], "loss_error": 0.5}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionTask, "validate", validate)
        yield


@pytest.fixture(scope="module")
def straight(stages: Stages, losses: None) -> Path:
    """A run of eight updates that keeps its best model, never interrupted."""
    assert stages.train("ldm", f"run={stages.folder}/straight", *KEPT) == 0
    return stages.folder / "straight"


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_same(run: Path, straight: Path) -> None:
    """The last checkpoint, all of model/ and best/, and the metrics."""
    last = f"checkpoints/step-{STEPS:08d}"
    for name in (last, "model", "best"):
        one, two = files(run / name), files(straight / name)
        for own in ("config.yaml", "manifest.json"):  # they name the run
            one.pop(own, None)
            two.pop(own, None)
        assert one == two and len(one) > 3
    assert lines(run) == lines(straight) and "best.safetensors" in files(run / last)


def test_the_kept_model_is_that_of_a_run_that_ended_there(
    stages: Stages, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stages.train("ldm", f"run={tmp_path}/short", *EVERY, f"train.steps={BEST}") == 0  # constant rate: the same
    kept, short = files(straight / "best"), files(tmp_path / "short/model")
    assert json.loads(kept.pop("best.json")) == {"step": BEST, "figure": "loss", "value": 2.0, "error": 0.5}
    assert kept == short != files(straight / "model") and not (tmp_path / "short/best").exists()
    assert Pipeline.from_pretrained(straight / "best", "cpu")("a red circle", steps=2)[0].size == (32, 32)
    assert load_codec(straight / "best").hash == load_codec(straight).hash
    # evaluated by the run's configuration, into best/ itself
    before = files(straight / "model")
    assert main(["evaluate", str(straight / "best"), "--images", "2", "--tune", "0"]) == 0
    assert (straight / "best/report.json").is_file() and not (straight / "report.json").exists()
    assert files(straight / "model") == before
    assert (
        main(["evaluate", str(straight / "model"), "--images", "2"]) == 2 and "is not a run" in capsys.readouterr().err
    )
    for name in ("report.json", "samples.png", "curves.png"):
        (straight / "best" / name).unlink()


@pytest.mark.parametrize("update", [3, 7])  # the best is not saved yet; it is, and the rise is near
def test_a_run_that_is_killed_ends_as_if_nothing_had_happened(
    stages: Stages, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: int
) -> None:
    with monkeypatch.context() as patch:
        at_position(patch, lambda p: p == 4 * update + 2, power_cut)
        with pytest.raises(PowerCut):
            stages.train("ldm", f"run={tmp_path}/run", *KEPT)
    assert not (tmp_path / "run/best").exists()
    assert stages.train("ldm", f"run={tmp_path}/run", *KEPT) == 0
    assert_same(tmp_path / "run", straight)


@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_a_kill_around_the_export_leaves_whole_folders_alone(
    stages: Stages, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    (old := run / "best/old").touch()  # of an earlier end of this run
    (run / "status.json").write_text((run / "status.json").read_text().replace("done", "running"))
    export, status = DiffusionTask.export, RunDirectory.status

    def cut_export(self: Any, folder: Path) -> None:
        if folder.name != "model":
            if moment == "during":
                export(self, folder)
                (folder / "model_index.json").unlink()  # half of it
            raise PowerCut
        export(self, folder)

    def cut_status(self: Any, state: str, *rest: Any, **more: Any) -> None:
        if state == "done":
            raise PowerCut
        status(self, state, *rest, **more)

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        if moment == "after":
            patch.setattr(RunDirectory, "status", cut_status)
        else:
            patch.setattr(DiffusionTask, "export", cut_export)
            patch.setattr("ldm.files.disk.shutil", SimpleNamespace(rmtree=lambda *_: None))  # a kill clears nothing
        stages.train("ldm", f"run={run}", *KEPT)
    assert (run / "best/model_index.json").is_file() and old.exists() == (moment != "after")
    assert stages.train("ldm", f"run={run}", *KEPT) == 0
    assert_same(run, straight)
    assert [file.name for file in run.iterdir() if file.name.startswith(".") and file.name != ".lock"] == []


def test_a_full_disk_leaves_the_older_one_and_the_same_command_writes_it(
    stages: Stages, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    shutil.rmtree(run / "best")  # so that it is written again
    export = DiffusionTask.export

    def full(self: Any, folder: Path) -> None:
        if folder.name != "model":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        export(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(DiffusionTask, "export", full)
        assert stages.train("ldm", f"run={run}", *KEPT) == 2
    assert capsys.readouterr().err == f"ldm train-ldm: {run}/best: No space left on device\n"
    assert (read_status(run) or {})["state"] == "failed" and not list(run.glob("*best*")) + list(run.glob(".best*"))
    assert stages.train("ldm", f"run={run}", *KEPT) == 0
    assert_same(run, straight)


def test_a_run_that_is_cut_back_forgets_a_later_best(
    stages: Stages, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert stages.train("ldm", f"run={run}", *KEPT, "train.keep_every=2") == 0
    command = ["train-ldm", str(stages.folder / "ldm.yaml"), f"run={run}", *KEPT, "train.keep_every=2", "--from", "2"]
    (run / "status.json").unlink()  # else nothing is left to do
    seen: list[Any] = []

    def look(self: Loop) -> None:
        assert self.best.weights is not None
        seen.append((self.best.best.step, self.best.best.value, (run / "best").exists()))
        raise PowerCut

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(Loop, "train", look)
        main(command)
    assert seen == [(2, 4.0, False)]
    assert main(command[:-2]) == 0
    assert_same(run, straight)


def test_patience_ends_a_run_in_good_order(
    stages: Stages, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, short = tmp_path / "run", [*KEPT, "train.patience=4"]
    reason = "ended by train.patience: none of the last 4 validations was better than loss 2 ± 0.5 at update 3"
    with monkeypatch.context() as patch:
        at_position(patch, lambda p: p == 4 * 6 + 2, power_cut)
        with pytest.raises(PowerCut):
            stages.train("ldm", f"run={run}", *short)
    assert stages.train("ldm", f"run={run}", *short) == 0
    said = capsys.readouterr().out
    assert f"update 7 of 8: {reason}" in said and f"done: {run}" in said
    status = read_status(run) or {}
    assert (status["state"], status["step"], status["waited"], status["reason"]) == ("done", 7, 4, reason)
    assert lines(run) == lines(straight)[:7] and files(run / "best") == files(straight / "best")
    assert sorted(f.name for f in (run / "checkpoints").iterdir()) == ["step-00000006", "step-00000007"]
    assert list((run / "samples").glob("*-00000007.png"))
    assert main(["status", str(run)]) == 0 and reason in capsys.readouterr().out
    # again: nothing to do; with more patience it continues, as if it had had it from the start
    assert stages.train("ldm", f"run={run}", *short) == 0
    assert "already trained to update 7 of 8" in capsys.readouterr().out
    assert stages.train("ldm", f"run={run}", *KEPT) == 0
    assert_same(run, straight)
    assert "reason" not in (read_status(run) or {})


def test_patience_that_is_given_later_ends_the_run_where_it_is(
    stages: Stages, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(straight / "checkpoints/step-00000006", run / "checkpoints/step-00000006")
    shutil.copy(straight / "config.yaml", run / "config.yaml")
    assert stages.train("ldm", f"run={run}", *KEPT, "train.patience=2") == 0
    assert "already trained to update 6 of 8" in capsys.readouterr().out
    assert (read_status(run) or {})["waited"] == 3 and files(run / "best") == files(straight / "best")


def test_a_rise_is_told_once_and_keeping_may_begin_late(
    stages: Stages, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert stages.train("ldm", f"run={run}", *EVERY) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("validation loss")]
    assert len(told) == 1 and told[0].startswith(
        "validation loss is 3 after update 8, for 3 validations in a row above its best, loss 2 ± 0.5 at update 3."
    )
    assert "train.keep_best keeps" in told[0] and "train.patience ends" in told[0]
    assert main(["status", str(run)]) == 0
    assert "best validation loss 2 ± 0.5 at update 3 (worse in 3 validations since)" in capsys.readouterr().out
    shutil.rmtree(run / "checkpoints/step-00000008")
    assert stages.train("ldm", f"run={run}", *KEPT) == 0  # finished, but without best/
    said = capsys.readouterr().out
    assert "train.keep_best was off at the best validation (update 3): the next one begins anew" in said
    assert json.loads((run / "best/best.json").read_text())["step"] == 7
    assert files(run / "model") == files(straight / "model")


def test_a_lora_keeps_its_best(stages: Stages, tmp_path: Path) -> None:
    models = {"autoencoder": f"{stages.folder}/autoencoder", "text": f"{stages.folder}/clip"}
    tree = {"run": f"{tmp_path}/run", **DIFFUSION, **models, "init": f"{stages.folder}/ldm"}
    tree["train"] = {**TRAIN, "lora": {"rank": 2}, "lr": 5e-3}
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(tree))
    assert main(["train-ldm", str(tmp_path / "lora.yaml"), *KEPT, "train.keep_every=2", "train.steps=4"]) == 0
    run = tmp_path / "run"
    averages = [
        load_file(run / f"checkpoints/step-0000000{i}/{name}.safetensors") for i, name in ((4, "best"), (4, "ema"))
    ]
    kept = load_file(run / "best/pytorch_lora_weights.safetensors")
    assert sorted(t.norm().item() for t in kept.values()) == pytest.approx(
        sorted(t.norm().item() for t in averages[0].values())
    )
    assert any(not torch.equal(averages[0][key], averages[1][key]) for key in averages[0])
    opened = Pipeline.from_pretrained(run / "best", "cpu")
    assert opened.hash != Pipeline.from_pretrained(run, "cpu").hash


@pytest.mark.parametrize("stage", ["autoencoder", "clip"])
def test_other_stages_keep_theirs_too(stages: Stages, tmp_path: Path, stage: str) -> None:
    overrides = ["train.validate_every=1", "train.keep_best=true"] + ["loss.gan=0"] * (stage == "autoencoder")
    assert stages.train(stage, f"run={tmp_path}/run", *overrides) == 0
    settings = stages.settings(stage, *overrides)
    best = record.best_logged(settings.figure, lines(tmp_path / "run"))
    assert json.loads((tmp_path / "run/best/best.json").read_text())["step"] == best.step > 0
    assert best.error > 0
    kept, last = (OPENED[stage](tmp_path / place).hash for place in ("run/best", "run"))
    assert (kept == last) == (best.step == settings.train.steps)


def test_all_processes_follow_the_main_one() -> None:
    """Figures may differ in the last bits; only the main process keeps weights."""

    def work(processes: Processes) -> tuple[int, bool, bool]:
        ema = EMA(nn.Linear(2, 2), 0.9)
        best = BestModel(Figure("loss"), TrainConfig(keep_best=True, patience=2), ema, processes, lambda text: None)
        for step, loss in enumerate((3.0, 2.0, 2.0, 2.5), start=1):
            best.validated(step, {"loss": loss - 0.1 * step * processes.rank, "loss_error": 0.1})
        return best.best.step, best.over, best.weights is not None

    assert side_by_side(3, work) == [(2, True, True), (2, True, False), (2, True, False)]


def test_kept_weights_do_not_follow_the_average() -> None:
    network = nn.Linear(2, 2)
    ema = EMA(network, 0.0)
    best = BestModel(
        Figure("loss"), TrainConfig(keep_best=True), ema, Processes(0, 1, lambda value: [value]), lambda text: None
    )
    kept = []
    for step, loss in enumerate((3.0, 2.0, 4.0), start=1):
        with torch.no_grad():
            network.weight.fill_(step)
        ema.update(step)
        best.validated(step, {"loss": loss})
        kept.append(float(best.tensors()["best"]["weight"][0, 0]))
    assert kept == [1.0, 2.0, 2.0] and float(ema.state()["weight"][0, 0]) == 3.0
