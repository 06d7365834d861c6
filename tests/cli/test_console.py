"""Messages and progress outside a terminal: `Lines` for the library, and `Console`, which is built on it."""

from __future__ import annotations

import time

import pytest

from ldm.cli.console import Console
from ldm.training.start import Lines

VALUES = {"loss": 0.12345, "validation/loss": 2, "kl": 3.0, "by_t": [1.0], "note": None}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is 3 s later at every look."""
    ticks = iter(range(0, 1000, 3))
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))


@pytest.mark.parametrize(
    ("kind", "metrics"), [(Lines, "loss 0.123  validation loss 2  kl 3"), (Console, "loss 0.123  validation loss 2")]
)
@pytest.mark.usefixtures("clock")
def test_progress_is_lines_with_metrics_and_the_seconds_left(
    kind: type[Lines], metrics: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reporter = kind()
    reporter.progress(10, 40, VALUES)  # nothing to extrapolate from yet
    reporter.progress(20, 40, {})  # 6 s for 10 steps
    reporter.say("a message")
    reporter.progress(40, 40, VALUES)
    reporter.progress(1, 2, {})  # other work, timed anew
    assert capsys.readouterr().out.splitlines() == [
        f"10/40  {metrics}",
        "20/40  12 s left",
        "a message",
        f"40/40  {metrics}",
        "1/2",
    ]


@pytest.mark.parametrize("kind", [Lines, Console])
def test_other_processes_are_silent(
    kind: type[Lines], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    reporter = kind()
    reporter.say("a message")
    reporter.progress(1, 2, VALUES)
    assert capsys.readouterr() == ("", "")
