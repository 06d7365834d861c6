"""Records that a run writes while it trains. A full disk delays them and never stops a training."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from ldm.files.disk import replace
from ldm.runs.records import METRICS


class Journal:
    """Lines of ``metrics.jsonl`` and small whole files of the run directory ``path``.

    What cannot be written (disk full, read-only, over quota) is kept in memory and written, in order and once, when the
    disk is back: lines all of them, files in their newest version. One warning says so, and one that all is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step = 0  # the last update that was spoken of
        self._lines: list[bytes] = []
        self._files: dict[str, tuple[str, bytes]] = {}  # by what they are the newest of
        self._whole = _size(path / METRICS)  # bytes of whole lines: a full disk may take a part of one
        self._failing = False

    def append(self, line: str) -> None:
        """Add a line to ``metrics.jsonl``."""
        self._lines.append(line.encode() + b"\n")
        self._write()

    def put(self, file: str, content: bytes, newest_of: str = "") -> None:
        """Write ``file`` anew. One that waits is forgotten where a newer of the same ``newest_of`` (left out: file) follows."""
        self._files[newest_of or file] = (file, content)
        self._write()

    def rewrite(self, lines: list[str]) -> None:
        """Make ``metrics.jsonl`` these lines, now. Raises OSError."""
        replace(self.path / METRICS, "".join(line + "\n" for line in lines).encode())
        self._whole = _size(self.path / METRICS)

    def close(self) -> None:
        """Try for the last time, and say what is lost."""
        if self._lines or self._files:
            self._write()
        if lost := [METRICS] * bool(self._lines) + [file for file, _ in self._files.values()]:
            warnings.warn(f"{self.path}: what was last to be written is lost: {', '.join(lost)}", stacklevel=1)

    def _write(self) -> None:
        """Write everything pending; report the first fault."""
        fault = None
        try:
            self._append()
        except OSError as error:
            fault = error
        for key, (file, content) in list(self._files.items()):
            try:
                replace(self.path / file, content)
                del self._files[key]
            except OSError as error:
                fault = fault or error
        if fault is not None and not self._failing:
            reason = f"cannot be written to ({fault.strerror or fault})"
            warnings.warn(
                f"{self.path} {reason} at update {self.step}: training continues, and its records are kept until it can",
                stacklevel=1,
            )
        elif fault is None and self._failing:
            warnings.warn(
                f"{self.path} can be written to again at update {self.step}: the records are complete", stacklevel=1
            )
        self._failing = fault is not None

    def _append(self) -> None:
        if not self._lines:
            return
        file, content = self.path / METRICS, b"".join(self._lines)
        if _size(file) > self._whole:
            os.truncate(file, self._whole)
        with file.open("ab") as stream:
            stream.write(content)
        self._whole = _size(file)
        self._lines.clear()


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
