"""`ldm status` and starts.jsonl: how a run ended, told afterwards and from outside, and what each of its starts was."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from support.stages import Stages

import ldm
from ldm.cli.main import main
from ldm.errors import DataError, RunError
from ldm.runs import provenance as starts
from ldm.runs.checkpoints.files import CheckpointError
from ldm.runs.directory import RunDirectory
from ldm.runs.records import read_starts, read_status
from ldm.runs.status import is_locked
from ldm.training.finite import TrainingError
from ldm.training.loop import Interrupted, Loop
from ldm.training.state import TrainingState

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """The cheapest stage alone."""
    trained = Stages(tmp_path_factory.mktemp("stages"))
    assert trained.train("clip") == 0
    return trained


@pytest.fixture
def status(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`ldm status` of a run: its exit code, and what it wrote."""

    def call(path: Path, *options: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["status", str(path), *options])
        said = capsys.readouterr()
        assert bool(said.out) != bool(said.err) and "Traceback" not in said.err
        return code, said.out or said.err

    return call


Status = Callable[..., tuple[int, str]]


def ended(path: Path, state: str, error: BaseException | None = None, *checkpoints: int) -> Path:
    """A run whose process is gone."""
    with RunDirectory(path) as run:
        run.status(state, 12, 100, error)
    for step in checkpoints:
        (path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
        (path / f"checkpoints/step-{step:08d}/manifest.json").touch()
    return path


def seconds_of(path: Path) -> str:
    return f"{(read_status(path) or {})['seconds']:.0f} s"


@pytest.mark.parametrize(
    ("state", "error", "code", "line"),
    [
        ("done", None, 0, "done, update 12 of 100 (12 %), 0 s, last checkpoint at update 10"),
        (
            "interrupted", Interrupted("stopped"), 75,
            "interrupted and saved at update 12 of 100 (12 %), 0 s, last checkpoint at update 10;"
            " the same command continues from there",
        ),
        ("interrupted", None, 75, "interrupted and saved at"),  # written by an older ldm
        ("interrupted", KeyboardInterrupt(), 130,
         "at once at update 12 of 100 (12 %), 0 s; the same command continues from update 10"),
        ("failed", TrainingError("a\nb"), 5,
         "failed at update 12 of 100 (12 %), 0 s, last checkpoint at update 10; exit code 5: a b"),
        ("failed", CheckpointError("disk full"), 4, "exit code 4: disk full"),
        ("failed", ZeroDivisionError(), 1, "exit code 1: ZeroDivisionError"),
        ("failed", None, 1, "exit code 1: no reason was recorded"),
        (
            "running", None, 1,
            "killed at update 12 of 100 (12 %), 0 s: its status says running, but no process holds its lock;"
            " the same command continues from update 10",
        ),
    ],
)  # fmt: skip
def test_how_a_run_ended(
    tmp_path: Path, status: Status, state: str, error: BaseException | None, code: int, line: str
) -> None:
    run = ended(tmp_path / "run", state, error, 5, 10)
    (run / "checkpoints/step-00000011").mkdir()  # no manifest: not whole
    returned, said = status(run)
    assert returned == code and said.startswith(f"{run}: ") and line in said and said.count("\n") == 1, said
    returned, said = status(run, "--json")
    assert returned == code == json.loads(said)["exit_code"] and json.loads(said)["checkpoint"] == 10
    RunDirectory(run).close()  # who has looked holds nothing


def test_waiting_ends_with_the_process_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: Status) -> None:
    run = RunDirectory(tmp_path)
    run.status("running", 3, 10)

    def asleep(seconds: float) -> None:
        run.status("interrupted", 4, 10)
        run.close()

    monkeypatch.setattr("ldm.cli.status.time.sleep", asleep)
    assert status(tmp_path)[0] == 0
    assert status(tmp_path, "--wait")[0] == 75


def test_a_run_at_work_is_told_by_its_lock(tmp_path: Path, status: Status) -> None:
    path = ended(tmp_path / "run", "interrupted", Interrupted("stopped"))
    with RunDirectory(path) as run:
        assert status(path) == (
            0,
            f"{path}: running, update 12 of 100 (12 %), 0 s, no checkpoint\n",
        )  # being started again
        run.status("running", 13, 100)
        assert "running, update 13 of 100 (13 %)" in status(path)[1]
        assert is_locked(path) and is_locked(path)
        with pytest.raises(RunError, match="in use by another process"):  # the lock is still theirs
            RunDirectory(path)
        told = json.loads(status(path, "--json")[1])
        assert told == {
            "run": str(path), "state": "running", "step": 13, "steps": 100, "seconds": told["seconds"],
            "checkpoint": None, "locked": True, "exit_code": 0, "reason": None, "best": None,
        }  # fmt: skip
    assert status(path)[0] == 1 and "the same command continues from the beginning" in status(path)[1]


def test_looking_changes_nothing(tmp_path: Path, status: Status, monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> dict[str, Any]:
        return {
            str(f.relative_to(tmp_path)): (f.stat().st_mtime_ns, f.read_bytes() if f.is_file() else b"")
            for f in tmp_path.rglob("*")
        }

    for path in (ended(tmp_path / "locked", "running"), ended(tmp_path / "copied", "running")):
        if path.name == "copied":
            (path / ".lock").unlink()
        before, opened, real = state(), [], os.open

        def watched(
            file: Any, flags: int, *rest: Any, opened: list[int] = opened, real: Any = real, **more: Any
        ) -> int:
            opened.append(flags)
            return real(file, flags, *rest, **more)

        monkeypatch.setattr(os, "open", watched)
        assert status(path)[0] == 1
        monkeypatch.undo()
        assert (
            state() == before
            and opened
            and not any(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) for flags in opened)
        )


def test_where_locks_cannot_be_seen_nothing_is_claimed(
    tmp_path: Path, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ended(tmp_path / "run", "running")

    def without(*arguments: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", without)
    code, said = status(path)
    assert (
        code == 0 and "running, update 12" in said and "this file system does not show if a process is at work" in said
    )


def test_a_start_in_the_moment_of_a_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ldm status` holds a shared lock for an instant: a trainer that meets it tries once more."""
    path = ended(tmp_path / "run", "interrupted")
    looking = os.open(path / ".lock", os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr("ldm.runs.directory.time.sleep", lambda seconds: fcntl.flock(looking, fcntl.LOCK_UN))
    with RunDirectory(path):
        assert is_locked(path)
    os.close(looking)


@pytest.mark.parametrize("name", ["none", "empty"])
def test_what_is_no_run(tmp_path: Path, status: Status, name: str) -> None:
    (tmp_path / "empty").mkdir()
    code, said = status(tmp_path / name)
    assert code == 2 and said.startswith("ldm status: ") and str(tmp_path / name) in said and said.count("\n") == 1


def test_a_run_killed_before_its_first_status(tmp_path: Path, status: Status, stages: Stages) -> None:
    with RunDirectory(tmp_path) as run:
        run.start(stages.settings("clip"))
        assert status(tmp_path) == (0, f"{tmp_path}: running, before its first update, no checkpoint\n")
    code, said = status(tmp_path)
    assert (
        code == 1
        and "killed at before" not in said
        and "killed before its first update" in said
        and "from the beginning" in said
    )


# real runs


def test_every_start_leaves_a_line(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: Status
) -> None:
    """Interrupted after an update, then killed by its own fault, then to the end."""
    path, update, count = tmp_path / "run", Loop._update, [0]
    monkeypatch.setattr(sys, "argv", ["ldm", "train-clip", "clip.yaml", "run=ünï"])

    def interrupting(self: Loop, feed: Any) -> Any:
        count[0] += 1
        if count[0] == 1:
            self.stop.asked = True
        if count[0] == 2:
            raise TrainingError("made to fail")
        return update(self, feed)

    monkeypatch.setattr(Loop, "_update", interrupting)
    assert stages.train("clip", f"run={path}") == 75 == status(path)[0]
    with (path / "starts.jsonl").open("a") as stream:
        stream.write('{"torn')
    assert stages.train("clip", f"run={path}") == 5 == status(path)[0]
    assert "failed at update 1 of 3 (33 %)" in status(path)[1] and status(path)[1].endswith(
        "exit code 5: made to fail\n"
    )
    assert stages.train("clip", f"run={path}") == 0 == status(path)[0]
    done = f"{path}: done, update 3 of 3 (100 %), {seconds_of(path)}, best validation retrieval_top1 "
    assert status(path)[1].startswith(done) and status(path)[1].endswith(" at update 3, last checkpoint at update 3\n")
    lines = read_starts(path)
    assert [line["step"] for line in lines] == [0, 1, 1] and len((path / "starts.jsonl").read_text().splitlines()) == 4
    now = datetime.now(UTC)
    for line in lines:
        assert set(line) == {
            "time", "step", "processes", "device", "python", "torch", "accelerate", "ldm", "commit", "dirty",
            "arguments", "processor", "threads",
        }  # fmt: skip
        assert abs((now - datetime.fromisoformat(line["time"])).total_seconds()) < 3600
        assert (line["processes"], line["device"]) == (1, "cpu") or torch.cuda.is_available()
        assert (line["python"], line["torch"]) == (platform.python_version(), torch.__version__)
        assert (line["accelerate"], line["ldm"]) == (accelerate.__version__, ldm.__version__)
        assert line["arguments"] == ["train-clip", "clip.yaml", "run=ünï"]
        assert (
            platform.node() not in json.dumps({k: v for k, v in line.items() if k != "arguments"})
            or not platform.node()
        )


def test_a_start_that_fails_before_training(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: Status
) -> None:
    """Its fault is told and its update kept; a configuration that is refused leaves the run as it was."""
    path = Path(shutil.copytree(stages.folder / "clip", tmp_path / "run"))
    (path / "status.json").write_text('{"state": "interrupted", "step": 2, "steps": 3, "seconds": 7.0}')
    assert stages.train("clip", f"run={path}", "train.lr=0.5") == 2
    assert status(path)[0] == 75

    def damaged(*arguments: Any) -> None:
        raise CheckpointError("the checkpoint does not fit")

    monkeypatch.setattr(TrainingState, "load", damaged)
    assert stages.train("clip", f"run={path}") == 4
    code, said = status(path)
    assert code == 4 and "failed at update 2 of 3" in said and "the checkpoint does not fit" in said
    assert len(read_starts(path)) == 1  # of the training itself
    (path / "status.json").write_text('{"state": "interrupted", "step": 2, "steps": 3, "seconds": 7.0}')

    def missing(*arguments: Any) -> None:
        raise DataError("the images are gone")

    monkeypatch.setattr("ldm.training.stages.clip.ClipTask.__init__", missing)
    with RunDirectory(path):
        assert stages.train("clip", f"run={path}") == 3  # another process has the run: what it says there stands
    assert status(path)[0] == 75
    assert stages.train("clip", f"run={path}") == 3
    code, said = status(path)
    assert code == 3 and "failed at update 2 of 3" in said and "the images are gone" in said
    assert stages.train("clip", f"run={tmp_path / 'new'}") == 3 and not (tmp_path / "new").exists()


def test_a_disk_without_room_for_a_line_stops_nothing(
    stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run/starts.jsonl").mkdir(parents=True)
    assert stages.train("clip", f"run={tmp_path / 'run'}") == 0
    assert "starts.jsonl could not be written: Is a directory" in capsys.readouterr().out


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_commit_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = {"commit": None, "dirty": None}
    inside = tmp_path / "venv/site-packages"
    (inside / "ldm").mkdir(parents=True)
    (tmp_path / "ldm").mkdir()
    (tmp_path / "ldm/x.py").write_text("1\n")
    assert starts.checkout(tmp_path) == unknown
    git(tmp_path, "init", "-q")
    assert starts.checkout(tmp_path) == unknown  # nothing is committed
    git(tmp_path, "add", "ldm")
    git(tmp_path, "commit", "-qm", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))  # as a hook sets it
    assert len(commit) == 40 and starts.checkout(tmp_path) == {
        "commit": commit,
        "dirty": False,
    }  # the user's own files are no code
    assert starts.checkout(inside) == unknown  # installed into somebody's repository
    index = (tmp_path / ".git/index").read_bytes()
    os.utime(
        tmp_path / "ldm/x.py", (1, 1)
    )  # git would write its index anew, and a commit of the user meanwhile would fail
    assert (
        starts.checkout(tmp_path) == {"commit": commit, "dirty": False}
        and (tmp_path / ".git/index").read_bytes() == index
    )
    (tmp_path / "ldm/y.py").write_text("2\n")
    assert starts.checkout(tmp_path) == {"commit": commit, "dirty": True}
    monkeypatch.setenv("PATH", "")
    assert starts.checkout(tmp_path) == unknown


# the documented loop


LAUNCHER = """#!/bin/sh
n=$(wc -l < "$RUN/calls" 2> /dev/null || echo 0)
echo call >> "$RUN/calls"
set -- $OUTCOMES
shift "$n"
case $1 in *-nowhere) ;; *) echo '{}' >> "$RUN/starts.jsonl" ;; esac
echo "${1%-nowhere}" > "$RUN/outcome"
[ "$1" = 0 ]
"""
LDM = '#!/bin/sh\nexit "$(cat "$RUN/outcome")"\n'


@pytest.mark.parametrize(
    ("outcomes", "calls", "code"),
    [
        ("0", 1, 0),
        ("75 1 75 0", 4, 0),  # saved, killed, saved, done
        ("75 5 0", 2, 5),  # a fault that starting again does not mend
        ("4", 1, 4),
        ("75 75-nowhere 0", 2, 1),  # it did not come as far as training: what is said is of the time before
        ("1-nowhere", 1, 1),
        (" ".join(["1"] * 30), 20, 1),  # not for ever
    ],
)
def test_the_loop_of_the_documentation(tmp_path: Path, outcomes: str, calls: int, code: int) -> None:
    section = (ROOT / "docs/resuming.md").read_text().split("## Scripts that start runs again")[1]
    script = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert script is not None
    for name, text in (("torchrun", LAUNCHER), ("ldm", LDM)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    run = tmp_path / "a run"
    run.mkdir()
    text = re.sub(r"^RUN=.*$", f'export RUN="{run}"', script[1], flags=re.MULTILINE)
    assert text != script[1]
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUTCOMES": outcomes}
    done = subprocess.run(["sh", "-c", text], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, len((run / "calls").read_text().splitlines())) == (code, calls), done.stderr
