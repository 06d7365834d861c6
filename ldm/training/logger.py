"""Logs metrics, sample grids and status of a running training."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ldm.errors import NonFiniteError
from ldm.runs.checkpoints.writer import warn_if_slow
from ldm.runs.directory import RunDirectory
from ldm.training.skipped import SkipLog
from ldm.training.task import Reporter
from ldm.training.trackers import Trackers, open_trackers


class Logger:
    """Logs to the run directory, the trackers and the terminal.

    Args:
        run: None on a process that writes nothing.
        steps: number of the last update.
        skipped: unreadable samples, gathered over the processes: every process calls ``metrics``.
    """

    def __init__(self, run: RunDirectory | None, steps: int, skipped: SkipLog, reporter: Reporter) -> None:
        self.run, self.steps, self.skipped, self.reporter = run, steps, skipped, reporter
        self._trackers = Trackers({})
        self._undrawn = False  # the warning that pictures fail was given
        self._slow: set[str] = set()  # names that were reported as slow

    @contextmanager
    def tracking(self, trackers: Sequence[str], step: int) -> Iterator[None]:
        """Context in which the trackers of these names log as well, from update ``step`` on."""
        self.skipped.update()  # samples left out before training
        if self.run:
            self._trackers = open_trackers(trackers, self.run.path, step)
        try:
            yield
        finally:
            self._trackers.close()

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """One line of metrics after update ``step``."""
        self.skipped.update()
        if self.run:
            self.run.log(step, values)
            self._trackers.scalars(step, {k: v for k, v in values.items() if isinstance(v, (int, float))})
            self.reporter.progress(step, self.steps, values)
            self.run.status("running", step, self.steps)

    def pictures(self, step: int, draw: Callable[[], Mapping[str, UInt8[np.ndarray, "h w c"]]]) -> None:
        """Log the grids of ``draw``, by name.

        Its failure is a warning, except for errors that the user can fix (``exit_code``).
        """
        if self.run is None:
            return
        try:
            pictures = draw()
        except Exception as error:
            if hasattr(error, "exit_code") and not isinstance(error, NonFiniteError):
                raise
            if not self._undrawn:
                warnings.warn(
                    f"no pictures from update {step} on, training continues: {type(error).__name__}: {error}",
                    stacklevel=1,
                )
            self._undrawn = True
            return
        self._undrawn = False
        for name, picture in pictures.items():
            self.run.picture(name, step, picture)
            self._trackers.image(step, name, picture)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Warn once if ``what``, for which a request to stop waits, is slow."""
        started = time.monotonic()
        yield
        if self.run and what not in self._slow and warn_if_slow(what, time.monotonic() - started):
            self._slow.add(what)
