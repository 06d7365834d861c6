"""Output of a running command: a progress bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from ldm.distributed.processes import own_rank as rank

SHOWN = ("loss", "l1", "validation/loss", "validation/psnr", "validation/retrieval_top1", "updates_per_second")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def write_anything() -> None:
    """Let what a terminal's encoding lacks, such as × in ASCII or half of a surrogate, appear as an escape instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def one_line(text: str) -> str:
    """A text with its control characters and ends of lines as escapes: a file's name, an argument or a caption may hold any."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def complain(text: str) -> None:
    """One line on standard error; nothing where that cannot be written to, so that the exit code stays what it is."""
    with suppress(OSError, ValueError):
        print(one_line(text), file=sys.stderr, flush=True)


def silence(stream: Any) -> None:
    """Send all that is still to be written to ``stream`` nowhere: Python's last flush would fail, and change the exit code."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def end_output() -> None:
    """Write what is left in the streams' buffers, or drop it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            silence(stream)


class Console:
    """Messages and progress of the main process; other processes are silent.

    ``lasting``: work that continues where its lines cannot be written, such as a training whose terminal was closed or whose log
    fills its disk.
    """

    def __init__(self, lasting: bool = False) -> None:
        self.silent, self._lasting = rank() != 0, lasting
        self._bar: Any = None
        self._begun: tuple[float, int] | None = None

    def say(self, text: str) -> None:
        """One line."""
        if self.silent:
            return
        with self._spoken(sys.stdout):
            if self._bar is not None:
                self._bar.write(text)
            else:
                print(text, flush=True)

    def progress(self, step: int, steps: int, values: Mapping[str, Any]) -> None:
        """Step ``step`` of ``steps`` is done; ``values`` are figures to show beside it."""
        if self.silent:
            return
        shown = {k.replace("/", " "): f"{values[k]:.3g}" for k in SHOWN if isinstance(values.get(k), (int, float))}
        if sys.stderr.isatty():
            with self._spoken(sys.stderr):
                self._on_bar(step, steps, shown)
            return
        if self._begun is None:
            self._begun = time.monotonic(), step
        passed, done = time.monotonic() - self._begun[0], step - self._begun[1]
        figures = "  ".join(f"{k} {v}" for k, v in shown.items())
        left = f"{passed / done * (steps - step):.0f} s left" if done and step < steps else ""
        with self._spoken(sys.stdout):
            print(f"{step}/{steps}  {', '.join(part for part in (figures, left) if part)}".rstrip(), flush=True)
        if step >= steps:
            self._begun = None

    @contextmanager
    def _spoken(self, stream: Any) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._lasting:
                raise
            if error.errno in (errno.EIO, errno.EPIPE):  # a full disk may have room again
                silence(stream)

    def _on_bar(self, step: int, steps: int, shown: Mapping[str, str]) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=step, dynamic_ncols=True)
        self._bar.set_postfix(shown)
        self._bar.update(step - self._bar.n)
        if step >= steps:
            self._bar.close()
            self._bar = None
