"""Records that a run writes during training; a full disk delays them and does not stop training."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from ldm.files.disk import replace
from ldm.runs.records import METRICS


class Journal:
    """Writes lines of ``metrics.jsonl`` and small whole files of the run directory ``path``.

    Records that cannot be written (disk full, read-only, over quota) are kept in memory and
    written, once and in order, when the disk is available again: all lines, and the newest version
    of each file. There is one warning when writing fails, and one when it works again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step = 0  # the last update reported
        self._lines: list[bytes] = []
        self._files: dict[str, tuple[str, bytes]] = {}  # waiting files, by key
        self._whole = _size(path / METRICS)  # bytes of complete lines: a full disk may cut one off
        self._failing = False

    def append(self, line: str) -> None:
        """Add a line to ``metrics.jsonl``."""
        self._lines.append(line.encode() + b"\n")
        self._write()

    def put(self, file: str, content: bytes, newest_of: str = "") -> None:
        """Write ``file``.

        A waiting file of the same ``newest_of`` (default: the same file) is dropped.
        """
        self._files[newest_of or file] = (file, content)
        self._write()

    def rewrite(self, lines: list[str]) -> None:
        """Replace the lines of ``metrics.jsonl``, at once. Raises OSError."""
        replace(self.path / METRICS, "".join(line + "\n" for line in lines).encode())
        self._whole = _size(self.path / METRICS)

    def close(self) -> None:
        """Write what is waiting, and warn of what is lost."""
        if self._lines or self._files:
            self._write()
        if lost := [METRICS] * bool(self._lines) + [file for file, _ in self._files.values()]:
            warnings.warn(f"{self.path}: lost, because they could not be written: {', '.join(lost)}", stacklevel=1)

    def _write(self) -> None:
        """Write all waiting records; warn if that begins or ceases to fail."""
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
            reason = f"cannot be written to ({fault.strerror or fault}) at update {self.step}"
            outlook = "training continues, and its records are kept until it can"
            warnings.warn(f"{self.path} {reason}: {outlook}", stacklevel=1)
        elif fault is None and self._failing:
            text = f"{self.path} can be written to again at update {self.step}: the records are complete"
            warnings.warn(text, stacklevel=1)
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
