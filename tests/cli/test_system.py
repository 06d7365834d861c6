"""Refusals of the system, and files that other programs left: one line, the right code, nothing half-written."""

from __future__ import annotations

import errno
import io
import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from support.command_line import Call, caller
from support.stages import DIFFUSION, TRAIN

from ldm import config as configuration
from ldm.cli.console import Console
from ldm.config import DiffusionTrainingConfig, ScheduleConfig, UNetConfig
from ldm.distributed.processes import ElsewhereError, Processes
from ldm.evaluation.figures.plots import is_figure
from ldm.files.disk import described, replace, whole
from ldm.files.json import write_json
from ldm.models.unet import UNet
from ldm.pipeline import Pipeline
from ldm.runs.checkpoints import folder as shelf
from ldm.runs.directory import exit_code
from ldm.runs.records import read_status
from ldm.training.stopping import Stop

ROOT = Path(__file__).resolve().parents[2]
PIXELS = {**DIFFUSION, "autoencoder": "none", "text": "none", "caption_dropout": 0.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as its files tell it, with an untrained model of pixels, a folder of images, and a configuration."""
    folder = tmp_path_factory.mktemp("system")
    torch.manual_seed(0)
    tree = {"run": str(folder / "run"), **PIXELS}
    (folder / "ldm.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    settings = configuration.load(DiffusionTrainingConfig, folder / "ldm.yaml")
    unet = UNet(UNetConfig((8,), 1, (), (1,), groups=4), 3, 3, None)
    Pipeline(unet, ScheduleConfig(num_steps=20), "eps", None, None, 8, settings.sample).save_pretrained(
        folder / "run/model"
    )
    configuration.save(settings, folder / "run/config.yaml")
    for step in (2, 4):
        place = folder / f"run/checkpoints/step-{step:08d}"
        place.mkdir(parents=True)
        (place / "manifest.json").write_text(json.dumps({"format": 1, "step": step, "files": {}}), encoding="utf-8")
        (place / "state.json").write_text("{}", encoding="utf-8")
    (folder / "photos").mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"photos/{i}.png")
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to spoil, as the current folder."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def call(here: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command in the copied folder."""
    return caller(capsys)


# a disk that takes nothing


@contextmanager
def full_disk(limit: int = 0) -> Iterator[None]:
    """No file may become larger than ``limit`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


WRITERS = {
    "sample": ["sample", "run", "--count", "2", "--steps", "1", "--device", "cpu", "--out", "out"],
    "init": ["init", "photos", "--out", "out"],
    "convert to a folder": ["convert", "run", "out/model"],
    "report": ["report", "run", "--images", "0", "--out", "out.html"],
    "plot": ["plot", "schedules", "--names", "cosine", "--out", "out.png"],
    "plot as svg": ["plot", "schedules", "--names", "cosine", "--out", "out.svg"],
    "sampler-report": ["sampler-report", "--samplers", "ddim", "--steps", "2", "--out", "out"],
    "reproduce": ["reproduce", "drawn.png", "--model", "run", "--device", "cpu", "--out", "out.png"],
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_line_with_path_and_reason_and_leaves_nothing_half_written(
    here: Path, call: Call, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(
        "ldm.evaluation.samplers.conformance.conformance",
        lambda *arguments: {"orders": {}, "samplers": {}, "floor": 0.0, "draws": 1},
    )
    monkeypatch.setattr("ldm.evaluation.samplers.plots.exact_table", lambda report: [])
    if name == "reproduce":
        assert call("sample", "run", "--steps", "1", "--device", "cpu")[0] == 0
        next(Path("images").glob("*.png")).rename("drawn.png")
        Path("images").rmdir()
    before = everything(here)
    with full_disk():
        code, _, error = call(*WRITERS[name])
    assert error.count("\n") == 1 and "out" in error and os.strerror(errno.EFBIG) in error, error
    assert code == (4 if name.startswith("convert") else 2)  # a model folder cannot be written
    assert everything(here) == before


def test_a_second_init_writes_what_a_full_disk_kept_out(here: Path, call: Call) -> None:
    with full_disk(1200):  # the first of the files fits
        code, _, error = call("init", "photos", "--out", "out")
    assert code == 2 and error.count("\n") == 1, error
    assert call("init", "photos", "--out", "out")[0] == 0
    assert {f.name for f in (here / "out").iterdir()} >= {"autoencoder.yaml", "ldm.yaml"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "run", "--steps", "1", "--out", "ldm.yaml/images"], "ldm.yaml/images"),
        (["init", "photos", "--out", "n" * 300], "File name too long"),
        (["status", "n" * 300], "File name too long"),
        (["diff", "n" * 300, "run"], "File name too long"),
        (["report", "run", "--out", "n" * 300], "File name too long"),
        (["report", "run", "--out", "ldm.yaml/report.html"], "cannot be written: Not a directory"),
        (["plot", "schedules", "--out", "ldm.yaml/a.png"], "cannot be written: Not a directory"),
        (["train-ldm", "ldm.yaml", f"run={'n' * 300}"], "File name too long"),
        (["train-ldm", "ldm.yaml", "run=ldm.yaml"], "cannot be a run directory"),
        (["train-ldm", "ldm.yaml", "run=ldm.yaml/run"], "cannot be a run directory"),
        (["status", "a\0b"], "NUL"),
        (["train-ldm", "nul.yaml"], "run must be text"),
    ],
)
def test_paths_that_cannot_be_are_one_line(call: Call, arguments: list[str], message: str) -> None:
    Path("nul.yaml").write_text('run: "a\\0b"\n' + yaml.safe_dump(PIXELS), encoding="utf-8")
    code, _, error = call(*arguments)
    assert code == 2 and error.count("\n") == 1 and message in error, error


def test_where_a_folder_belongs_a_file_is_found_before_training(call: Call) -> None:
    for name in ("checkpoints", "model", "samples"):
        Path("new").mkdir()
        Path("new/.lock").touch()
        (Path("new") / name).write_text("", encoding="utf-8")
        code, out, error = call("train-ldm", "ldm.yaml", "run=new")
        assert code == 2 and error.count("\n") == 1 and f"new/{name} is a file" in error and "1/6" not in out
        shutil.rmtree("new")


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "a\u2028b", "a\x0bb", "a\x85b", "a\x1b[31mb"])
@pytest.mark.parametrize("arguments", [["status"], ["replay", "x"], ["train", "configs", "x", "--device"], []])
def test_a_name_with_a_control_character_stays_in_one_line(call: Call, arguments: list[str], name: str) -> None:
    """In argparse's own errors, too."""
    code, _, error = call(*arguments, name)
    assert code == 2 and len(error.splitlines()) == 1 and name not in error


@pytest.mark.parametrize("odd", ["loop", "pipe"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["train-ldm", "ldm.yaml", "run={}"], ["train-ldm", "{}"], ["init", "photos", "--out", "{}"], ["init", "{}"],
        ["convert", "run", "{}"], ["reproduce", "{}", "--out", "a.png"], ["reproduce", "a.png", "--out", "{}"],
        ["replay", "{}"], ["status", "{}"],
        ["sample", "run", "--prompts-file", "{}"], ["plot", "schedules", "--run", "{}"],
    ],
)  # fmt: skip
def test_links_to_themselves_and_pipes_are_one_line(call: Call, arguments: list[str], odd: str) -> None:
    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")
    code, _, error = call(*(word.format(odd) for word in arguments))
    assert code in (2, 3, 4) and error.count("\n") == 1


def test_the_fault_of_one_process_is_told_to_the_others_with_its_code() -> None:
    fault = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/a.png")
    told: list[Any] = []

    def gather(mine: Any) -> list[Any]:
        told.append(mine)
        return [mine, mine]

    def fail() -> None:
        raise fault

    with pytest.raises(OSError):
        Processes(0, 2, gather).each(fail)
    with pytest.raises(ElsewhereError) as caught:
        Processes(1, 2, lambda mine: [told[0], mine]).each(lambda: None)
    assert (
        str(caught.value) == "process 0: /full/a.png: No space left on device"
        and caught.value.exit_code == exit_code(fault) == 2
    )


# files, replaced whole


def test_what_names_no_file_is_named(tmp_path: Path) -> None:
    with full_disk(), pytest.raises(OSError) as raised:
        replace(tmp_path / "a.json", b"x" * 10)
    assert described(raised.value) == f"{tmp_path}/a.json: {os.strerror(errno.EFBIG)}" and not os.listdir(tmp_path)
    replace(tmp_path / ("é" * 125), b"x")  # 250 bytes: the temporary name fits as well
    reader, writer = os.pipe()
    replace(Path(f"/dev/fd/{writer}"), b"told")  # no regular file: written to, not replaced
    assert os.read(reader, 10) == b"told"


@pytest.mark.parametrize("kind", ["file", "folder", "empty folder"])
def test_a_target_appears_whole_or_not_at_all(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "model.safetensors"
    if kind == "empty folder":
        target.mkdir()
    for fail in (True, False):
        with suppress(ZeroDivisionError), whole(target) as place:
            assert place.suffix == ".safetensors"
            if kind == "file":
                place.write_bytes(b"new")
            else:
                write_json(place / "a/b.json", {})
            assert not target.exists() or not any(target.iterdir())
            if fail:
                raise ZeroDivisionError
        assert [f.name for f in tmp_path.iterdir()] == [target.name] * (not fail or kind == "empty folder")
    assert target.is_file() if kind == "file" else (target / "a/b.json").is_file()


# what --out may overwrite


@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        (["report", "run", "--images", "0", "--out", "mine.html"], "mine.html"),
        (["report", "run", "--images", "0", "--out", "ldm.yaml"], "ldm.yaml"),
        (["report", "run", "--images", "0", "--out", "photos/1.png"], "photos/1.png"),
        (["plot", "schedules", "--out", "photos/1.png"], "photos/1.png"),
        (["plot", "schedules", "--out", "drawn.png"], "drawn.png"),
        (["plot", "schedules", "--out", "mine.svg"], "mine.svg"),
        (["plot", "guidance", "run", "--out", "mine.png"], "mine.json"),
        (["compare-autoencoders", "run", "run", "--out", "photos/1.png"], "photos/1.png"),
        (["compare-autoencoders", "run", "run", "--out", "ldm.yaml"], "ldm.yaml"),
        (["compare-autoencoders", "run", "run", "--out", "mine.png"], "mine.json"),
        (["sampler-report", "--steps", "2", "--out", "taken"], "taken/samplers.json"),
        (["reproduce", "drawn.png", "--out", "photos/1.png"], "photos/1.png"),
        (["convert", "run", "ldm.yaml"], "ldm.yaml"),
    ],
)
def test_what_a_command_has_not_written_it_does_not_overwrite(
    here: Path, call: Call, arguments: list[str], file: str
) -> None:
    assert call("sample", "run", "--steps", "1", "--device", "cpu")[0] == 0
    next(Path("images").glob("*.png")).rename("drawn.png")
    for name in ("mine.html", "mine.svg", "mine.json", "taken/samplers.json"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("<html>" if name.endswith("ml") else "{}", encoding="utf-8")
    before = everything(here)
    code, _, error = call(*arguments)
    assert code == 2 and error.count("\n") == 1 and Path(file).name.partition(".")[0] in error, error
    assert everything(here) == before


def test_what_it_has_written_it_writes_anew(call: Call) -> None:
    for suffix in ("png", "svg", "pdf"):
        for names in ("cosine", "linear"):
            assert call("plot", "schedules", "--names", names, "--out", f"p.{suffix}")[0] == 0
        assert is_figure(Path(f"p.{suffix}").read_bytes())
    for _ in range(2):
        assert call("report", "run", "--images", "0", "--out", "page.html")[0] == 0
        assert call("report", "run", "--images", "0")[0] == 0


# where a run may be


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("''", "run must name the folder"),
        ("'  '", "run must name the folder"),
        (".", "is the current folder"),
        ("..", "is the current folder or one above it"),
        ("/", "is the current folder or one above it"),
        ("photos", "other files in it (0.png)"),
        ("project", "other files in it (setup.py)"),
        ("run/model", "other files in it (ldm.json)"),
    ],
)
def test_a_run_among_other_things_is_refused(here: Path, call: Call, place: str, reason: str) -> None:
    Path("project").mkdir()
    Path("project/setup.py").touch()
    shutil.copy("ldm.yaml", "config.yaml")
    before = everything(here)
    for command in (["train-ldm", "ldm.yaml"], ["cache-latents", "ldm.yaml", "autoencoder=run"], ["train", "."]):
        setting = f"{'ldm.' if command[0] == 'train' else ''}run={place}"
        code, _, error = call(*command, setting)
        assert code == 2 and error.count("\n") == 1 and reason in error, error
    assert everything(here) == before


def test_logs_and_earlier_stages_may_lie_in_a_runs_folder(call: Call) -> None:
    small = ["train.steps=1", "sample.steps=1", "data.workers=0", "data.size=8"]
    Path("new/autoencoder").mkdir(parents=True)
    for name in ("slurm-1.out", "autoencoder/.lock"):
        (Path("new") / name).touch()
    assert call("train-ldm", "ldm.yaml", "run=new", *small)[0] == 0
    Path("new/notes.md").touch()  # a run that was begun may hold anything
    assert call("train-ldm", "ldm.yaml", "run=new", *small)[0] == 0


# odd files of a run

DEEP = b"[" * 100_000 + b"]" * 100_000
ODD = {
    "empty": b"",
    "half a line": b'{"step": 3, "lo',
    "not UTF-8": b'{"step": 3, "state": "\xff\xfe"}\n',
    "a list": b"[1, 2, 3]\n",
    "a number": b"7\n",
    "deep": b'{"step": 1, "a": ' + DEEP + b"}\n",
    "less deep": b'{"step": 1, "a": ' + b'{"a":' * 400 + b"1" + b"}" * 401 + b"\n",
    "numbers": b'{"step": 1, "loss": NaN, "b": 1e999, "c": ' + b"9" * 400 + b', "accuracy": -Infinity}\n',
    "5000 digits": b'{"step": ' + b"1" * 5000 + b"}\n",
    "wrong types": b'{"step": "x", "steps": null, "seconds": [], "state": {}, '
    b'"code": "5", "reason": 3, "files": [], "data": []}\n',
    "negative": b'{"step": -1, "steps": 0, "seconds": -1e400, "state": "running", "code": 1e9}\n',
    "a name of no file": b'{"step": 4, "format": 1, "files": {"a\\u0000b": {"bytes": 0, "sha256": ""}}}\n',
    "other names": b'{"step": true, "files": {"x": 3}, "format": 1, "judge": {"accuracy": {}}}\n',
}
FILES = (
    "status.json", "metrics.jsonl", "starts.jsonl", "skipped.jsonl", "report.json",
    "checkpoints/step-00000004/state.json", "checkpoints/step-00000004/manifest.json",
    "incidents/update-00000001/incident.json", "config.yaml",
)  # fmt: skip
READERS = (
    ["status", "run"], ["status", "run", "--json"], ["report", "run", "--images", "0"],
    ["diff", "run", "other"], ["diff", "other", "run"],
    ["checkpoints", "run"], ["checkpoints", "run", "--json"], ["replay", "run/incidents/update-00000001"],
    ["plot", "schedules", "run", "--out", "x.png"],
)  # fmt: skip


@pytest.mark.parametrize("odd", [*ODD, "a folder"])
def test_odd_files_of_a_run_are_one_line_or_passed_over(call: Call, monkeypatch: pytest.MonkeyPatch, odd: str) -> None:
    monkeypatch.setattr(
        "ldm.evaluation.figures.schedules.schedules_page", lambda *arguments: type("P", (), {"save": lambda *a: None})()
    )
    shutil.copytree("run", "other")
    shutil.copytree("run", "intact")
    for file in FILES:
        place = Path("run") / file
        place.parent.mkdir(parents=True, exist_ok=True)
        if odd == "a folder":
            place.unlink(missing_ok=True)
            place.mkdir()
        else:
            place.write_bytes(ODD[odd])
        for arguments in READERS:
            code, _, error = call(*arguments)
            assert code in (0, 1, 2, 3, 4) and error.count("\n") <= 1, (file, arguments, code, error)
            assert code in (0, 1) or error, (file, arguments)
        shutil.rmtree("run")
        shutil.copytree("intact", "run")


@pytest.mark.parametrize("name", ["step", "steps", "seconds", "state", "code"])
def test_a_status_of_the_wrong_type_is_named_where_it_is_needed(call: Call, name: str) -> None:
    Path("run/status.json").write_text(json.dumps({"state": "failed", "step": 1, name: ["x"]}), encoding="utf-8")
    for command in (["status", "run"], ["train-ldm", "ldm.yaml", "run=run"]):
        code, _, error = call(*command)
        assert (
            code == 2 and error.count("\n") == 1 and f"status.json: {name} should be" in error and "delete it" in error
        ), error


# text that is not text


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "run", "--prompt", "caf\udce9"], ["train-ldm", "ldm.yaml", "run=caf\udce9"], ["status", "caf\udce9"],
        ["init", "photos", "--out", "\udcff"], ["caf\udce9"], ["plot", "schedules", "--names", "\ud800"],
    ],
)  # fmt: skip
def test_arguments_that_are_not_utf8_are_one_line(call: Call, arguments: list[str]) -> None:
    code, _, error = call(*arguments)
    assert code == 2 and error.count("\n") == 1 and "is not UTF-8 text" in error


def shell(*arguments: str | bytes, **environment: str) -> subprocess.CompletedProcess[bytes]:
    given = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))}
    return subprocess.run(
        [sys.executable, "-m", "ldm.cli.main", *arguments],
        env={**given, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
    )


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_a_terminal_without_unicode_gets_escapes(here: Path) -> None:
    Path("läufe").mkdir()
    shutil.copytree("run", "läufe/×")
    strict = {"PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "1"}
    done = shell("status", "läufe/×", **strict)
    assert done.returncode == 1 and rb"l\xe4ufe/\xd7: killed" in done.stdout and not done.stderr
    done = shell("status", "läufe/○", **strict)
    assert done.returncode == 2 and done.stderr == rb"ldm status: no run l\xe4ufe/\u25cb" + b"\n"
    done = shell("status", b"l\xff", **ASCII)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"is not UTF-8 text" in done.stderr
    done = shell("init", "photos", "--out", "läufe", **ASCII)  # the locale cannot name it
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"PYTHONUTF8=1" in done.stderr, done.stderr
    done = shell("init", "photos", "--out", "ascii", **ASCII)
    assert done.returncode == 0 and "–" not in done.stdout.decode("ascii") and Path("ascii/ldm.yaml").is_file()


def test_output_that_nobody_takes(here: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "ldm.cli.main", "status", "run"]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2 and done.stderr == b"ldm status: No space left on device\n"


def test_a_training_outlives_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(sys, "stdout", Full())
    Console(lasting=True).say("a line")
    Console(lasting=True).progress(1, 2, {})
    with pytest.raises(OSError):
        Console().say("a line")


# a closed terminal


def test_a_closed_terminal_saves_as_a_request_to_stop_does(here: Path) -> None:
    train = {**TRAIN, "steps": 100_000, "validate_every": 100_000, "sample_every": 100_000, "checkpoint_every": 100_000}
    Path("long.yaml").write_text(yaml.safe_dump({"run": str(here / "new"), **PIXELS, "train": train}), encoding="utf-8")
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup, around the tests, lets them ignore
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execv(sys.executable, [sys.executable, "-m", "ldm.cli.main", "train-ldm", "long.yaml"])
    os.set_blocking(terminal, False)
    while not (here / "new/metrics.jsonl").exists() or (here / "new/metrics.jsonl").read_bytes().count(b"\n") < 3:
        with suppress(OSError):
            os.read(terminal, 100_000)
        assert os.waitpid(pid, os.WNOHANG)[0] == 0
        time.sleep(0.05)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 75
    recorded = read_status(here / "new") or {}
    saved = [shelf.step_of(p) for p in shelf.steps(here / "new/checkpoints")]
    assert recorded["state"] == "interrupted" and saved == [recorded["step"]]


def test_nohup_keeps_a_hang_up_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop(lambda text: None) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.asked and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.signal(signal.SIGHUP, missed := lambda *arguments: None)
        with Stop(lambda text: None) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.asked
        assert signal.getsignal(signal.SIGHUP) is missed
    finally:
        signal.signal(signal.SIGHUP, before)


# the perceptual loss


@pytest.mark.parametrize("wrong", ["missing", "given and missing", "noise", "another network"])
def test_lpips_weights_are_asked_for_before_anything_slow(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: str
) -> None:
    def slow(*arguments: Any) -> Any:
        raise AssertionError("a network is made, or data read")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("ldm.training.stages.autoencoder.seeded", slow)
    monkeypatch.setattr("ldm.training.stages.autoencoder.open_source", slow)
    place = tmp_path / "torch/hub/checkpoints/vgg16-397923af.pth"
    place.parent.mkdir(parents=True)
    if wrong == "noise":
        place.write_bytes(b"PK\3\4 noise")
    elif wrong == "another network":
        torch.save({"features.0.weight": torch.zeros(3)}, place)
    given = ["loss.lpips_weights=nowhere/vgg.pth"] if "given" in wrong else []
    code, _, error = call(
        "train-autoencoder",
        str(ROOT / "configs/sd1/autoencoder.yaml"),
        "run=new",
        "data.folder=photos",
        "train.mixed_precision='no'",
        *given,
    )
    assert code == 2 and error.count("\n") == 1, error
    assert "vgg16-397923af.pth" in error and ("nowhere/vgg.pth" if given else str(place)) in error
