"""Data worker processes: their positions, and a one-line error when one dies or hangs."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawArray
from typing import Any

from torch.utils.data import get_worker_info

from ldm.errors import DataError

GRACE = 30  # seconds that a data worker continues after a SIGTERM, to finish the current update
# torch's message; an error raised inside a worker reads "Caught … in DataLoader worker process" instead
_DEAD = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([^.]+)|exited unexpectedly)"
)
_HUNG = "the time is up"
_ADVICE = {
    "Killed": "most likely out of memory: lower data.workers, or free some memory",
    "Bus error": "most likely out of shared memory (/dev/shm): enlarge it, or lower data.workers",
}


class Workers:
    """``count`` data workers, whose process ids and positions stand in shared memory.

    ``limit``: timeout in seconds for a batch. torch raises the death of a worker asynchronously,
    even in the middle of an update; here it is held back until the trainer next asks for data.
    torch's own timeout does not cover a worker that freezes while it hands over a batch.
    """

    def __init__(self, count: int, limit: int) -> None:
        self.count, self.limit = count, limit
        self._posts = RawArray("q", [-1, -1] * count)  # process id and position of each worker
        self._processes: list[BaseProcess] = []
        self._listening = False
        self._fault: RuntimeError | None = None
        self._before: dict[int, Any] = {}  # previous signal handlers; that of SIGCHLD is torch's

    def enter(self, worker: int) -> None:
        """Ignore signals, in a worker: the trainer alone decides when to stop."""
        self._posts[2 * worker] = os.getpid()
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))

    def at(self, position: int) -> None:
        """Record, in a worker, that it now reads ``position``."""
        if (worker := get_worker_info()) is not None:
            self._posts[2 * worker.id + 1] = position

    @contextmanager
    def watched(self, loader: Iterable[Any]) -> Iterator[Iterator[Any]]:
        """Iterate over ``loader``, whose workers these are, in the trainer.

        The death of a worker is noticed, and no worker outlives the block.
        """
        others = multiprocessing.active_children()
        feed: Iterator[Any] | None = iter(())
        try:
            try:
                # May set torch's handler of SIGCHLD, which raises here until ours replaces it.
                feed = iter(loader)
                # Like torch, watch them in the main thread only: Python handles signals nowhere else.
                if self.count and threading.current_thread() is threading.main_thread():
                    handlers = {signal.SIGCHLD: self._child_ended, signal.SIGALRM: self._time_is_up}
                    for number, handler in handlers.items():
                        self._before[number] = signal.getsignal(number)
                        signal.signal(number, handler)
            except RuntimeError as error:
                self._fault = error
            self._processes = [child for child in multiprocessing.active_children() if child not in others]
            yield feed
        finally:
            feed = None  # the caller has dropped its own: without a fault, the workers end cleanly
            self._end()
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _child_ended(self, number: int, frame: Any) -> None:
        try:
            self._before[number](number, frame)
        except RuntimeError as error:
            self._fault = error
            if self._listening:  # else the trainer would wait for a batch that never comes
                self._end()  # now: a worker that is handing something over would print a traceback
                raise

    def _time_is_up(self, number: int, frame: Any) -> None:
        if self._listening:
            raise RuntimeError(_HUNG)

    def _end(self) -> None:
        """Kill the remaining workers, by SIGKILL because they delay SIGTERM (``enter``)."""
        for child in self._processes:
            child.kill()
            child.join()

    def take(self, feed: Iterator[Any], awaited: list[int], named: Callable[[int], str]) -> Any:
        """The next batch of ``feed``, of the positions ``awaited``; ``named`` describes one.

        Raises DataError.
        """
        error: Exception | None = self._fault
        if error is None:
            try:
                self._listen(self.limit if self._before else 0)
                return next(feed)
            except (RuntimeError, OSError, EOFError) as caught:
                error = caught
            finally:
                self._listen(0)
        if self._before and self._fault is None and isinstance(error, (OSError, EOFError)):
            time.sleep(1)  # the connection to a worker ends a moment before its death is reported
        if (message := self._message(str(self._fault or error), awaited, named)) is None:
            raise error
        self._end()  # before torch waits for a hung one
        self._fault = error.__traceback__ = None  # frees torch's references to them
        raise DataError(message) from None

    def _listen(self, seconds: int) -> None:
        self._listening = seconds > 0
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, seconds)

    def _message(self, text: str, awaited: list[int], named: Callable[[int], str]) -> str | None:
        """One-line error for torch's ``text``; None unless it reports the end of a worker."""
        posts = list(zip(self._posts[::2], self._posts[1::2], strict=True))
        if dead := _DEAD.search(text):
            gone = [(pid, at) for pid, at in posts if str(pid) in dead[1].split(", ")]
            how = f"was killed (signal {dead[2]})" if dead[2] else "ended"
            advice = _ADVICE.get(dead[2] or "", "data.workers=0 shows why")
        elif text == _HUNG:
            gone = [(pid, at) for pid, at in posts if at in awaited]
            how = f"has given nothing for {self.limit} s (data.worker_timeout)"
            advice = (
                "a file system that hangs, or no shared memory left (/dev/shm)? Lower data.workers, or raise the limit"
            )
        else:
            return None
        pid, at = gone[0] if gone else (None, -1)
        who = "a data worker" if pid is None else f"data worker {pid}"
        where = f" at {named(at)}" if at >= 0 else ""
        return (
            f"{who} {how}{where}: {advice} (data.workers is {self.count})."
            " The same command continues from the last checkpoint"
        )
