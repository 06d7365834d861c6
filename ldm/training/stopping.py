"""Requests to stop: signals, and the end of the launcher that started this process."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGHUP,
)  # what schedulers send ahead of their limit; a closed terminal
LAUNCHERS = ("accelerate", "torchrun", "torch.distributed", "elastic_launch")  # words of their command lines
# Seconds within which several signals are one: Ctrl-C reaches a trainer by its terminal and by its launcher, a
# scheduler's likewise,
# and the kernel tells of a launcher's end once for each of its threads.
TOGETHER = 2.0
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class Stop:
    """A request to stop. While it is entered, the first signal requests it; one after ``TOGETHER`` stops at once.

    Only the ``main`` process obeys that one, and the others end with it: waiting for an exchange, they may see a
    second signal late.
    """

    def __init__(self, say: Callable[[str], None], main: bool = True) -> None:
        self.asked, self._main = False, main
        self._since = 0.0  # when it was first asked
        self._say = say
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        for number in SIGNALS:
            if (
                number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
            ):  # nohup: the run outlives its terminal
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked:
            if self._main and now - self._since >= TOGETHER:
                raise KeyboardInterrupt
            return
        self.asked, self._since = True, now
        self._say(f"{signal.Signals(number).name}: stopping after this update (once more: at once)")


def end_with_launcher() -> None:
    """Let the kernel send SIGTERM when the launcher ends, so that no training outlives it.

    Without a launcher nothing is done: a training may outlive its shell. Linux only; elsewhere it does nothing.
    """
    parent = os.getppid()
    if not _is_launcher(parent):
        return
    library = ctypes.CDLL(None, use_errno=True)
    if hasattr(library, "prctl"):
        library.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before the request
            os.kill(os.getpid(), signal.SIGTERM)


def _is_launcher(pid: int) -> bool:
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return False
    return any(word in line for word in LAUNCHERS)
