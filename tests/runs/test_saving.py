"""Saving in the background, and its failures: full and read-only disks, limits, interrupts."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.errors import CheckpointError
from ldm.runs.checkpoints import files as checkpoint
from ldm.runs.checkpoints import folder as shelf
from ldm.runs.checkpoints import writer
from ldm.runs.checkpoints import writer as stopping
from ldm.runs.checkpoints.files import load, save
from ldm.runs.checkpoints.folder import newest_valid
from ldm.runs.checkpoints.writer import BackgroundWriter

CONFIG = ScheduleConfig()


def tensors(count: int = 12) -> dict[str, dict[str, Tensor]]:
    return {"model": {"w": torch.arange(count, dtype=torch.float32)}}


# disks that fail


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", place], check=True)


def refused(folder: Path, message: str) -> None:
    """Saving a checkpoint of 1.5 MB fails with ``message``; that of update 1 stays as it was, alone."""
    before = {file.name: file.read_bytes() for file in (folder / "step-00000001").iterdir()}
    with pytest.raises(CheckpointError, match=message) as caught:
        save(folder, 2, tensors(375_000), {}, CONFIG)
    assert str(folder / "step-00000002") in str(caught.value) and "\n" not in str(caught.value)
    assert [p.name for p in folder.iterdir()] == ["step-00000001"]
    assert {file.name: file.read_bytes() for file in (folder / "step-00000001").iterdir()} == before
    assert newest_valid(folder) == (folder / "step-00000001", [])


def test_what_does_not_fit_is_not_begun(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(small_disk, 1, tensors(200_000), {}, CONFIG)
    monkeypatch.setattr(checkpoint, "save_file", lambda *_: pytest.fail("was begun"))
    refused(small_disk, r"No space left on device \(1\.6 MB are needed, 1\.[0-9] MB are free\)")


def test_a_disk_that_fills_up_while_it_is_written(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(small_disk, 1, tensors(200_000), {}, CONFIG)
    usage = shutil.disk_usage(small_disk)
    monkeypatch.setattr(
        checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=10**9)
    )  # another writer takes it meanwhile
    refused(small_disk, r"No space left.*1\.6 MB are needed, 1\.0 GB are free")


def test_a_disk_that_became_read_only(small_disk: Path) -> None:
    save(small_disk, 1, tensors(), {}, CONFIG)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    refused(small_disk, "Read-only file system")


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    save(tmp_path, 1, tensors(), {}, CONFIG)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, before[1]))  # Python ignores SIGXFSZ: the write fails by EFBIG
    try:
        refused(tmp_path, r"File too large.*1\.6 MB are needed")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EACCES, errno.EIO])
def test_other_faults_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    save(tmp_path, 1, tensors(), {}, CONFIG)

    original = checkpoint.flush

    def fail(path: Path) -> None:
        if path.suffix == ".safetensors":
            raise OSError(number, os.strerror(number))
        original(path)

    monkeypatch.setattr(checkpoint, "flush", fail)  # quotas may be noticed as late as at the flush
    refused(tmp_path, os.strerror(number))


def test_an_old_one_that_cannot_be_deleted_is_another_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(tmp_path, step, tensors(), {}, CONFIG)

    def fail(path: Path) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(shelf, "remove", fail)
    with pytest.raises(
        CheckpointError, match=r"step-00000003: is written, but an older one could not be deleted: Permission denied"
    ):
        save(tmp_path, 3, tensors(), {}, CONFIG)
    assert newest_valid(tmp_path)[0] == tmp_path / "step-00000003"


# in the background


def test_each_save_is_copied_before_it_returns(tmp_path: Path) -> None:
    live = {"model": {"w": torch.ones(1000)}}
    state: dict[str, object] = {"list": [1]}
    with BackgroundWriter(tmp_path) as background:
        for step in (1, 2, 3):
            background.submit(step, live, state, CONFIG)
            live["model"]["w"] += 1  # the next update
            state["list"] = [step + 1]
    assert [p.name for p in shelf.steps(tmp_path)] == ["step-00000002", "step-00000003"]
    for step in (2, 3):
        read, read_state = load(tmp_path / f"step-{step:08d}")
        assert torch.equal(read["model"]["w"], torch.full((1000,), float(step))) and read_state == {"list": [step]}


def test_memory_of_the_copy_is_used_again_where_it_fits(tmp_path: Path) -> None:
    first = checkpoint.snapshot({"m": {"a": torch.ones(3), "b": torch.ones(3), "c": torch.ones(3)}})
    given = {
        "m": {
            "a": torch.zeros(3),
            "b": torch.zeros(3, dtype=torch.float64),
            "c": torch.zeros(1, 3),
            "d": torch.zeros(2),
        }
    }
    second = checkpoint.snapshot(given, first)["m"]
    assert second["a"].data_ptr() == first["m"]["a"].data_ptr()
    assert (
        all(torch.equal(second[n], t) and second[n].dtype == t.dtype for n, t in given["m"].items())
        and second.keys() == given["m"].keys()
    )


def test_two_writes_never_overlap_and_an_update_waits_for_none_but_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, begun, go, active = writer.write, threading.Event(), threading.Event(), []

    def slow(*arguments: Any) -> Path:
        active.append(1)
        begun.set()
        assert go.wait(60) and len(active) == 1
        path = original(*arguments)
        active.pop()
        return path

    monkeypatch.setattr(writer, "write", slow)
    with BackgroundWriter(tmp_path) as background:
        background.submit(1, tensors(), {}, CONFIG)
        assert begun.wait(60)  # submit has returned, and the write is under way
        background.poll()
        assert background.saved == 0 and shelf.steps(tmp_path) == []
        threading.Timer(0.05, go.set).start()
        background.submit(2, tensors(), {}, CONFIG)
        assert background.saved == 1 and len(shelf.steps(tmp_path)) >= 1


def test_an_error_comes_out_at_the_next_call_and_saving_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    background = BackgroundWriter(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        background.submit(1, tensors(), {}, CONFIG)
        with pytest.raises(CheckpointError, match=r"step-00000001.*No space left"):
            background.submit(2, tensors(), {}, CONFIG)
    background.submit(3, tensors(), {}, CONFIG)
    written = background.wait()
    assert written is not None and (written.step, written.path, written.bytes) == (3, tmp_path / "step-00000003", 48)
    assert background.wait() is None


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_going_on_warns_each_time_but_a_wait_always_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    background = BackgroundWriter(tmp_path, errors="continue", saved=10)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        background.submit(20, tensors(), {}, CONFIG)
        with pytest.warns(
            UserWarning, match=r"step-00000020.*No space left.*; 10 updates since 10 are not saved; training continues"
        ):
            background.submit(30, tensors(), {}, CONFIG)
        with pytest.raises(CheckpointError, match=r"step-00000030.*No space left"):
            background.wait()
    background.submit(40, tensors(), {}, CONFIG)
    background.wait()
    assert background.saved == 40


def test_the_first_checkpoint_is_told_and_a_slow_one_is_warned_about_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(stopping, "SLOW", -1.0)
    background = BackgroundWriter(tmp_path, say=said.append)
    background.submit(1, tensors(), {}, CONFIG)
    assert background._thread is not None
    background._thread.join()
    with pytest.warns(
        UserWarning,
        match=r"launchers kill a process 30 s after.*--shutdown-timeout=\d+.*TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
    ):
        background.poll()
    assert (
        len(said) == 1 and "48 bytes, copied in 0.0 s, written in" in said[0] and "48 bytes of host memory" in said[0]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        background.submit(2, tensors(), {}, CONFIG)
        background.wait()
    assert len(said) == 1


def test_launchers_have_the_option_that_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    from torch.distributed.launcher.api import LaunchConfig
    from torch.distributed.run import get_args_parser

    assert get_args_parser().parse_args(["--shutdown-timeout=90", "x.py"]).shutdown_timeout == 90
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
        assert LaunchConfig(1, 1, 1).shutdown_timeout == stopping.GRACE
        patch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "90")
        assert LaunchConfig(1, 1, 1).shutdown_timeout == 90


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A write that does not end before the test; ``begin`` is called when it begins."""
    end, ended = threading.Event(), threading.Event()
    state: dict[str, Any] = {"begin": lambda: None, "ended": ended}

    def write(*arguments: Any) -> Path:
        state["begin"]()
        end.wait(60)
        ended.set()
        raise CheckpointError("too late")

    monkeypatch.setattr(writer, "write", write)
    yield state
    end.set()


def test_an_interrupt_does_not_wait_for_the_write(tmp_path: Path, stuck: dict[str, Any]) -> None:
    begun = threading.Event()
    stuck["begin"] = begun.set
    with pytest.raises(KeyboardInterrupt), BackgroundWriter(tmp_path) as background:
        background.submit(1, tensors(), {}, CONFIG)
        assert background._thread is not None and background._thread.daemon  # nor does the end of the process
        assert begun.wait(60)
        raise KeyboardInterrupt
    assert not stuck["ended"].is_set()


def test_an_interrupt_ends_the_wait_for_the_write(tmp_path: Path, stuck: dict[str, Any]) -> None:
    main = threading.main_thread().ident
    assert main is not None and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    stuck["begin"] = lambda: threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt), BackgroundWriter(tmp_path) as background:
        background.submit(1, tensors(), {}, CONFIG)
    assert not stuck["ended"].is_set()


def test_what_ended_the_training_is_not_hidden_by_a_failing_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "save_file", full)
    with (
        pytest.warns(UserWarning, match="No space left"),
        pytest.raises(ZeroDivisionError),
        BackgroundWriter(tmp_path) as background,
    ):
        background.submit(1, tensors(), {}, CONFIG)
        raise ZeroDivisionError
