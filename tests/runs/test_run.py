"""The run directory: one writer, one configuration, a log that fits the step resumed from."""

import json
import multiprocessing
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support.stages import DIFFUSION

from ldm.cli.main import main
from ldm.config import AutoencoderTrainingConfig, ClipTrainingConfig, DataConfig, build, load
from ldm.errors import RunError
from ldm.runs.directory import RunDirectory, refused_changes
from ldm.runs.records import read_metrics, read_status

BASE = {"run": "runs/x", "data": {"source": "shapes", "image_size": 32}, "train": {"steps": 10}}


def config(**changes: object) -> AutoencoderTrainingConfig:
    """BASE with `a__b=c` for a.b=c."""
    tree = json.loads(json.dumps(BASE))
    for key, value in changes.items():
        *path, last = key.split("__")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return build(AutoencoderTrainingConfig, tree)


HOLDER = """
import sys
from ldm.runs.directory import RunDirectory
run = RunDirectory(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_and_a_kill_frees_the_run(tmp_path: Path) -> None:
    path = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=rf"{path} is in use by another process \({holder.pid}\)"):
            RunDirectory(path)
        holder.send_signal(signal.SIGKILL)
    RunDirectory(path).close()


def test_a_run_may_have_any_name_and_two(tmp_path: Path) -> None:
    tree = {**DIFFUSION, "autoencoder": "none", "text": "none", "caption_dropout": 0.0}
    tree["train"] = {**DIFFUSION["train"], "steps": 2, "sample_every": 2, "trackers": ["tensorboard"]}
    place = tmp_path / "Läufe, 運行 [1]"
    place.mkdir()
    (tmp_path / "link").symlink_to(place, target_is_directory=True)
    file = place / "ldm é.yaml"
    file.write_text(
        yaml.safe_dump({"run": str(tmp_path / "link/erster Lauf"), **tree}, allow_unicode=True), encoding="utf-8"
    )
    assert main(["train-ldm", str(file), "train.checkpoint_every=1"]) == 0
    run = place / "erster Lauf"
    assert (read_status(run) or {})["state"] == "done" and (run / "model/model_index.json").is_file()
    assert len(list((run / "samples").glob("*.png"))) == 1 and list((run / "tensorboard").iterdir())
    with RunDirectory(run), pytest.raises(RunError, match="is in use"):
        RunDirectory(tmp_path / "link/erster Lauf")


def test_a_forked_worker_does_not_keep_the_lock(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    context = multiprocessing.get_context("fork")
    born, end = context.Event(), context.Event()

    def work() -> None:
        born.set()
        end.wait()

    worker = context.Process(target=work)
    worker.start()
    assert born.wait(60)  # it has let go of the lock by then
    with pytest.raises(RunError, match="in use"):  # the worker's birth did not release it
        RunDirectory(tmp_path)
    run.close()
    RunDirectory(tmp_path).close()
    end.set()
    worker.join()


def test_a_file_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be a run directory"):
        RunDirectory(tmp_path / "file")


def test_config_is_saved_and_may_change_where_learning_does_not(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as run:
        run.start(config())
        assert load(AutoencoderTrainingConfig, tmp_path / "config.yaml") == config()
        harmless = config(
            train__log_every=3,
            train__trackers=[],
            data__workers=4,
            train__micro_batch=8,
            train__steps=20,
            run="elsewhere",
        )
        run.start(harmless)
        assert load(AutoencoderTrainingConfig, tmp_path / "config.yaml") == harmless


@pytest.mark.parametrize("key", ["train__lr", "loss__kl", "data__image_size", "train__seed", "train__batch_size"])
def test_any_other_change_is_refused_by_name(tmp_path: Path, key: str) -> None:
    values = {"train__lr": 0.5, "loss__kl": 0.25, "data__image_size": 64, "train__seed": 3, "train__batch_size": 5}
    with RunDirectory(tmp_path) as run:
        run.start(config())
        before = (tmp_path / "config.yaml").read_text()
        setting = rf"{key.replace('__', '.')} \S+ → {values[key]}"
        expected = rf"config\.yaml: {setting}: use another run: directory or restore the setting"
        with pytest.raises(RunError, match=expected):
            run.start(config(**{key: values[key], "train__log_every": 3}))
        assert (tmp_path / "config.yaml").read_text() == before


def test_more_steps_are_refused_where_they_stretch_the_schedule() -> None:
    assert refused_changes(config(), config(train__steps=20)) == {}
    cosine = config(train__lr_schedule="cosine")
    longer = config(train__lr_schedule="cosine", train__steps=20)
    assert refused_changes(cosine, longer) == {"train.steps": "train.steps 10 → 20"}
    assert len(refused_changes(config(), config(train__lr_schedule="cosine", train__steps=20))) == 2


def test_another_commands_run_is_refused(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as run:
        run.start(config())
        with pytest.raises(RunError, match="not a configuration of this command"):
            run.start(ClipTrainingConfig("x", DataConfig(source="shapes", image_size=32)))


def test_metrics_are_json_lines_and_cut_back(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as run:
        for step in range(1, 6):
            values = {
                "loss": float("nan") if step == 2 else step / 10,
                "np": np.float32(0.5),
                "torch": torch.tensor(2.0),
                "name": "a",
                "n": 3,
            }
            run.log(step, values)
        with (tmp_path / "metrics.jsonl").open("a") as stream:
            stream.write('{"step": 3, "lo')  # torn by a kill
        run.cut_back(3)
        run.log(4, {"loss": float("-inf"), "list": [1.0, float("inf")]})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0] == {"step": 1, "loss": 0.1, "np": 0.5, "torch": 2.0, "name": "a", "n": 3}
    assert lines[1]["loss"] is None and lines[3] == {"step": 4, "loss": None, "list": [1.0, None]}


def test_status_adds_up_the_seconds_of_all_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("ldm.runs.directory.time.monotonic", lambda: now[0])
    assert read_status(tmp_path) is None
    for expected in (5.0, 10.0):
        with RunDirectory(tmp_path) as run:
            now[0] += 5.0
            run.status("interrupted", 3, 10)
        now[0] += 1000.0  # between the resumes
        assert read_status(tmp_path) == {"state": "interrupted", "step": 3, "steps": 10, "seconds": expected}


def test_faulty_status_is_named(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text("{")
    with pytest.raises(RunError, match=r"status\.json cannot be read"):
        RunDirectory(tmp_path)
    (tmp_path / "status.json").unlink()
    with (
        RunDirectory(tmp_path) as run,
        pytest.raises(ValueError, match="state must be one of"),
    ):  # and the lock was let go
        run.status("asleep", 0, 1)


def test_no_temporary_files_stay(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as run:
        run.start(config())
        run.log(1, {})
        run.cut_back(1)
        run.status("done", 1, 1)
    assert {f.name for f in tmp_path.iterdir()} == {".lock", "config.yaml", "metrics.jsonl", "status.json"}
