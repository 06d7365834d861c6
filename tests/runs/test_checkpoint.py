"""Checkpoints under every accident: kills, flipped bytes, full disks. And the optimizer's state, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.checkpoints import flip
from torch import Tensor, nn

from ldm.config import ScheduleConfig
from ldm.errors import CheckpointError
from ldm.runs.checkpoints import files as checkpoint
from ldm.runs.checkpoints import folder as shelf
from ldm.runs.checkpoints.files import load, save
from ldm.runs.checkpoints.folder import newest_valid

CONFIG = ScheduleConfig()  # any dataclass will do


def tensors(value: float = 1.0) -> dict[str, dict[str, Tensor]]:
    return {
        "model": {
            "a.weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(int(value))),
            "b": torch.tensor(value),
        },
        "ema": {"a.weight": torch.full((3, 4), value, dtype=torch.bfloat16)},
        "empty": {},
    }


def same(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> bool:
    return a.keys() == b.keys() and all(
        a[g].keys() == b[g].keys()
        and all(a[g][n].dtype == b[g][n].dtype and torch.equal(a[g][n], b[g][n]) for n in a[g])
        for g in a
    )


def test_round_trip(tmp_path: Path) -> None:
    state = {"step": 7, "weight": 0.1 + 0.2, "nested": {"list": [1, 2.5, None, True]}}
    path = save(tmp_path, 7, tensors(), state, CONFIG)
    assert path.name == "step-00000007" and newest_valid(tmp_path) == (path, [])
    read, read_state = load(path)
    assert same(read, tensors()) and read_state == state
    assert load(path, groups=["ema"])[0].keys() == {"ema"}


def test_views_shared_memory_and_layouts_are_written_whole(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    given = {"m": {"row": base[1], "column": base[:, 2], "transposed": base.T, "again": base, "image": image}}
    assert same(load(save(tmp_path, 1, given, {}, CONFIG))[0], given)


def test_nothing_there(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "none") == (None, [])
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load(tmp_path / "step-00000001")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: flip(p / "model.safetensors"), r"model\.safetensors: its content does not match"),
        (lambda p: os.truncate(p / "model.safetensors", 40), r"model\.safetensors: has 40 bytes"),
        (lambda p: (p / "ema.safetensors").unlink(), r"ema\.safetensors: is missing"),
        (lambda p: flip(p / "state.json"), r"state\.json: its content"),
        (lambda p: (p / "manifest.json").unlink(), r"manifest\.json: cannot be read"),
        (lambda p: (p / "manifest.json").write_text('{"files": []}'), r"manifest\.json: cannot be read"),
        (lambda p: os.truncate(p / "manifest.json", 30), r"manifest\.json: cannot be read"),
    ],
)
def test_damage_is_found_named_and_skipped(tmp_path: Path, damage: object, message: str) -> None:
    good, bad = save(tmp_path, 1, tensors(1), {}, CONFIG), save(tmp_path, 2, tensors(2), {}, CONFIG)
    damage(bad)  # type: ignore[operator]
    path, problems = newest_valid(tmp_path)
    assert path == good and len(problems) == 1
    with pytest.raises(CheckpointError, match=message):
        load(bad)
    with pytest.raises(CheckpointError, match=message):
        raise CheckpointError(problems[0])


def test_a_copied_folder_under_another_number_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1, tensors(), {}, CONFIG).rename(tmp_path / "step-00000009")
    path, problems = newest_valid(tmp_path)
    assert path is None and "not the manifest of this checkpoint" in problems[0]


def test_retention_counts_intact_checkpoints_only(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, tensors(), {}, CONFIG, keep=2)
    assert [shelf.step_of(p) for p in shelf.steps(tmp_path)] == [2, 3]
    flip(tmp_path / "step-00000003" / "model.safetensors")
    save(tmp_path, 4, tensors(), {}, CONFIG, keep=2)
    assert [shelf.step_of(p) for p in shelf.steps(tmp_path)] == [2, 3, 4]  # 3 is damaged: 2 must stay
    with pytest.raises(CheckpointError, match="keep must be at least 2"):
        save(tmp_path, 5, tensors(), {}, CONFIG, keep=1)


def test_the_same_step_again(tmp_path: Path) -> None:
    path = save(tmp_path, 1, tensors(1), {}, CONFIG)
    save(tmp_path, 1, tensors(2), {}, CONFIG)
    assert same(load(path)[0], tensors(1))  # intact: kept
    flip(path / "model.safetensors")
    save(tmp_path, 1, tensors(2), {}, CONFIG)
    assert same(load(path)[0], tensors(2))  # damaged: replaced


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("write failed"), "safetensors"])
def test_full_disk_is_one_error_and_leaves_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: object
) -> None:
    good = save(tmp_path, 1, tensors(), {}, CONFIG)

    def fail(named: dict[str, Tensor], file: Path) -> None:
        file.write_bytes(b"half")
        raise checkpoint.SafetensorError("I/O error: no space left") if error == "safetensors" else error  # type: ignore[misc]

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(CheckpointError, match=r"step-00000002: the checkpoint could not be written: \w+"):
        save(tmp_path, 2, tensors(), {}, CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == [good.name] and newest_valid(tmp_path) == (good, [])


def test_state_must_be_json(tmp_path: Path) -> None:
    for state in ({"x": float("nan")}, {"x": object()}):
        with pytest.raises(CheckpointError, match="could not be written"):
            save(tmp_path, 1, tensors(), state, CONFIG)
    assert list(tmp_path.iterdir()) == []


NURSERY = """
import os, sys, torch
from pathlib import Path
from ldm.config import ScheduleConfig
from ldm.runs.checkpoints.files import save
torch.set_num_threads(1)
for line in sys.stdin:  # one child for each line, which saves until it is killed; torch is imported once
    if not (child := os.fork()):
        for step in range(int(line), 10**6):
            w = torch.full((200_000,), float(step))
            groups = {"model": {"w": w}, "ema": {"w": torch.zeros(1000)}}
            save(Path(sys.argv[1]), step, groups, {"step": step}, ScheduleConfig())
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


def test_a_killed_writer_leaves_a_valid_newest_checkpoint(tmp_path: Path) -> None:
    reached, leftovers = 0, 0
    command = [sys.executable, "-c", NURSERY, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as nursery:
        assert nursery.stdin is not None and nursery.stdout is not None
        for trial in range(8):
            print(reached + 1, file=nursery.stdin, flush=True)
            child = int(nursery.stdout.readline())
            while newest_name(tmp_path) <= reached:  # one commit in each trial, then any moment
                os.kill(child, 0)  # fails if it died by itself
                time.sleep(0.001)
            time.sleep(0.0037 * trial)
            os.kill(child, signal.SIGKILL)
            assert nursery.stdout.readline() == "gone\n"
            path, problems = newest_valid(tmp_path)
            assert path is not None and problems == []
            read, state = load(path)
            assert shelf.step_of(path) > reached and state == {"step": shelf.step_of(path)}
            assert torch.equal(read["model"]["w"], torch.full((200_000,), float(state["step"])))
            reached = shelf.step_of(path)
            leftovers += len(shelf.remove_stale(tmp_path))
            assert list(tmp_path.glob(".tmp-*")) == []
        nursery.stdin.close()
    assert leftovers > 0  # some kill did hit a write


def newest_name(folder: Path) -> int:
    return max((shelf.step_of(p) for p in shelf.steps(folder)), default=0)


def test_stale_folders_of_the_dead_go_and_of_the_living_stay(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    dead, living = tmp_path / f".tmp-step-00000001-{process.pid}", tmp_path / f".tmp-step-00000001-{os.getppid()}"
    own = tmp_path / f".tmp-step-00000003-{os.getpid()}"
    for path in (dead, living, own):
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"half")
    messages = shelf.remove_stale(tmp_path)
    assert len(messages) == 2 and str(dead) in messages[0] + messages[1]
    assert not dead.exists() and not own.exists() and living.exists()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 2, 3), nn.Linear(4, 4)).to(
        memory_format=torch.channels_last
    )


def updates(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        layers = list(model.children())
        h = layers[2](layers[1](layers[0](x)))
        (layers[3](h) if step >= 5 else h).square().mean().backward()  # the linear layer has no state before update 5
        optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("stop", [0, 3, 8])
def test_optimizer_continues_bit_for_bit(tmp_path: Path, fused: bool, stop: int) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    updates(model, optimizer, 0, stop)
    path = save(
        tmp_path,
        stop,
        {"model": model.state_dict(), "optimizer": checkpoint.optimizer_tensors(optimizer, model)},
        {},
        CONFIG,
    )
    assert len(load(path)[0]["optimizer"]) == {0: 0, 3: 12, 8: 18}[stop]
    updates(model, optimizer, stop, 12)

    again = network()
    resumed = torch.optim.AdamW(again.parameters(), lr=1e-2, fused=fused)
    updates(again, resumed, 20, 22)  # a different past, to be overwritten
    read, _ = load(path)
    again.load_state_dict(read["model"])
    checkpoint.restore_optimizer(resumed, again, read["optimizer"])
    updates(again, resumed, stop, 12)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_optimizer_faults_are_named() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    updates(model, optimizer, 0, 6)
    good = checkpoint.optimizer_tensors(optimizer, model)
    for bad, message in [
        ({**good, "x.step": torch.tensor(1.0)}, "x.step belongs to no parameter"),
        ({k: v for k, v in good.items() if k != "0.bias.step"}, "0.bias is incomplete"),
        ({**good, "0.bias.exp_avg": torch.zeros(9)}, "0.bias is incomplete or not of the parameter's shape"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            checkpoint.restore_optimizer(optimizer, model, bad)
    with pytest.raises(CheckpointError, match="6 parameters, which are not the 4 of the network"):
        checkpoint.restore_optimizer(optimizer, model[:3], good)
    amsgrad = torch.optim.AdamW(model.parameters(), amsgrad=True)
    updates(model, amsgrad, 0, 1)
    with pytest.raises(CheckpointError, match="max_exp_avg_sq"):
        checkpoint.optimizer_tensors(amsgrad, model)


def test_manifest_lists_every_file(tmp_path: Path) -> None:
    path = save(tmp_path, 1, tensors(), {}, CONFIG)
    manifest = json.loads((path / "manifest.json").read_text())
    assert {*manifest["files"], "manifest.json"} == {f.name for f in path.iterdir()}
