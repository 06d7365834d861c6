"""`ldm checkpoints`: what lies in a run, whether it is intact, and what the next start takes; nothing is changed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ldm.cli.main import main
from ldm.config import ScheduleConfig
from ldm.runs.checkpoints import resume
from ldm.runs.checkpoints.files import save

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints 10 to 40, the multiples of 20 held for good."""
    path = tmp_path / "run"
    path.mkdir()
    train = {"checkpoint_every": 10, "keep_checkpoints": 2, "keep_every": 20}
    (path / "config.yaml").write_text(
        yaml.safe_dump({"run": str(path), "data": {"source": "textures", "image_size": 32}, "train": train})
    )
    for step in (10, 20, 30, 40, 50):
        groups = {"model_unet": {"w": torch.full((1000,), float(step))}, "ema": {"w": torch.zeros(1000)}}
        save(path / "checkpoints", step, groups, {}, ScheduleConfig(), keep=9)
    return path


def listed(run: Path, capsys: Capture, *options: str) -> tuple[int, dict[str, Any], str]:
    code = main(["checkpoints", str(run), "--json", *options])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def tree(run: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(f.relative_to(run)): (f.read_bytes() if f.is_file() else b"", f.stat().st_mtime_ns) for f in run.rglob("*")
    }


def test_a_line_for_each(run: Path, capsys: Capture) -> None:
    before = tree(run)
    assert main(["checkpoints", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["10", "20", "30", "40", "50"]
    assert (
        "deleted at the next save" in lines[0]
        and "multiple of 20" in lines[1]
        and "newest 2" in lines[2]
        and "newest 2" in lines[4]
    )
    assert [line.endswith("<- the next start") for line in lines] == [False] * 4 + [True]
    assert all("ema model_unet" in line and "intact" in line and " kB" in line for line in lines)
    assert main(["checkpoints", str(run), "--fast"]) == 0 and "sizes match" in capsys.readouterr().out
    assert tree(run) == before


def test_a_flipped_byte_in_the_newest(run: Path, capsys: Capture) -> None:
    file = run / "checkpoints/step-00000050/ema.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, found, error = listed(run, capsys)
    assert code == 4 and "step-00000050, is damaged: the next start uses" in error and "step-00000040" in error
    assert "ema.safetensors: its content does not match" in found["checkpoints"][-1]["problems"][0]
    assert found["next"] == str(resume.choose(run / "checkpoints")[0])
    assert [row["held"] for row in found["checkpoints"]] == [
        "newest 2",
        "multiple of 20",
        "newest 2",
        "multiple of 20",
        "not counted",
    ]
    assert listed(run, capsys, "--fast")[0] == 0  # a flip does not change the size
    os.truncate(file, 10)
    code, found, _ = listed(run, capsys, "--fast")
    assert code == 4 and "has 10 bytes" in found["checkpoints"][-1]["problems"][0]


def test_damage_to_an_older_one_is_listed_and_no_error(run: Path, capsys: Capture) -> None:
    (run / "checkpoints/step-00000030/state.json").unlink()
    code, found, _ = listed(run, capsys)
    assert code == 0 and [bool(row["problems"]) for row in found["checkpoints"]] == [False, False, True, False, False]


def test_left_overs_and_those_set_aside(run: Path, capsys: Capture) -> None:
    resume.set_aside(run / "checkpoints/step-00000030")
    dead, living = (
        run / "checkpoints/.tmp-step-00000060-99999999",
        run / f"checkpoints/.tmp-step-00000070-{os.getppid()}",
    )
    dead.mkdir()
    living.mkdir()
    (run / "checkpoints/step-00000030.bak").mkdir()
    assert main(["checkpoints", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 6 and f"{dead}: left by a killed process" in lines[3] and f"{living}: being written" in lines[4]
    )
    assert "set-aside-1: updates 40, 50, set aside" in lines[5] and dead.is_dir()


def test_none_is_intact(run: Path, capsys: Capture) -> None:
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    code, found, error = listed(run, capsys)
    assert code == 4 and found["next"] is None and "none is intact, so the next start will refuse" in error


def test_without_a_configuration_retention_is_not_known(run: Path, capsys: Capture) -> None:
    (run / "config.yaml").unlink()
    code, found, _ = listed(run, capsys)
    assert code == 0 and {row["held"] for row in found["checkpoints"]} == {""}


def test_no_checkpoint_and_no_run(tmp_path: Path, capsys: Capture) -> None:
    assert main(["checkpoints", str(tmp_path)]) == 4 and "has no checkpoint" in capsys.readouterr().err
    assert main(["checkpoints", str(tmp_path / "none")]) == 2 and "no run" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["checkpoints", "status", "report"])
def test_the_folder_of_several_stages_names_those_that_are_there(tmp_path: Path, capsys: Capture, command: str) -> None:
    """As `ldm train` leaves it where it was interrupted before its last stage."""
    for stage in ("autoencoder", "text"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "config.yaml").touch()
    assert main([command, str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith(f"; there is one in {tmp_path}/autoencoder and in {tmp_path}/text\n")
