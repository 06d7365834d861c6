"""Splitting work over processes. Code below `training` gets the process group as an argument."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ldm.errors import UserError
from ldm.files.disk import OS_FAULT, described

T = TypeVar("T")


def own_rank() -> int:
    """Rank of this process within the launch; the main process has rank 0."""
    return int(os.environ.get("RANK", "0"))


class ElsewhereError(UserError):
    """Another process failed; message and ``exit_code`` are those of its error."""

    everywhere = True

    def __init__(self, message: str, exit_code: int | None) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Processes:
    """Rank of this process, number of processes, and the exchange of results between them.

    ``gather``: all-gather of one value per process, ordered by rank; every process must call it.
    """

    rank: int
    count: int
    gather: Callable[[Any], list[Any]]

    @property
    def main(self) -> bool:
        """True on the process that writes shared files."""
        return self.rank == 0

    def each(self, work: Callable[[], T]) -> list[T]:
        """Run ``work`` on every process; returns all results, by rank.

        A failure is exchanged like a result and raised on every process, marked ``everywhere``, so
        that no process waits for one that has failed. ``work`` itself must not exchange anything.
        """
        if self.count == 1:
            return [work()]
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        outcomes = self.gather((result, None if error is None else _described(self.rank, error)))
        if error is not None:
            error.everywhere = True  # type: ignore[attr-defined]
            raise error
        for _, failure in outcomes:
            if failure is not None:
                raise ElsewhereError(*failure)
        return [result for result, _ in outcomes]

    def over(self, n: int, work: Callable[[range], list[T]]) -> list[T]:
        """Compute items 0 … n − 1, every ``count``-th on each process; returns all, in order."""
        indices = range(self.rank, n, self.count)
        shares = self.each(lambda: work(indices) if indices else [])
        return [shares[i % self.count][i // self.count] for i in range(n)]


ALONE = Processes(0, 1, lambda value: [value])


def _described(rank: int, error: Exception) -> tuple[str, int | None]:
    """Message and exit code: one line for a user's error, else the whole traceback."""
    code = getattr(error, "exit_code", None)
    if code is None and isinstance(error, OSError):
        return f"process {rank}: {described(error)}", OS_FAULT
    text = str(error) if code is not None else "".join(traceback.format_exception(error))
    return f"process {rank}: {text}", code
