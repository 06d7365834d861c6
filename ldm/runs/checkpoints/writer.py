"""Writing checkpoints in the background while training continues."""

from __future__ import annotations

import copy
import math
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ldm.runs.checkpoints.files import Tensors, snapshot, tensor_bytes, thin_out, write
from ldm.runs.checkpoints.folder import size_text

GRACE = 30  # seconds that torchrun leaves a process between asking it to end and killing it
SLOW = 20  # seconds of one step from which the whole may not fit into GRACE: other steps precede and follow it
CONTINUE = "continue"  # value of train.save_errors


@dataclass(frozen=True)
class Written:
    """Cost of a checkpoint.

    Attributes:
        step: the update after which it was taken.
        path: its folder.
        bytes: size of its tensors; the copy holds as much host memory from the first save on.
        copied: seconds of the copy, during which training waited.
        written: seconds until it was valid on disk.
        thinned: seconds of verifying and deleting older checkpoints.
    """

    step: int
    path: Path
    bytes: int
    copied: float
    written: float
    thinned: float

    @property
    def seconds(self) -> float:
        """Seconds from the request until all is done."""
        return self.copied + self.written + self.thinned


class BackgroundWriter:
    """Writes checkpoints in the background: copies the state at once, with one write in flight.

    The error of a write is raised by the next call. ``errors``: with "stop" any call raises it
    (CheckpointError); with "continue" ``submit`` and ``poll`` warn instead, and only ``wait``
    raises, so that a failure of the last save is noticed. ``saved``: the update that the run
    continues from. At an interrupt, leaving the context does not wait for the write in flight.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 2,
        keep_every: int | None = None,
        errors: str = "stop",
        saved: int = 0,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self.errors, self.saved, self._say = errors, saved, say
        self._thread: threading.Thread | None = None
        self._outcome: Written | Exception | None = None  # result of the thread, once it has ended
        self._step = saved  # update of the last submission
        self._copy: Tensors | None = None  # its memory is reused by every save
        self._first = True

    def submit(self, step: int, tensors: Tensors, state: Mapping[str, Any], config: Any, thin: bool = True) -> None:
        """Wait for the previous write, copy the state, and write it in the background.

        Arguments as in ``files.save``. ``thin``: then delete older checkpoints that are not to be
        kept.
        """
        self._settle()  # before the copy: never two copies in memory
        start = time.monotonic()
        self._copy = snapshot(tensors, self._copy)
        arguments = (step, self._copy, copy.deepcopy(state), config, time.monotonic() - start, thin)
        self._step = step
        # A daemon: at an interrupt the process ends at once, and a partial checkpoint has a temporary name.
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def poll(self) -> None:
        """Handle the outcome of a finished write, without waiting for an unfinished one."""
        if self._thread is not None and not self._thread.is_alive():
            self._settle()

    def wait(self) -> Written | None:
        """Wait until the last write is on disk. Raises CheckpointError, whatever ``errors`` is."""
        if self._thread is None:
            return None
        self._thread.join()
        outcome, self._thread, self._outcome = self._outcome, None, None
        if isinstance(outcome, Exception):
            raise outcome
        assert outcome is not None
        self._note(outcome)
        return outcome

    def _write(
        self, step: int, tensors: Tensors, state: Mapping[str, Any], config: Any, copied: float, thin: bool
    ) -> None:
        start = time.monotonic()
        try:
            path = write(self.folder, step, tensors, state, config)
            valid = time.monotonic()
            if thin:
                thin_out(path, self.keep, self.keep_every)
            self._outcome = Written(step, path, tensor_bytes(tensors), copied, valid - start, time.monotonic() - valid)
        except Exception as error:  # raised by the next call
            self._outcome = error

    def _settle(self) -> None:
        """``wait``, with a warning for an error if training is to continue."""
        try:
            self.wait()
        except Exception as error:
            if self.errors != CONTINUE:
                raise
            self._warn(error, "training continues and tries again at the next interval (train.save_errors: continue)")

    def _warn(self, error: Exception, then: str) -> None:
        unsaved = f"{self._step - self.saved} updates since {self.saved} are not saved"
        warnings.warn(f"{error}; {unsaved}; {then}", stacklevel=1)

    def _note(self, written: Written) -> None:
        """Record a success; report the cost of the first."""
        self.saved = written.step
        if not self._first:
            return
        self._first = False
        size = size_text(written.bytes)
        self._say(
            f"first checkpoint: {size}, copied in {written.copied:.1f} s, written in {written.written:.1f} s;"
            f" {size} of host memory are held for the copy"
        )
        warn_if_slow("a checkpoint", written.seconds)

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception):
            try:
                self.wait()
            except Exception as second:  # must not hide the first error
                self._warn(second, "this comes in addition to the error that ended the training")


def warn_if_slow(what: str, seconds: float) -> bool:
    """Warn, and return True, if ``what`` is so slow that a launcher may kill the last save."""
    if seconds <= SLOW:
        return False
    enough = 30 * math.ceil(seconds * 2 / 30)  # a save in flight precedes the last one
    warnings.warn(
        f"{what} took {seconds:.0f} s, and launchers kill a process {GRACE} s after asking it to end: give it longer by"
        f" torchrun --shutdown-timeout={enough}, or TORCH_ELASTIC_SHUTDOWN_TIMEOUT={enough} for accelerate launch",
        stacklevel=1,
    )
    return True
