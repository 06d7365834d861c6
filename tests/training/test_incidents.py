"""Updates that are not finite.

All processes agree, nothing changes, the incident is written and can be computed again.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.cut_runs import assert_same_end, at_position, lines, make_loop, power_cut, state_of
from support.interrupts import PowerCut
from support.stages import Stages
from torch import Tensor, nn

from ldm.cli.main import main
from ldm.data.dataset import batches
from ldm.errors import DataError
from ldm.training.diagnostics import nonfinite as incidents
from ldm.training.diagnostics import replay
from ldm.training.ema import EMA
from ldm.training.loop import Loop
from ldm.training.rank_checks import ProcessesDifferError
from ldm.training.stages.autoencoder import AutoencoderTask
from ldm.training.stages.diffusion import DiffusionTask
from ldm.training.step_flags import StepFlags

__all__ = ["make_loop"]  # a fixture


def break_image(sample: dict[str, Any]) -> None:
    sample["image"][0, 3, 4] = math.nan


# what is agreed


def test_one_process_that_is_not_finite_or_is_asked_to_stop_is_enough() -> None:
    cpu, others = torch.device("cpu"), torch.zeros(2)
    flags = StepFlags(lambda mine: mine + others, cpu)
    assert flags.receive() is None and not flags.stop  # before the first update there is nothing to read
    assert bool(flags.send(False, torch.tensor(True)))
    assert flags.receive() and not flags.stop
    others[1] = 1.0  # another process was not finite
    assert not bool(flags.send(False, torch.tensor(True)))
    assert flags.receive() is False and not flags.stop
    others.zero_()
    assert not bool(flags.send(True, torch.tensor(False)))
    assert flags.receive() is False and flags.stop
    assert bool(flags.send(False, torch.tensor(True))) and flags.receive()
    assert flags.stop and flags.receive() is None  # a request stays; an update is read once


def test_a_loss_that_is_not_finite_skips_the_update_though_its_gradients_are(
    stages: Stages, make_loop: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = stages.settings("ldm")
    loop = make_loop(DiffusionTask.from_config(settings, lambda _: None), settings)
    feed, micro_step = batches(loop.task.stream, loop.split, 0, 3, 0), loop.task.micro_step
    loop._update(feed)
    loop.step, before = 1, state_of(loop)

    def infinite(*arguments: Any) -> dict[str, Tensor]:
        return {k: v * math.inf if k == "loss" else v for k, v in micro_step(*arguments).items()}

    monkeypatch.setattr(loop.task, "micro_step", infinite)
    loop._update(feed)
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(loop), strict=True))
    assert all(
        bool(torch.isfinite(p.grad).all()) for p in loop.task.networks["unet"].parameters() if p.grad is not None
    )


def test_a_network_is_not_stepped_where_another_broke(
    stages: Stages, make_loop: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The discriminator's gradients alone are not finite: the autoencoder and its average stay as well."""
    settings = stages.settings("autoencoder")
    loop = make_loop(AutoencoderTask(settings), settings)
    feed = batches(loop.task.stream, loop.split, 0, 6, 0)
    for _ in range(4):
        loop._update(feed)
        loop.step += 1
    before, weight = state_of(loop), loop.task.state()
    handle = next(loop.task.networks["discriminator"].parameters()).register_hook(lambda gradient: gradient * math.nan)
    figures = loop._update(feed)
    handle.remove()
    assert math.isnan(float(figures["grad_norm_discriminator"])) and math.isfinite(
        float(figures["grad_norm_autoencoder"])
    )
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(loop), strict=True)) and loop.task.state() == weight


def test_the_loss_scale_of_float16_falls_and_nothing_else_changes(
    stages: Stages, make_loop: Callable[..., Loop]
) -> None:
    settings = stages.settings("ldm")
    plain, scaled = (make_loop(DiffusionTask.from_config(settings, lambda _: None), settings) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)  # pyright: ignore[reportPrivateImportUsage]
    scaled.accelerator.scaler = scaled.optimizers.scaler = scaler
    scaled.guard.patient = True
    try:
        for loop in (plain, scaled):
            loop._update(batches(loop.task.stream, loop.split, 0, 1, 0))
        for a, b in zip(state_of(plain), state_of(scaled), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        before = state_of(scaled)
        handle = next(scaled.task.networks["unet"].parameters()).register_hook(lambda gradient: gradient * math.inf)
        scaled._update(batches(scaled.task.stream, scaled.split, 1, 2, 0))
        handle.remove()
        assert all(torch.equal(a, b) for a, b in zip(before, state_of(scaled), strict=True))
        assert scaler.get_scale() == 2.0**7
        scaled.guard.look_back(1)
        assert not (scaled.run.path / "incidents").exists()  # type: ignore[union-attr]
    finally:
        scaled.accelerator.scaler = None


# what is written


def test_an_incident_holds_what_its_update_had(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        at_position(patch, lambda p: p == 4 * 4 + 2, break_image)  # a checkpoint follows update 4
        assert stages.train("autoencoder", f"run={tmp_path}/run", "train.keep_checkpoints=9") == 0
        place = tmp_path / "run/incidents/update-00000004"
        assert (
            f"update 4 was not finite and changed nothing: `ldm replay {place}` names the module"
            in capsys.readouterr().out
        )
        incident, weights = incidents.read(place)
        assert (incident.update, list(incident.positions)) == (4, [16, 17, 18, 19])
        saved = tmp_path / "run/checkpoints/step-00000004"
        for name, tensors in weights.items():
            assert all(torch.equal(tensors[k], v) for k, v in load_file(saved / f"model_{name}.safetensors").items())
        assert incident.task == json.loads((saved / "state.json").read_text())["task"]

        assert main(["replay", str(place)]) == 0
        said = capsys.readouterr().out
        assert "update 4: positions 16 to 19" in said
        assert "sample at position 18 ('" in said and "its image has 1 values that are not finite" in said
        assert "forward: autoencoder.encoder.conv_in (Conv2d): " in said and "its input was not finite already" in said
        assert "17 (" not in said
    assert main(["replay", str(place)]) == 1  # with the image as it was
    assert "all of update 4 is finite here (it was split 1 × 2" in capsys.readouterr().err


def test_a_run_with_an_incident_resumes_as_if_it_had_not_stopped(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_position(monkeypatch, lambda p: p == 4 * 1, break_image)
    assert stages.train("autoencoder", f"run={tmp_path}/one") == 0
    with monkeypatch.context() as patch:
        at_position(patch, lambda p: p == 4 * 3 + 1, power_cut)
        with pytest.raises(PowerCut):
            stages.train("autoencoder", f"run={tmp_path}/two")
    assert stages.train("autoencoder", f"run={tmp_path}/two") == 0
    assert_same_end(tmp_path / "two", tmp_path / "one")


def test_incidents_in_a_row_share_their_weights_and_the_newest_rows_keep_theirs(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {1, 2, 5, 7, 9, 10, 11}  # rows that begin at 1, 5, 7, 9
    at_position(monkeypatch, lambda p: p // 4 in broken and p % 4 == 0, break_image)
    assert stages.train("autoencoder", f"run={tmp_path}/run", "train.steps=13") == 0
    places = {u: tmp_path / f"run/incidents/update-{u:08d}" for u in sorted(broken)}
    assert sorted((tmp_path / "run/incidents").iterdir()) == list(places.values())
    of = {u: json.loads((place / "incident.json").read_text())["weights"] for u, place in places.items()}
    assert {u: int(name[-2:]) for u, name in of.items()} == {1: 1, 2: 1, 5: 5, 7: 7, 9: 9, 10: 9, 11: 9}
    assert {u for u, place in places.items() if any(place.glob("*.safetensors"))} == {5, 7, 9}
    assert incidents.read(places[11])[1].keys() == {"autoencoder", "discriminator"}
    assert main(["replay", str(places[2])]) == 2


def test_training_goes_on_where_an_incident_cannot_be_written(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_position(monkeypatch, lambda p: p == 4 * 2, break_image)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/incidents").write_text("")
    assert stages.train("autoencoder", f"run={tmp_path}/run") == 0
    assert "update 2 was not finite and changed nothing; " in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["nothing", "file", "fields"])
def test_what_is_no_incident_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str) -> None:
    if wrong != "nothing":
        (tmp_path / "incident.json").write_text("{" if wrong == "file" else '{"positions": [], "update": 3}')
    assert main(["replay", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"ldm replay: {tmp_path} is not an incident of a run")


# who did it


def test_the_module_whose_weights_are_broken_is_named(
    stages: Stages, tmp_path: Path, make_loop: Callable[..., Loop], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = stages.settings("ldm")
    loop = make_loop(DiffusionTask.from_config(settings, lambda _: None), settings)
    assert loop.run
    loop.run.start(settings)
    name = next(
        n
        for n, m in loop.task.networks["unet"].named_modules()
        if n.startswith("mid_block") and isinstance(m, nn.Conv2d)
    )
    with torch.no_grad():
        loop.task.networks["unet"].get_submodule(name).weight[0, 0] = 3e38  # type: ignore[index]
    loop._update(batches(loop.task.stream, loop.split, 0, 1, 0))
    loop.step = 1
    loop.guard.look_back(loop.step)
    place = loop.run.path / "incidents/update-00000000"
    assert main(["replay", str(place)]) == 0
    said = capsys.readouterr().out
    assert f"forward: unet.{name} (Conv2d): " in said and "from finite inputs" in said and "not finite: " in said


class Bent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient * math.inf


class Bend(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Bent.apply(x)  # type: ignore[no-any-return]


def test_a_gradient_that_breaks_on_its_way_back_is_named() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), Bend(), nn.Linear(3, 3))
    findings = replay.Findings()
    with replay._watched({"network": network}, findings):
        network(torch.randn(2, 3)).sum().backward()
    assert findings.forward is None
    (line,) = findings.lines()
    assert line.startswith("backward: the gradient that reaches the output of network.1 (Linear) has 6 values")
    findings = replay.Findings()
    with replay._watched({"network": network}, findings):
        network(torch.full((2, 3), 3e38) * 10)
    assert findings.forward is not None and findings.forward.startswith("network.0 (Linear): 6 of 6 values")
    assert not network._forward_hooks and not network[0]._forward_hooks  # nothing is left behind


# an end by an error


def test_a_failing_run_saves_what_it_has(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost(sample: dict[str, Any]) -> None:
        raise DataError("the disk with the images is gone")

    with monkeypatch.context() as patch:
        at_position(patch, lambda p: p == 4 * 3 + 2, lost)  # a checkpoint is due after 2 and 4
        assert stages.train("ldm", f"run={tmp_path}/run") == 3
    output = capsys.readouterr()
    assert "saved at update 3, before the end by an error" in output.out
    assert output.err == "ldm train-ldm: the disk with the images is gone\n"
    assert (tmp_path / "run/checkpoints/step-00000003").is_dir()
    assert stages.train("ldm", f"run={tmp_path}/run") == 0
    assert_same_end(tmp_path / "run", stages.folder / "ldm")


def test_what_was_logged_of_an_update_stays_where_its_validation_fails(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(self: Loop) -> Any:
        raise DataError("the validation images are gone")

    monkeypatch.setattr(Loop, "_validated", lost)
    assert stages.train("ldm", f"run={tmp_path}/run", "train.validate_every=3") == 3
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3]
    assert lines(tmp_path / "run")[-1]["loss"] == lines(stages.folder / "ldm")[2]["loss"]


def test_a_slow_validation_or_grid_is_warned_about_once(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ldm.runs.checkpoints.writer.SLOW", -1)
    assert stages.train("ldm", f"run={tmp_path}/run", "train.validate_every=2", "train.sample_every=3") == 0
    said = capsys.readouterr().err.splitlines()
    for what in ("a validation", "drawing samples"):
        assert (
            len(
                [
                    line
                    for line in said
                    if line.startswith(f"warning: {what} took 0 s, and launchers kill a process 30 s after")
                ]
            )
            == 1
        )


@pytest.mark.parametrize("when", ["differing", "within a step"])
def test_what_may_be_wrong_is_not_saved(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def fail(self: Any, *arguments: Any) -> Any:
        if (self.step if when == "differing" else arguments[0]) == 3:
            raise ProcessesDifferError("two models") if when == "differing" else RuntimeError("lost device")
        return original(self, *arguments)

    where, name = (Loop, "_update") if when == "differing" else (EMA, "update")  # after the optimizers' step
    original = getattr(where, name)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, fail)
        if when == "differing":
            assert stages.train("ldm", f"run={tmp_path}/run") == 2
        else:
            with pytest.raises(RuntimeError, match="lost device"):
                stages.train("ldm", f"run={tmp_path}/run")
    assert [f.name for f in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000002"]
    assert lines(tmp_path / "run")[-1]["step"] == 3
