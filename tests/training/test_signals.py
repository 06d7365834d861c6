"""The worst cells of the table that `make signals` prints.

A launcher that forwards nothing, and one that dies of the signal.
"""

import signal
from pathlib import Path

import pytest
import signals

from ldm.training import stopping


@pytest.mark.parametrize(
    ("launcher", "number", "phase"),
    [
        ("accelerate, 1 process", signal.SIGTERM, "update"),
        pytest.param("torchrun, 2 processes", signal.SIGTERM, "validation", marks=pytest.mark.slow),
        pytest.param("torchrun, 2 processes", signal.SIGUSR1, "saving", marks=pytest.mark.slow),
        pytest.param("torchrun handling SIGUSR1", signal.SIGUSR1, "sampling", marks=pytest.mark.slow),
        pytest.param("accelerate, 2 processes", signal.SIGINT, "update", marks=pytest.mark.slow),
    ],
)
def test_a_trainer_saves_and_never_outlives_its_launcher(
    launcher: str, number: signal.Signals, phase: str, tmp_path: Path
) -> None:
    found = signals.stop(signals.LAUNCHERS[launcher], number, phase, tmp_path)
    assert found.clean, found
    assert "stopped and saved at update" in found.said and "Traceback" not in found.said.split("stopped and saved")[0]


def test_signals_that_come_together_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the terminal and by the launcher, or once for each thread of a launcher that died: they ask once."""
    now, said = [100.0], []
    monkeypatch.setattr("ldm.training.stopping.time.monotonic", lambda: now[0])
    with stopping.Stop(said.append) as stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(number)
            now[0] += 0.9
        assert stop.asked and len(said) == 1 and said[0].startswith("SIGINT: ")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    with stopping.Stop(said.append, main=False) as stop:  # it ends with the main one
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
            now[0] += 10.0
        assert stop.asked and len(said) == 2
