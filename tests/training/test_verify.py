"""`ldm verify-resume`: exact on every stage, and what breaks a resume is found and named."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from support.stages import DIFFUSION, STUDENT, TRAIN, Stages

from ldm.cli.main import main
from ldm.cli.verify_resume import _folder
from ldm.config import ConfigError, load_any
from ldm.data.dataset import BatchPlan, Stream
from ldm.runs.checkpoints import files as checkpoint
from ldm.runs.checkpoints import writer
from ldm.runs.checkpoints.writer import write
from ldm.runs.directory import RunDirectory
from ldm.training import loop, optimizers, state
from ldm.training.diagnostics.deviation import (
    Difference,
    Row,
    between_digests,
    between_figures,
    between_groups,
    between_rates,
    between_reads,
    verdict,
)
from ldm.training.diagnostics.verify_resume import Plan
from ldm.training.ema import EMA
from ldm.training.stages.autoencoder import AutoencoderTask

Damage = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def configs(stages: Stages) -> dict[str, Path]:
    """Configurations of the six stages, and one with Muon; the classifier's classes are folders of a few pictures."""
    folder = stages.folder
    for name, colour in (("dark", 40), ("light", 200)):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (32, 32), (colour, i, 0)).save(folder / f"photos/{name}/{i}.png")
    classes = {"folder": f"{folder}/photos", "captions": "class", "image_size": 32, "validation_fraction": 0.3}
    more: dict[str, Any] = {
        "classifier": {
            "data": classes, "diffusion": f"{folder}/ldm", "model": {"channels": [8, 8], "groups": 4}, "train": TRAIN,
        },
        "lora": {
            **DIFFUSION, "autoencoder": f"{folder}/autoencoder", "text": f"{folder}/clip", "init": f"{folder}/ldm",
            "train": {**TRAIN, "lora": {"rank": 2}},
        },
        "student": {
            **DIFFUSION, "autoencoder": f"{folder}/autoencoder", "text": f"{folder}/clip", "init": f"{folder}/ldm",
            "train": TRAIN, **STUDENT,
        },
        "muon": {
            **DIFFUSION, "autoencoder": f"{folder}/autoencoder", "text": f"{folder}/clip",
            "train": {**TRAIN, "optimizer": "muon"},
        },
    }  # fmt: skip
    for name, tree in more.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"run": f"{folder}/{name}", **tree}))
    return {name: folder / f"{name}.yaml" for name in ("autoencoder", "clip", "ldm", *more)}


def rows(said: str) -> dict[str, list[str]]:
    """The table's lines by name; the names end in two blanks at least."""
    table = said[said.index("as restored") :].splitlines()[1:-1]
    return {name.strip(): rest.split() for name, _, rest in (line.partition("  ") for line in table)}


def content(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(f): (f.stat().st_size, f.stat().st_mtime_ns) for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("name", ["autoencoder", "clip", "ldm", "classifier", "lora", "student", "muon"])
def test_every_stage_resumes_exactly(configs: dict[str, Path], capsys: pytest.CaptureFixture[str], name: str) -> None:
    before = content(configs[name].parent)
    assert main(["verify-resume", str(configs[name]), "--updates", "4"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert (
        said.endswith("\nverdict: exact\n")
        and "killed within update 4, then resumed from the checkpoint of update 2" in said
    )
    found = rows(said)
    network = {"ldm": "unet", "lora": "unet", "student": "unet", "muon": "unet"}.get(name, name)
    wanted = [f"{what} of {network}" for what in ("weights", "exp_avg", "exp_avg_sq")] + ["EMA", "state of the task"]
    assert all(found[row] == ["equal", "0", "0"] for row in wanted)
    assert all(
        found[row] == ["0", "0"]
        for row in ("positions read", "samples, draws included", "learning rates", "logged figures")
    )
    assert ("momentum_buffer of unet" in found) == (name == "muon")
    assert ("exp_avg of discriminator" in found) == (
        name == "autoencoder"
    )  # it has joined, although loss.gan_start is 2
    assert content(configs[name].parent) == before  # neither the runs nor anything beside them


# what breaks a resume


def _no_moments(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checkpoint, "restore_optimizer", lambda *arguments: None)


def _no_average(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EMA, "load", lambda self, tensors: None)


def _half_a_save(patch: pytest.MonkeyPatch) -> None:
    """The average is neither written nor asked for."""
    tensors = state.TrainingState.tensors
    patch.setattr(state.TrainingState, "tensors", lambda self: {k: v for k, v in tensors(self).items() if k != "ema"})
    load = checkpoint.load
    patch.setattr(checkpoint, "load", lambda *a, **k: ({"ema": None, **load(*a, **k)[0]}, load(*a, **k)[1]))
    patch.setattr(EMA, "load", lambda self, tensors: None)


def _shifted(patch: pytest.MonkeyPatch, shift: Callable[[int], int]) -> None:
    """What a run reads, moved by a number of positions that depends on the update that it continues from."""
    by: list[int] = []
    positions, batches = BatchPlan.positions, loop.batches

    def noted(stream: Any, split: Any, first: int, *rest: Any) -> Any:
        by.append(shift(first))
        return batches(stream, split, first, *rest)

    patch.setattr(loop, "batches", noted)
    patch.setattr(
        BatchPlan,
        "positions",
        lambda self, update: ([p + by[-1] for p in several] for several in positions(self, update)),
    )


def _positions_off_by_one(patch: pytest.MonkeyPatch) -> None:
    _shifted(patch, lambda first: int(first > 0))


def _repeats_the_epoch(patch: pytest.MonkeyPatch) -> None:
    """As a loader that begins anew at each resume."""
    _shifted(patch, lambda first: -4 * first)


def _global_noise(patch: pytest.MonkeyPatch) -> None:
    step = AutoencoderTask.micro_step

    def with_noise(self: Any, networks: Any, batch: dict[str, Any], update: int, backward: Any) -> Any:
        return step(self, networks, {**batch, "posterior": torch.randn_like(batch["posterior"])}, update, backward)

    patch.setattr(AutoencoderTask, "micro_step", with_noise)


def _noise_of_the_loader(patch: pytest.MonkeyPatch) -> None:
    read = Stream.read

    def drawn(self: Stream, position: int) -> Any:
        sample, skipped = read(self, position)
        return {**sample, "posterior": torch.randn(4, 8, 8)} if "posterior" in sample else sample, skipped

    patch.setattr(Stream, "read", drawn)


def _rate_begins_anew(patch: pytest.MonkeyPatch) -> None:
    rate, begun = optimizers.learning_rate, loop.Loop.prepare

    def prepared(self: Any, *arguments: Any) -> None:
        begun(self, *arguments)
        first = self.step
        patch.setattr(optimizers, "learning_rate", lambda config, update: rate(config, update - first))

    patch.setattr(loop.Loop, "prepare", prepared)


def _weight_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AutoencoderTask, "load_state", lambda self, kept: None)


def _starts_over(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(loop.resume, "agreed", lambda *arguments: None)


SABOTAGE: dict[str, tuple[Damage, str]] = {
    "moments": (_no_moments, "exp_avg of autoencoder, as restored: "),
    "average": (_no_average, "EMA, as restored: "),
    "position": (
        _positions_off_by_one,
        "positions read: update 3 reads positions 9 to 12 instead of positions 8 to 11",
    ),
    "epoch": (_repeats_the_epoch, "positions read: update 3 reads positions 0 to 3 instead of positions 8 to 11"),
    "noise": (_global_noise, "logged figures: "),
    "loader": (_noise_of_the_loader, "samples, draws included: the sample at position 8 is another"),
    "rate": (_rate_begins_anew, "learning rates: update 3 steps at "),
    "task": (_weight_forgotten, "state of the task, as restored: "),
    "anew": (_starts_over, "update resumed from: it continued from update 0 instead of 2"),
}


OFTEN = ("moments", "average", "position", "noise")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in OFTEN else pytest.mark.slow) for n in SABOTAGE])
def test_what_breaks_a_resume_is_named(
    configs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    damage, wanted = SABOTAGE[name]
    damage(monkeypatch)
    assert main(["verify-resume", str(configs["autoencoder"]), "--updates", "4"]) == 4
    error = capsys.readouterr().err
    assert error.startswith(f"ldm verify-resume: NOT exact: {wanted}") and error.count("\n") == 1


@pytest.mark.slow
def test_an_average_that_is_not_written_is_named(
    configs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the cut and after the resume it is not among what is kept: the end shows it."""
    _half_a_save(monkeypatch)
    assert main(["verify-resume", str(configs["autoencoder"]), "--updates", "4"]) == 4
    assert "NOT exact: logged figures: validation/" in capsys.readouterr().err


# the comparison alone


def test_the_order_of_a_check() -> None:
    for updates in range(4, 40):
        plan = Plan(updates)
        assert 0 < plan.saved < plan.cut < updates and plan.cut < 2 * plan.saved


def row(apart: float, twin: float, restored: float | None = None, exact: bool = False) -> Row:
    return Row(
        "weights",
        None if restored is None else Difference(restored, "r"),
        Difference(apart, "w"),
        Difference(twin, "t"),
        exact,
    )


def test_the_verdict() -> None:
    assert verdict([row(0, 0, 0), row(0, 0)], False) == verdict([row(0, 0, 0), row(0, 0)], True) == (True, "exact")
    assert verdict([row(1e-7, 1e-7)], True) == (True, "as close as two unbroken runs")
    assert verdict([row(1e-7, 1e-7)], False) == (False, "weights: w (two unbroken runs differ too)")
    assert verdict([row(1e-7, 0)], False) == (False, "weights: w")
    assert verdict([row(2e-6, 1e-7)], True) == (False, "weights: w")
    assert verdict([row(1, 1, exact=True)], True) == (False, "weights: w")  # positions are no matter of rounding
    assert verdict([row(1e-7, 1e-7), row(0, 0, 3)], True) == (False, "weights, as restored: r")


def test_deviations_of_tensors() -> None:
    held = {"a": torch.tensor([1.0, -4.0]), "b": torch.tensor(float("nan"))}
    assert between_groups("ema", held, {k: v.clone() for k, v in held.items()}) == {"EMA": Difference(0.0)}
    apart = between_groups("ema", held, {"a": torch.tensor([1.0, -4.5]), "b": held["b"]})["EMA"]
    assert apart == Difference(0.125, "a and 0 more of 2 tensors")
    for other in (
        {"a": held["a"]},
        {**held, "b": torch.tensor(1.0)},
        {**held, "a": torch.zeros(3)},
        {**held, "c": torch.zeros(1)},
    ):
        assert not between_groups("ema", held, other)["EMA"].size < float("inf"), other
    moments = {"w.exp_avg": torch.zeros(2), "w.exp_avg_sq": torch.zeros(2)}
    assert list(between_groups("optimizer_unet", moments, moments)) == ["exp_avg of unet", "exp_avg_sq of unet"]
    assert between_digests({"EMA": {"a": "1", "b": "2"}}, {"EMA": {"a": "1"}})["EMA"].size == 1


def test_positions_are_read_once_by_all_processes_together() -> None:
    straight = [{0: {0: ["x"], 1: ["y"]}, 1: {2: ["z"], 3: ["w"]}}]
    split: list[Any] = [{0: {0: ["x"]}, 1: {2: ["z"]}}, {0: {1: ["y"]}, 1: {3: ["w"]}}]
    assert all(difference.none for difference in between_reads(straight, split, 4))
    twice = [split[0], {**split[1], 1: {2: ["z"]}}]
    assert "update 2 reads positions 2 to 2 instead of" in between_reads(straight, twice, 4)[0].where
    assert between_reads(twice, twice, 4)[0].where == "1 are read more than once, 1 never"
    other = [{**straight[0], 1: {2: ["z"], 3: ["v"]}}]
    positions, samples = between_reads(straight, other, 4)
    assert positions.none and samples == Difference(1.0, "the sample at position 3 is another")
    assert (
        between_rates({0: {"unet": 1e-3}}, {0: {"unet": 2e-3}}).where
        == "update 1 steps at {'unet': 0.002} instead of {'unet': 0.001}"
    )


def test_deviations_of_figures() -> None:
    line = {"step": 1, "loss": 2.0, "by_t": [1.0, None], "updates_per_second": 3.0}
    assert between_figures([line], [{**line, "updates_per_second": 9.0}]).none
    apart = between_figures([line], [{**line, "by_t": [1.0, 5.0]}])
    assert apart == Difference(float("inf"), "by_t[1] of update 1 is 5.0 instead of None")
    assert between_figures([line], [{**line, "loss": 1.0}]).size == 0.5
    assert between_figures([line], [{**line, "loss": 1.0, "more": 1}]).size == float("inf")
    assert between_figures([line], [line, line]).where == "the lines are of updates [1, 1]"


# the command


def test_the_kind_of_a_configuration(
    configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = [type(load_any(file)).__name__ for file in configs.values()]
    assert kinds == [
        "AutoencoderTrainingConfig",
        "ClipTrainingConfig",
        "DiffusionTrainingConfig",
        "ClassifierTrainingConfig",
        *["DiffusionTrainingConfig"] * (len(configs) - 4),
    ]
    shipped = Path(__file__).resolve().parents[2] / "configs"
    names = {
        "autoencoder": "AutoencoderTrainingConfig",
        "clip": "ClipTrainingConfig",
        "ldm": "DiffusionTrainingConfig",
        "classifier": "ClassifierTrainingConfig",
    }
    for file in shipped.glob("*/*.yaml"):
        if file.stem in names:
            assert type(load_any(file)).__name__ == names[file.stem], file
    bare = tmp_path / "bare.yaml"
    bare.write_text(yaml.safe_dump({"run": f"{tmp_path}/run", "data": {"source": "shapes", "image_size": 32}}))
    assert main(["verify-resume", str(bare)]) == 2
    assert "may be for train-autoencoder or for train-clip: say which by --command" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"unknown key train\.stepz"):
        load_any(configs["ldm"], ["train.stepz=3"])
    assert main(["verify-resume", str(configs["ldm"]), "--updates", "3"]) == 2
    assert main(["verify-resume", str(configs["ldm"]), "--keep", str(shipped)]) == 2
    assert "is not empty: name a new folder" in capsys.readouterr().err


def test_a_cache_is_read_where_there_is_one(
    configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify-resume", str(configs["ldm"]), "--updates", "4", "--command", "train-ldm"]
    assert main([*arguments, "--keep", str(tmp_path / "kept")]) == 0
    said = capsys.readouterr().out
    assert "cache_latents" not in said and "train.log_every" not in said  # it is 1 already
    for name in ("straight", "twin", "interrupted"):
        assert (tmp_path / "kept" / name / "latents").resolve() == (configs["ldm"].parent / "ldm/latents").resolve()
    assert main([*arguments[:2], f"run={tmp_path}/none", *arguments[2:]]) == 0
    assert "cache_latents true → false" in capsys.readouterr().out and [f.name for f in tmp_path.iterdir()] == ["kept"]
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "kept/interrupted/metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [1, 2, 3, 4]


def test_a_slow_disk_is_waited_for(
    configs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The updates of a check may all be done before its checkpoint is written."""
    monkeypatch.setattr(writer, "write", lambda *arguments: time.sleep(1.0) or write(*arguments))
    assert main(["verify-resume", str(configs["clip"]), "--updates", "4"]) == 0, capsys.readouterr().err


def test_what_a_killed_check_left_is_removed_and_a_living_one_stays(tmp_path: Path) -> None:
    dead, living, young, other = (tmp_path / f".verify-{name}" for name in ("[r]un-1", "[r]un-2", "[r]un-3", "run-4"))
    for over in (dead, other):
        with RunDirectory(over):
            (over / "straight").mkdir()
    young.mkdir()  # it has not come to its lock yet
    with RunDirectory(living):
        made = _folder(f"{tmp_path}/[r]un", None)
    assert {*tmp_path.iterdir()} == {living, young, other, made} and made.name.startswith(".verify-[r]un-")
