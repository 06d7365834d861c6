"""Runs that are cut off, and their ends compared."""

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.interrupts import PowerCut
from torch import Tensor

from ldm.data.dataset import Stream
from ldm.runs.records import read_metrics
from ldm.training.loop import Loop


class Silent:
    def say(self, text: str) -> None:
        """Nothing."""

    def progress(self, step: int, steps: int, values: Any) -> None:
        """Nothing."""


@pytest.fixture
def make_loop(tmp_path: Path) -> Iterator[Callable[..., Loop]]:
    """Loops of a task in fresh runs, closed afterwards."""
    count = itertools.count()
    with ExitStack() as stack:

        def make(task: Any, settings: Any, **changes: Any) -> Loop:
            train, run = replace(settings.train, **changes), str(tmp_path / f"run{next(count)}")
            return stack.enter_context(Loop(task, train, settings, run, 0, Silent()))

        yield make


def at_position(
    monkeypatch: pytest.MonkeyPatch, wanted: Callable[[int], bool], act: Callable[[dict[str, Any]], None]
) -> None:
    """Let ``act`` see each training sample whose position is ``wanted``."""
    original = Stream.read

    def item(self: Stream, position: int) -> Any:
        sample, skipped = original(self, position)
        if not self.validation and wanted(position):
            act(sample)
        return sample, skipped

    monkeypatch.setattr(Stream, "read", item)


def power_cut(sample: dict[str, Any]) -> None:
    raise PowerCut


def lines(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "updates_per_second"} for line in read_metrics(run)]


def assert_same_end(run: Path, straight: Path) -> None:
    """The last checkpoints, the metrics and the exported models are equal to the last bit."""
    last = sorted((straight / "checkpoints").iterdir())[-1].name
    files = [
        f"checkpoints/{last}/{f.name}"
        for f in (straight / "checkpoints" / last).iterdir()
        if f.name not in ("manifest.json", "config.yaml")
    ]
    files += [str(f.relative_to(straight)) for f in (straight / "model").rglob("*.safetensors")]
    assert len(files) >= 5
    assert [f for f in files if (run / f).read_bytes() != (straight / f).read_bytes()] == []
    steps = json.loads((straight / "status.json").read_text())["steps"]
    assert lines(run) == lines(straight) and [line["step"] for line in lines(run)] == list(range(1, steps + 1))


def state_of(loop: Loop) -> list[Tensor]:
    moments = [t for o in loop.optimizers.each.values() for s in o.state.values() for t in s.values()]
    weights = [p for network in loop.task.networks.values() for p in network.parameters()]
    return [t.detach().clone() for t in (*weights, *loop.ema.state().values(), *moments)]
