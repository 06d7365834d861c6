"""Unusable images and rows: gathered from all processes, listed in the run directory, and limited in number."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ldm.data.dataset import Stream
from ldm.data.sample import Skipped, check_share
from ldm.distributed.processes import Processes
from ldm.errors import DataError
from ldm.runs.directory import RunDirectory

NAMED = 3  # files named on the terminal at a time; the list has all


class SkipLog:
    """Counts distinct images and rows that were skipped since this start, on every process alike.

    ``run`` is None on all but the main process, which writes ``skipped.jsonl``.
    """

    def __init__(
        self, streams: Sequence[Stream], run: RunDirectory | None, say: Callable[[str], None], processes: Processes
    ) -> None:
        self.streams, self.run, self.say, self.processes = streams, run, say, processes
        self._told: set[Skipped] = set()  # by this process
        self._all: dict[Skipped, None] = {}  # by any

    @property
    def total(self) -> int | None:
        """Images and rows in the folder, skipped ones included; None for an endless source, which skips nothing."""
        lengths = [stream.source.length for stream in self.streams]
        return None if None in lengths else sum(n or 0 for n in lengths) + len(self.streams[0].source.skipped)

    def update(self) -> None:
        """Count new ones. Raises DataError, on every process, beyond ``data.max_skipped``."""
        if self.total is None:
            return
        mine = [s for stream in self.streams for s in (*stream.source.skipped, *stream.skipped) if s not in self._told]
        self._told.update(mine)
        new = [
            s for s in dict.fromkeys(s for share in self.processes.gather(mine) for s in share) if s not in self._all
        ]
        self._all |= dict.fromkeys(new)
        if not new:
            return
        place = ""
        if self.run:
            self.run.skip(new)
            place = f" (all in {self.run.path / 'skipped.jsonl'})"
        for skipped in new[:NAMED]:
            self.say(f"left out {skipped.file}: {skipped.reason}")
        more = f"and {len(new) - NAMED} more, " if len(new) > NAMED else ""
        self.say(f"{more}{len(self._all)} of {self.total} left out so far{place}")
        try:
            check_share(len(self._all), self.total, self.streams[0].data, new[0], place)
        except DataError as error:
            error.everywhere = True  # type: ignore[attr-defined]  # all processes count alike
            raise
