"""Records on a disk that is full, read-only or over its quota: kept, written later in order, and told once."""

import errno
import json
import os
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from support.stages import DIFFUSION

from ldm.cli.main import main
from ldm.config import DiffusionTrainingConfig, load
from ldm.data.sample import Skipped
from ldm.errors import DataError, RunError
from ldm.runs import journal
from ldm.runs.directory import RunDirectory
from ldm.runs.records import read_metrics, read_skipped, read_status
from ldm.training.stages.diffusion import DiffusionTask

PICTURE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)  # 3 kB as a PNG


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """Limit the size of this process's files: the kernel takes what fits, as with a quota or a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def record(run: RunDirectory, steps: range) -> None:
    for step in steps:
        run.log(step, {"loss": step / 8})
        run.status("running", step, 9)


def steps_of(run: Path) -> list[int]:
    return [line["step"] for line in read_metrics(run)]


@pytest.fixture
def told() -> Iterator[list[str]]:
    """What is warned of, each time it is."""
    messages: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, *rest: messages.append(str(message))  # type: ignore[assignment]
        yield messages


def test_what_a_full_disk_does_not_take_is_written_once_it_does(tmp_path: Path, told: list[str]) -> None:
    with RunDirectory(tmp_path) as run:
        record(run, range(1, 3))
        before = (tmp_path / "metrics.jsonl").read_bytes()
        for episode in (0, 1):
            first = 3 + 3 * episode
            whole = (tmp_path / "metrics.jsonl").stat().st_size
            with no_file_longer_than(whole + 7):  # a part of a line fits, and the status does not
                (tmp_path / "status.json").unlink()
                record(run, range(first, first + 2))
                run.skip([Skipped(f"{episode}.png", "damaged")])
                run.picture("grid", first, PICTURE)
                run.picture("grid", first + 1, PICTURE)
                assert (tmp_path / "metrics.jsonl").stat().st_size == whole + 7 and steps_of(tmp_path) == list(
                    range(1, first)
                )
                assert len(told) == 1 + 2 * episode
            record(run, range(first + 2, first + 3))
            assert len(told) == 2 + 2 * episode
        assert steps_of(tmp_path) == list(range(1, 9))
    text = (tmp_path / "metrics.jsonl").read_bytes()
    assert text.startswith(before) and [json.loads(line)["step"] for line in text.splitlines()] == list(range(1, 9))
    assert (read_status(tmp_path) or {})["step"] == 8
    assert read_skipped(tmp_path) == ([("0.png", "damaged"), ("1.png", "damaged")], 0)
    assert sorted(f.name for f in (tmp_path / "samples").iterdir()) == [
        "grid-00000004.png",
        "grid-00000007.png",
    ]  # the newest
    assert np.array_equal(np.asarray(Image.open(tmp_path / "samples/grid-00000007.png")), PICTURE)
    reason = os.strerror(errno.EFBIG)
    expected = []
    for failed, back in ((3, 5), (6, 8)):
        failing = f"{tmp_path} cannot be written to ({reason}) at update {failed}"
        expected.append(f"{failing}: training continues, and its records are kept until it can")
        expected.append(f"{tmp_path} can be written to again at update {back}: the records are complete")
    assert told == expected
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_end_is_the_last_try(tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **more: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    run = RunDirectory(tmp_path / "kept")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        run.status("done", 9, 9)
    run.close()
    assert (read_status(tmp_path / "kept") or {})["state"] == "done" and len(told) == 2
    run = RunDirectory(tmp_path / "lost")
    with no_file_longer_than(0):
        record(run, range(1, 2))
        run.close()
    assert told[2:] == [
        f"{tmp_path}/lost cannot be written to ({os.strerror(errno.EFBIG)}) at update 1:"
        " training continues, and its records are kept until it can",
        f"{tmp_path}/lost: lost, because they could not be written: metrics.jsonl, status.json",
    ]
    RunDirectory(tmp_path / "lost").close()  # and the lock was let go


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A tiny training of pixels, without text."""
    file = tmp_path / "ldm.yaml"
    file.write_text(
        yaml.safe_dump(
            {"run": str(tmp_path / "run"), "autoencoder": "none", "text": "none", **DIFFUSION, "caption_dropout": 0.0}
        )
    )
    return file


def test_a_start_that_cannot_be_written_is_an_error(file: Path, tmp_path: Path) -> None:
    settings = load(DiffusionTrainingConfig, file)
    with RunDirectory(tmp_path) as run:
        run.start(settings)
        record(run, range(1, 3))
    with no_file_longer_than(0), RunDirectory(tmp_path) as run:  # the lock needs no space
        with pytest.raises(RunError, match=r"config\.yaml cannot be written: File too large"):
            run.start(settings)
        with pytest.raises(RunError, match=r"metrics\.jsonl cannot be written: File too large"):
            run.cut_back(1)
    assert steps_of(tmp_path) == [1, 2]


def test_a_training_goes_on_without_records_and_pictures(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Updates 2 to 4 find the disk full, and no grid can be drawn."""
    append, drawn = journal.Journal._append, []

    def full(self: journal.Journal) -> None:
        if 2 <= self.step <= 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self)

    def fail(self: DiffusionTask) -> Any:
        drawn.append(self)
        raise RuntimeError("out of memory")

    assert main(["train-ldm", str(file), f"run={tmp_path}/straight"]) == 0
    monkeypatch.setattr(journal.Journal, "_append", full)
    monkeypatch.setattr(DiffusionTask, "previews", fail)
    assert main(["train-ldm", str(file), "train.sample_every=5"]) == 0
    assert len(drawn) == 2
    run, straight = (
        [{k: v for k, v in line.items() if k != "updates_per_second"} for line in read_metrics(tmp_path / name)]
        for name in ("run", "straight")
    )
    assert run == straight and len(run) == 6
    last = "checkpoints/step-00000006/model_unet.safetensors"
    assert (tmp_path / "run" / last).read_bytes() == (tmp_path / "straight" / last).read_bytes()
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {tmp_path}/run cannot be written to (No space left on device) at update 2:"
        " training continues, and its records are kept until it can",
        f"warning: {tmp_path}/run can be written to again at update 5: the records are complete",
        "warning: no pictures from update 5 on, training continues: RuntimeError: out of memory",
    ]


def test_a_known_fault_in_a_picture_keeps_its_code(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: DiffusionTask) -> Any:
        raise DataError("photos/7.png: cannot be decoded")

    monkeypatch.setattr(DiffusionTask, "previews", fail)
    assert main(["train-ldm", str(file)]) == 3
