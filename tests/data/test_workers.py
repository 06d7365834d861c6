"""Data workers and processes that die or hang: one line that says where, no orphan, and the same command continues."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file
from support.stages import DIFFUSION

from ldm.cli.main import main
from ldm.config import DataConfig
from ldm.data.dataset import BatchPlan, RandomFields, Stream, batches
from ldm.data.folder import FolderSource
from ldm.data.sample import Sample
from ldm.data.workers import Workers
from ldm.errors import DataError
from ldm.runs.records import read_metrics, read_status

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 150  # seconds, after which a launch counts as hanging
FATAL: dict[str, Callable[[], Any]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "ended": lambda: os._exit(3),
    "bus": lambda: os.kill(os.getpid(), signal.SIGBUS),
    "asleep": lambda: time.sleep(600),
    "frozen": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twenty images in a folder."""
    (tmp_path / "photos").mkdir()
    for i in range(20):
        Image.new("RGB", (8, 8), (12 * i, 0, 0)).save(tmp_path / f"photos/{i:02}.png")
    return tmp_path / "photos"


class Fatal(FolderSource):
    """A folder with one file that ends, or stops, whoever reads it."""

    def __init__(self, data: DataConfig, row: int, how: str) -> None:
        super().__init__(data, "train")
        self.row, self.how = row, how

    def __getitem__(self, index: int) -> Sample:
        if index == self.row:
            FATAL[self.how]()
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (
            "killed",
            r"data worker \d+ was killed (signal Killed) at {place}: most likely out of memory: lower data.workers",
        ),
        ("ended", r"data worker \d+ ended at {place}: data.workers=0 shows why"),
        (
            "bus",
            r"data worker \d+ was killed (signal Bus error) at {place}: most likely out of shared memory (/dev/shm)",
        ),
        (
            "asleep",
            r"data worker \d+ has given nothing for 1 s (data.worker_timeout) at {place}: a file system that hangs",
        ),
        (
            "frozen",
            r"has given nothing for 1 s (data.worker_timeout)",
        ),  # it may freeze before it has handed over the image before
    ],
)
def test_a_worker_that_dies_or_hangs_is_one_line_with_its_place(photos: Path, how: str, said: str) -> None:
    data = DataConfig(folder=str(photos), captions="none", image_size=8, min_side=8, worker_timeout=1)
    source = Fatal(data, 0, how)
    stream = Stream(source, data, 0, RandomFields({}))
    position = next(p for p in range(100) if stream.order[p] == 0)
    before = signal.getsignal(signal.SIGCHLD), signal.getsignal(signal.SIGALRM)
    feed, got = batches(stream, BatchPlan(1, 1, 1, 0), max(0, position - 3), position + 9, workers=2), 0
    with pytest.raises(DataError) as caught:
        for _ in feed:
            got += 1
            time.sleep(0.02)  # the death comes while an update is under way, too
    place = f"position {position} ({photos / source.rows[0].file_name})"
    pattern = re.escape(said.replace("{place}", place)).replace(r"\\d\+", r"\d+")
    assert re.search(pattern, str(caught.value)), caught.value
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value) and "data.workers is 2" in str(caught.value)
    assert got <= min(3, position) and multiprocessing.active_children() == []
    assert signal.getsignal(signal.SIGALRM) == before[1] and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert "_child_ended" not in repr(signal.getsignal(signal.SIGCHLD))


@pytest.mark.parametrize("dies", ["reading", "entering", "while the next is started"])
def test_workers_that_have_not_begun_are_ended_too(photos: Path, monkeypatch: pytest.MonkeyPatch, dies: str) -> None:
    """One dies while the other has not yet said who it is, or does not exist."""
    enter, start, parent = Workers.enter, multiprocessing.process.BaseProcess.start, os.getpid()

    def slow(self: Workers, worker: int) -> None:
        if worker == 1:
            time.sleep(PATIENCE)
        elif dies != "reading":
            os._exit(3)
        enter(self, worker)

    def slowly(self: multiprocessing.process.BaseProcess) -> None:
        start(self)
        if os.getpid() == parent and dies == "while the next is started":
            time.sleep(0.5)

    monkeypatch.setattr(Workers, "enter", slow)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", slowly)
    data = DataConfig(folder=str(photos), captions="none", image_size=8, min_side=8)
    source = Fatal(data, 0, "ended")
    stream, began = Stream(source, data, 0, RandomFields({})), time.monotonic()
    first = next(p for p in range(100) if stream.order[p] == 0)
    with pytest.raises(DataError, match=r"data worker( \d+)? ended"):
        next(batches(stream, BatchPlan(1, 1, 1, 0), first, first + 9, workers=2))
    assert multiprocessing.active_children() == [] and time.monotonic() - began < PATIENCE / 2


def test_an_error_of_a_worker_is_not_its_end(photos: Path) -> None:
    data = DataConfig(folder=str(photos), captions="none", image_size=8, min_side=8)
    source = Fatal(data, 0, "killed")
    source.how = "unknown"  # a KeyError
    with pytest.raises(KeyError, match="Caught KeyError in DataLoader worker process 0"):
        list(batches(Stream(source, data, 0, RandomFields({})), BatchPlan(1, 1, 1, 0), 0, 20, workers=1))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A tiny training of pixels, without text."""
    file = tmp_path / "ldm.yaml"
    tree = {**DIFFUSION, "caption_dropout": 0.0, "autoencoder": "none", "text": "none"}
    file.write_text(yaml.safe_dump({"run": str(tmp_path / "run"), **tree}))
    return file


def unet(run: Path) -> dict[str, Any]:
    return load_file(run / "checkpoints/step-00000006/model_unet.safetensors")


def test_after_a_killed_worker_the_same_command_goes_on(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, parent = Stream.read, os.getpid()

    def fatal(self: Stream, position: int) -> Any:
        if position == 17 and os.getpid() != parent and not (tmp_path / "once").exists():
            (tmp_path / "once").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, position)

    assert main(["train-ldm", str(file), f"run={tmp_path}/straight"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(Stream, "read", fatal)
    command = ["train-ldm", str(file), "data.workers=1", "data.worker_timeout=60"]
    assert main(command) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.match(
        r"ldm train-ldm: data worker \d+ was killed \(signal Killed\) at position 17: ", error
    )
    assert (read_status(tmp_path / "run") or {})["state"] == "failed" and multiprocessing.active_children() == []
    assert main([*command[:-1], "data.worker_timeout=90"]) == 0
    one, other = unet(tmp_path / "run"), unet(tmp_path / "straight")
    assert all((one[key] == other[key]).all() for key in other) and [
        line["step"] for line in read_metrics(tmp_path / "run")
    ] == [*range(1, 7)]


# a process of several

FAULT = """
import os, signal, sys, time
from pathlib import Path
from ldm.cli.main import main
from ldm.data.dataset import Stream

read, once = Stream.read, Path(sys.argv[0]).with_name("once")

def faulty(self, position):
    if os.environ.get("RANK") == "1" and position >= 16 and not self.validation and not once.exists():
        once.touch()
        if HANGS:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # or the launcher waits 30 seconds before it kills
            time.sleep(600)
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, position)

Stream.read = faulty
sys.exit(main(sys.argv[1:]))
"""


def processes_of(path: Path) -> list[str]:
    """Command lines that name ``path``."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended
            continue
        if str(path) in line:
            found.append(line)
    return found


@pytest.mark.parametrize(
    ("hangs", "said"),
    [
        (False, "another process has ended: its own line, if it could write one, says why"),
        pytest.param(
            True,
            "another process has not answered for 10 s (train.rank_timeout):"
            " it hangs, or its work takes longer than that",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_a_process_that_dies_or_hangs_ends_all_and_the_same_command_goes_on(
    file: Path, tmp_path: Path, hangs: bool, said: str
) -> None:
    script = tmp_path / "fault.py"
    script.write_text(FAULT.replace("HANGS", str(hangs)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = ["train-ldm", str(file), "train.micro_batch=2", "train.rank_timeout=10"]
    done = subprocess.run(
        [*launcher, str(script), *command], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 1
    assert re.findall("^ldm train-ldm.*$", done.stderr, re.MULTILINE) == [f"ldm train-ldm: {said}"]
    assert "ldm/training" not in done.stderr  # no traceback of ours
    assert processes_of(tmp_path) == []
    assert (read_status(tmp_path / "run") or {})["state"] == "failed"
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    assert main(["train-ldm", str(file), "train.micro_batch=2"]) == 0  # here with one process
    assert main(["train-ldm", str(file), f"run={tmp_path}/straight"]) == 0
    one, other = unet(tmp_path / "run"), unet(tmp_path / "straight")
    assert all(float((one[key] - other[key]).abs().max()) < 1e-4 for key in other)
