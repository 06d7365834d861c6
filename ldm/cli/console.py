"""Output of a running command: a progress bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from ldm.training.start import Lines

SHOWN = ("loss", "l1", "validation/loss", "validation/psnr", "validation/retrieval_top1", "updates_per_second")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def write_anything() -> None:
    """Print what a terminal's encoding lacks (× in ASCII, a lone surrogate) as an escape instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def one_line(text: str) -> str:
    """Escape control characters and line ends, which a file name, an argument or a caption may contain."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def complain(text: str) -> None:
    """Print one line on standard error; a closed stream is ignored, so that the exit code stays as it is."""
    with suppress(OSError, ValueError):
        print(one_line(text), file=sys.stderr, flush=True)


def silence(stream: Any) -> None:
    """Redirect ``stream`` to the null device: Python's last flush of a broken pipe would change the exit code."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def end_output() -> None:
    """Flush both streams, or drop what cannot be written."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            silence(stream)


class Console(Lines):
    """Messages and progress of the main process, as a bar where standard error is a terminal.

    ``lasting``: for work that continues if its output cannot be written, such as a training whose
    terminal was closed or whose log file filled the disk.
    """

    def __init__(self, lasting: bool = False) -> None:
        super().__init__(SHOWN)
        self._lasting = lasting
        self._bar: Any = None

    def say(self, text: str) -> None:
        """Print one line, above the bar if there is one."""
        with self._written_to(sys.stdout):
            if self._bar is not None:
                self._bar.write(text)
            else:
                super().say(text)

    def progress(self, step: int, steps: int, values: Mapping[str, Any]) -> None:
        """Show that ``step`` of ``steps`` is done, with the metrics of ``values`` that are in SHOWN."""
        if self.silent or not sys.stderr.isatty():
            super().progress(step, steps, values)
            return
        with self._written_to(sys.stderr):
            self._move_bar(step, steps, self.chosen(values))

    @contextmanager
    def _written_to(self, stream: Any) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._lasting:
                raise
            if error.errno in (errno.EIO, errno.EPIPE):  # gone for good, whereas a full disk may have room again
                silence(stream)

    def _move_bar(self, step: int, steps: int, metrics: Mapping[str, str]) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=step, dynamic_ncols=True)
        self._bar.set_postfix(metrics)
        self._bar.update(step - self._bar.n)
        if step >= steps:
            self._bar.close()
            self._bar = None
