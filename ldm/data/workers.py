"""The processes that read ahead of a training: where each is, and one clear line when one dies or hangs."""

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

GRACE = 30  # seconds that a data worker continues after a SIGTERM, for the update that is under way
# how torch says it; a fault in what a worker runs reads "Caught … in DataLoader worker process" instead
_DEAD = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([^.]+)|exited unexpectedly)"
)
_HUNG = "the time is up"
_ADVICE = {
    "Killed": "most likely for want of memory: lower data.workers, or free some",
    "Bus error": "most likely for want of shared memory (/dev/shm): enlarge it, or lower data.workers",
}


class Workers:
    """``count`` data workers and the posts at which they say who and where they are; ``limit``: seconds they may give nothing.

    torch raises the death of a worker wherever the trainer happens to be, in the middle of an update too; here it is
    kept until the trainer next asks for data. torch's own limit does not cover a worker that freezes while it hands over.
    """

    def __init__(self, count: int, limit: int) -> None:
        self.count, self.limit = count, limit
        self._posts = RawArray("q", [-1, -1] * count)  # process id and position, by worker: shared with them
        self._processes: list[BaseProcess] = []
        self._listening = False
        self._fault: RuntimeError | None = None
        self._before: dict[int, Any] = {}  # handlers of signals; of SIGCHLD it is torch's

    def enter(self, worker: int) -> None:
        """In a worker, first of all: the trainer decides when to stop, even where a signal went to the whole process group."""
        self._posts[2 * worker] = os.getpid()
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))

    def at(self, position: int) -> None:
        """In a worker: it reads ``position`` now."""
        if (worker := get_worker_info()) is not None:
            self._posts[2 * worker.id + 1] = position

    @contextmanager
    def watched(self, loader: Iterable[Any]) -> Iterator[Iterator[Any]]:
        """In the trainer: what ``loader``, whose workers these are, gives. What befalls them is noticed, and none of them
        outlives this.
        """
        others = multiprocessing.active_children()
        feed: Iterator[Any] | None = iter(())
        try:
            try:
                feed = iter(
                    loader
                )  # torch's own handler of SIGCHLD, which it may just have set, speaks here and until ours is
                if (
                    self.count and threading.current_thread() is threading.main_thread()
                ):  # torch watches them there alone, too
                    for number, handler in {
                        signal.SIGCHLD: self._child_ended,
                        signal.SIGALRM: self._time_is_up,
                    }.items():
                        self._before[number] = signal.getsignal(number)
                        signal.signal(number, handler)
            except RuntimeError as error:
                self._fault = error
            self._processes = [child for child in multiprocessing.active_children() if child not in others]
            yield feed
        finally:
            feed = None  # with the caller's own ended: in peace, where nothing is wrong
            self._end()
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _child_ended(self, number: int, frame: Any) -> None:
        try:
            self._before[number](number, frame)
        except RuntimeError as error:
            self._fault = error
            if self._listening:  # else the trainer would wait for what never comes
                self._end()  # now, or those in the middle of handing something over print a traceback
                raise

    def _time_is_up(self, number: int, frame: Any) -> None:
        if self._listening:
            raise RuntimeError(_HUNG)

    def _end(self) -> None:
        """Kill those that are still there, hung or not: SIGTERM they leave to the trainer."""
        for child in self._processes:
            child.kill()
            child.join()

    def take(self, feed: Iterator[Any], awaited: list[int], named: Callable[[int], str]) -> Any:
        """The next of ``feed``, made of the positions ``awaited``; ``named`` describes one. Raises DataError."""
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
        if (said := self._said(str(self._fault or error), awaited, named)) is None:
            raise error
        self._end()  # before torch waits for a hung one
        self._fault = error.__traceback__ = None  # lets go of torch's side of them
        raise DataError(said) from None

    def _listen(self, seconds: int) -> None:
        self._listening = seconds > 0
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, seconds)

    def _said(self, text: str, awaited: list[int], named: Callable[[int], str]) -> str | None:
        """Our line for torch's ``text``; None unless it reports the end of a worker."""
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
        return f"{who} {how}{where}: {advice} (data.workers is {self.count}). The same command continues from the last checkpoint"
