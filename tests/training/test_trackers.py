"""Trackers: TensorBoard's files are read back, and a failing tracker is dropped."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest

from ldm import config
from ldm.training import trackers


def test_registry_is_the_configs() -> None:
    assert tuple(trackers.OPENERS) == config.TRACKERS


def test_tensorboard_holds_what_was_logged_and_a_resume_hides_the_rest(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = trackers.open_trackers(("tensorboard",), tmp_path)
    for step in (1, 2, 3):
        first.scalars(step, {"loss": step / 2, "bad": float("nan")})
    first.image(2, "grid", np.full((8, 6, 3), 200, dtype=np.uint8))
    first.image(2, "grey", np.full((8, 6, 1), 100, dtype=np.uint8))
    first.close()
    second = trackers.open_trackers(("tensorboard",), tmp_path, step=2)
    second.scalars(3, {"loss": 9.0})
    second.close()

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    assert sorted(events.Tags()["images"]) == ["grey", "grid"] and "bad" not in events.Tags()["scalars"]
    assert (events.Images("grid")[0].width, events.Images("grid")[0].height) == (6, 8)


class Broken:
    """A tracker that fails."""

    def __init__(self, folder: Path, step: int) -> None:
        if step:
            raise OSError("no space")

    def scalars(self, step: int, values: object) -> None:
        raise ConnectionError("the server is gone")

    def image(self, step: int, name: str, image: object) -> None: ...

    def close(self) -> None: ...


def test_a_failing_tracker_warns_once_and_the_other_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.OPENERS, "wandb", Broken)
    both = trackers.open_trackers(("wandb", "tensorboard"), tmp_path)
    with pytest.warns(
        UserWarning, match="tracker wandb failed and is dropped.*ConnectionError: the server is gone"
    ) as caught:
        both.scalars(1, {"loss": 1.0})
        both.scalars(2, {"loss": 1.0})
    assert len(caught) == 1 and both.names == ("tensorboard",)
    both.close()
    with pytest.warns(UserWarning, match="tracker wandb failed.*no space"):
        assert trackers.open_trackers(("wandb",), tmp_path, step=1).names == ()


def test_absent_and_unknown_trackers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(config.ConfigError, match="wandb is not installed: pip install wandb"):
        trackers.open_trackers(("wandb",), tmp_path)
    with pytest.raises(config.ConfigError, match="'mlflow' is none of tensorboard, wandb"):
        trackers.open_trackers(("mlflow",), tmp_path)


def test_wandb_keeps_its_run_across_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, object]] = []
    run = types.SimpleNamespace(
        define_metric=lambda *a, **k: None,
        log=lambda values: calls.append(("log", values)),
        finish=lambda: calls.append(("finish", None)),
    )
    fake = types.SimpleNamespace(
        Image=lambda array: array.shape, init=lambda **k: calls.append(("init", k["id"])) or run
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (0, 5):
        tracker = trackers.open_trackers(("wandb",), tmp_path, step=step)
        tracker.scalars(step + 1, {"loss": 1.0})
        tracker.image(step + 1, "grid", np.zeros((2, 3, 3), dtype=np.uint8))
        tracker.close()
    assert [kind for kind, _ in calls] == ["init", "log", "log", "finish"] * 2
    assert (
        calls[0] == calls[4]
        and calls[5] == ("log", {"step": 6, "loss": 1.0})
        and calls[6] == ("log", {"step": 6, "grid": (2, 3, 3)})
    )
