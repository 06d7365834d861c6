"""`ldm diff`: what differs between two runs is listed, each with both values, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm import config as configuration
from ldm.cli.main import main
from ldm.config import DiffusionTrainingConfig, SampleConfig, ScheduleConfig, UNetConfig
from ldm.models.unet import UNet
from ldm.pipeline import Pipeline

EQUAL = {subject: ["no difference"] for subject in ("configuration", "data", "code", "results", "report", "status")}
START = {
    "time": "2026-01-01T00:00:00+00:00", "step": 0, "processes": 1, "device": "cpu", "python": "3.11.7",
    "torch": "2.15.0", "accelerate": "1.15.0", "ldm": "0.1.0", "commit": "a" * 40, "dirty": False,
    "arguments": ["train-ldm", "a.yaml"],
}  # fmt: skip
METRICS = [
    {"step": 1, "loss": 1.0, "updates_per_second": 3.0},
    {"step": 2, "loss": 0.5, "validation/loss_by_t": [0.25, 0.125]},
]
REPORT = {"judge": {"all": {"accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 10}}, "seconds": {"train": 3}, "images": 10}


def make(path: Path, **given: Any) -> Path:
    """A run as its files tell it."""
    tree = {
        "run": str(path),
        "data": {"source": "shapes", "size": 24},
        "autoencoder": "a",
        "text": "t",
        "sample": {"steps": 4},
    }
    path.mkdir()
    configuration.save(
        configuration.build(DiffusionTrainingConfig, {**tree, **given.get("config", {})}), path / "config.yaml"
    )
    data = {"images": 24, "train": "1f", "validation": "2f", **given.get("data", {})}
    for step in (1, 2):
        folder = path / f"checkpoints/step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
        (folder / "state.json").write_text(json.dumps({"step": step, "data": data if step == 2 else {"images": 7}}))
    starts = [{**START, "torch": "1.0"}, {**START, **given.get("start", {})}]
    (path / "starts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in starts) + '{"torn')
    metrics = [*METRICS, *given.get("metrics", [])]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (path / "report.json").write_text(json.dumps({**REPORT, **given.get("report", {})}))
    (path / "status.json").write_text(json.dumps({"state": "done", "step": 2, "steps": 2, **given.get("status", {})}))
    return path


@pytest.fixture
def diff(capsys: pytest.CaptureFixture[str]) -> Callable[[Path, Path], dict[str, list[str]]]:
    """`ldm diff`: the lines below each subject, single-spaced."""

    def call(a: Path, b: Path) -> dict[str, list[str]]:
        capsys.readouterr()
        assert main(["diff", str(a), str(b)]) == 0
        found: dict[str, list[str]] = {}
        for line in capsys.readouterr().out.splitlines():
            if line.startswith("  "):
                found[subject].append(" ".join(line.split()))
            else:
                subject = line
                found[subject] = []
        return found

    return call


Diff = Callable[[Path, Path], dict[str, list[str]]]


def test_two_equal_runs_have_no_difference(tmp_path: Path, diff: Diff) -> None:
    """Though one is called differently, started at another time and faster."""
    a = make(tmp_path / "a", status={"seconds": 7.0})
    b = make(
        tmp_path / "b", start={"time": "2027", "step": 1, "arguments": []},
        metrics=[{"step": 2, "updates_per_second": 9.0}], report={"seconds": {"train": 4}}, status={"seconds": 9.0},
    )  # fmt: skip
    assert diff(a, b) == EQUAL


DIFFERENT: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        "configuration",
        {"config": {"caption_dropout": 0.2, "sample": {"steps": 5}}},
        ["caption_dropout 0.1 → 0.2", "sample.steps 4 → 5"],
    ),
    ("configuration", {"config": {"init": "weights"}}, ["init null → weights"]),
    ("configuration", {"config": {"prompts": ["a", "b"]}}, ["prompts [] → [a, b]"]),
    ("data", {"data": {"images": 25, "train": "3f"}}, ["images 24 → 25", "train 1f → 3f"]),
    ("code", {"start": {"commit": None, "dirty": True}}, [f"commit {'a' * 40} → null", "dirty false → true"]),
    (
        "code",
        {"start": {"torch": "2.16.0", "device": "H200", "processes": 8}},
        ["torch 2.15.0 → 2.16.0", "device cpu → H200", "processes 1 → 8"],
    ),
    ("results", {"metrics": [{"step": 2, "loss": 0.5000000000000001}]}, ["loss 0.5 → 0.50000000000000011"]),
    (
        "results",
        {"metrics": [{"step": 3, "loss": None, "new": 0.1}]},
        ["update 2 → 3", "loss 0.5 → null", "new – → 0.1"],
    ),
    (
        "results",
        {"metrics": [{"step": 2, "validation/loss_by_t": [0.25, 1 / 3]}]},
        ["validation/loss_by_t [0.25, 0.125] → [0.25, 0.333333]"],
    ),
    (
        "report",
        {"report": {"judge": {"all": {"accuracy": 0.75}}, "images": 11}},
        ["judge.all 0.5 → 0.75", "images 10 → 11"],
    ),
    (
        "status",
        {"status": {"state": "failed", "code": 5, "reason": "not finite"}},
        ["state done → failed", "code – → 5", "reason – → not finite"],
    ),
]


@pytest.mark.parametrize(("subject", "given", "rows"), DIFFERENT)
def test_what_differs_is_listed(
    tmp_path: Path, diff: Diff, subject: str, given: dict[str, Any], rows: list[str]
) -> None:
    a, b = make(tmp_path / "a"), make(tmp_path / "b", **given)
    assert diff(a, b) == {**EQUAL, subject: rows}
    assert diff(b, a)[subject] != rows and len(diff(b, a)[subject]) == len(rows)


def test_what_only_one_has_recorded(tmp_path: Path, diff: Diff) -> None:
    a, b = make(tmp_path / "a"), make(tmp_path / "b")
    (b / "skipped.jsonl").write_text('{"file": "x.png", "reason": "damaged"}\n')
    (b / "report.json").unlink()
    (b / "starts.jsonl").unlink()
    found = diff(a, b)
    assert found["data"] == ["left out 0 → 1"] and found["report"] == ["report.json there → –"]
    assert found["code"][0] == "ldm 0.1.0 → –" and len(found["code"]) == 8
    for run in (a, b):
        for name in ("checkpoints", "starts.jsonl", "metrics.jsonl", "report.json", "status.json", "skipped.jsonl"):
            shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink(missing_ok=True)
    assert diff(a, b) == {
        subject: ["no difference" if subject == "configuration" else "neither has recorded any"] for subject in EQUAL
    }


def test_two_models(tmp_path: Path, diff: Diff) -> None:
    torch.manual_seed(0)
    pipe = Pipeline(
        UNet(UNetConfig((8,), 1, (), (1,), groups=4), 3, 3, None),
        ScheduleConfig(num_steps=20),
        "x0",
        None,
        None,
        16,
        SampleConfig(steps=2),
    )
    pipe.save_pretrained(tmp_path / "a")
    pipe.save_pretrained(tmp_path / "b")
    assert set(map(tuple, diff(tmp_path / "a", tmp_path / "b").values())) == {("no difference",)}
    pipe.unet.conv_in.weight.data += 1
    dataclasses.replace(pipe, target="eps").save_pretrained(tmp_path / "b")
    found = diff(tmp_path / "a", tmp_path / "b")
    assert (
        len(found["unet"]) == 1 and found["unet"][0].startswith("sha256 ") and found["process"] == ["target x0 → eps"]
    )
    assert found["ldm.json"] == ["no difference"]


def test_what_cannot_be_compared_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, empty = make(tmp_path / "a"), tmp_path / "empty"
    empty.mkdir()
    (damaged := make(tmp_path / "damaged")).joinpath("status.json").write_text("{")
    for a, b, code, what in [
        (run, tmp_path / "none", 2, f"no run or model {tmp_path / 'none'}"),
        (run, empty, 2, f"{run} is a run and {empty} is not"),
        (empty, empty, 4, f"{empty} holds no model"),
        (run, damaged, 2, "status.json cannot be read"),
    ]:
        capsys.readouterr()
        assert main(["diff", str(a), str(b)]) == code
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1 and what in said.err, said.err
