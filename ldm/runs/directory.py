"""The run directory: its lock, configuration, metrics, status and image grids.

It holds `config.yaml`, `metrics.jsonl`, `status.json`, `checkpoints/`, `samples/`, `model/` and, with
`train.keep_best`, `best/`; only the main process opens it.
"""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ldm import config as configuration
from ldm.data.sample import Skipped
from ldm.errors import RunError
from ldm.files.disk import OS_FAULT, read_bytes
from ldm.files.text import lines
from ldm.runs.best import forget_best
from ldm.runs.journal import Journal
from ldm.runs.moved import PLACES, moved_problem
from ldm.runs.records import flat, parse_line, read_skipped, read_status

STATES = ("running", "done", "interrupted", "failed")

# Settings that a resumed run may change: they affect what is logged, or how the work is split, never what is learned.
CHANGEABLE = {
    *("run", "prompts"),  # run: the folder may have been moved
    *(f"data.{name}" for name in ("workers", "worker_timeout", "max_skipped", "accept_changes")),
    *(f"train.{name}" for name in ("log_every", "validate_every", "sample_every")),
    *(f"train.{name}" for name in ("checkpoint_every", "keep_checkpoints", "keep_every", "save_errors")),
    *(f"train.{name}" for name in ("trackers", "micro_batch", "rank_timeout")),
    *(f"train.{name}" for name in ("keep_best", "patience")),  # what is kept, and an earlier end
}

_locks: set[int] = set()  # file descriptors


def _close_locks() -> None:
    """Close a forked child's copies of the locks, which would outlive a killed trainer."""
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


os.register_at_fork(after_in_child=_close_locks)


class RunDirectory:
    """A run's folder, created if missing and locked while this object is open.

    The kernel holds the lock and releases it when the process ends, however it ends. Raises
    RunError.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._started = False
        self._lock = _lock(self.path)
        self._journal = Journal(self.path)
        try:
            self._seconds = float((read_status(self.path) or {}).get("seconds", 0.0))
        except BaseException:
            self.close()
            raise
        self._opened = time.monotonic()
        self._skipped: list[Skipped] = []

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """Folder of the image grids drawn during training."""
        return self.path / "samples"

    @property
    def model(self) -> Path:
        """Folder of the exported model, EMA weights."""
        return self.path / "model"

    @property
    def best(self) -> Path:
        """Folder of the model of the best validation."""
        return self.path / "best"

    def start(self, config: Any) -> None:
        """Write ``config.yaml``; an existing one must be of the same training.

        Raises RunError listing each differing key, old → new.
        """
        require_same(self.path, config)
        file = self.path / "config.yaml"
        try:
            configuration.save(config, file)
        except OSError as error:
            raise RunError(f"{file} cannot be written: {error.strerror or error}") from None
        self._started = True

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line of JSON to ``metrics.jsonl``; NaN and infinity become null."""
        line = json.dumps({"step": step, **{key: _finite(value) for key, value in values.items()}}, allow_nan=False)
        self._journal.step = step
        self._journal.append(line)

    def clear_export(self) -> None:
        """Delete temporary files of an interrupted export; a new export uses other names."""
        for file in self.model.rglob(".*.tmp"):
            file.unlink()

    def skip(self, skipped: Sequence[Skipped]) -> None:
        """Add samples to ``skipped.jsonl`` that it does not list yet."""
        self._skipped += skipped  # all since the start: earlier ones may not have been written
        rows = [*read_skipped(self.path)[0], *((one.file, one.reason) for one in self._skipped)]
        unique = [{"file": name, "reason": reason} for name, reason in dict.fromkeys(rows)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in unique)
        self._journal.put("skipped.jsonl", text.encode(errors="replace"))

    def picture(self, name: str, step: int, picture: UInt8[np.ndarray, "h w c"]) -> None:
        """Write ``samples/NAME-STEP.png``."""
        content = io.BytesIO()
        Image.fromarray(picture).save(content, "png")
        self._journal.put(f"samples/{name}-{step:08d}.png", content.getvalue(), newest_of=name)

    def cut_back(self, step: int) -> None:
        """Drop the lines of ``metrics.jsonl`` after ``step``, a truncated one, and a `best/` of a later update."""
        file = self.path / "metrics.jsonl"
        try:
            forget_best(self.best, step)
            if file.exists():
                logged = [(line, parse_line(line)) for line in lines(read_bytes(file).decode(errors="replace"))]
                self._journal.rewrite([line for line, row in logged if row is not None and row["step"] <= step])
        except OSError as error:
            raise RunError(f"{file} cannot be written: {error.strerror or error}") from None

    def status(
        self,
        state: str,
        step: int,
        steps: int,
        error: BaseException | None = None,
        early: Mapping[str, Any] | None = None,
    ) -> None:
        """Write ``status.json``; its seconds are wall time summed over all starts of the run.

        ``error``: the error that ended the run, stored as the exit ``code`` and a one-line
        ``reason``. ``early``: entries of a run that is done before its last update.
        """
        if state not in STATES:
            raise ValueError(f"state must be one of {', '.join(STATES)}, got {state!r}")
        seconds = self._seconds + time.monotonic() - self._opened
        about: dict[str, Any] = {"state": state, "step": step, "steps": steps, "seconds": round(seconds, 3)}
        about |= early or {}
        if error is not None:
            about |= {"code": exit_code(error), "reason": " ".join(str(error).split())[:1000] or type(error).__name__}
        self._journal.step = step
        self._journal.put("status.json", (json.dumps(about) + "\n").encode())

    def fail(self, error: BaseException) -> None:
        """Record that a start failed before its first update, unless ``start`` refused it."""
        if self._started:
            before = read_status(self.path) or {}
            self.status("failed", before.get("step", 0), before.get("steps", 0), error)

    def close(self) -> None:
        """Release the lock. A second call does nothing."""
        if self._lock in _locks:
            self._journal.close()
            _locks.discard(self._lock)
            os.close(self._lock)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def exit_code(error: BaseException) -> int:
    """Exit code of a command that ends with ``error`` (ldm.cli.main)."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return getattr(error, "exit_code", None) or (OS_FAULT if isinstance(error, OSError) else 1)


def _lock(path: Path) -> int:
    try:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunError(f"{path} cannot be a run directory: {error.strerror}") from None
    try:
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _mark(descriptor)
        time.sleep(0.05)  # `ldm status` may hold it at this moment
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        advice = "wait for it, or use another run: directory"
        raise RunError(f"{path} is in use by another process ({holder}): {advice}") from None
    return _mark(descriptor)


def _mark(descriptor: int) -> int:
    with suppress(OSError):  # the number is for messages only: a full disk must not stop the run
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    _locks.add(descriptor)
    return descriptor


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    number = float(value)  # floats, numpy and torch scalars
    return number if math.isfinite(number) else None


def require_same(path: Path, config: Any) -> None:
    """Raise RunError if the run at ``path`` has a configuration of another training.

    Data and models may have moved, as long as they are the same (``ldm.runs.moved``).
    """
    file = path / "config.yaml"
    if not file.exists():
        return
    try:
        old = configuration.load(type(config), file)
    except configuration.ConfigError as error:
        raise RunError(f"{file} is not a configuration of this command ({error}): use another run: directory") from None
    changes = refused_changes(old, config)
    if changes and changes.keys() <= PLACES.keys():
        problems = {key: moved_problem(key, path, old, config) for key in changes}
        changes = {key: f"{text} ({problems[key]})" for key, text in changes.items() if problems[key] is not None}
    if changes:
        raise RunError(f"{file}: {'; '.join(changes.values())}: use another run: directory or restore the setting")


def refused_changes(old: Any, new: Any) -> dict[str, str]:
    """Differing settings that a resumed run may not change, each with ``key old → new``."""
    before, after = flat(configuration.to_dict(old)), flat(configuration.to_dict(new))
    allowed = set(CHANGEABLE)
    if before.get("train.lr_schedule") == after.get("train.lr_schedule") == "constant":
        allowed.add("train.steps")  # other schedules depend on it
    return {
        key: f"{key} {json.dumps(before.get(key))} → {json.dumps(after.get(key))}"
        for key in sorted(before.keys() | after.keys())
        if key not in allowed and before.get(key) != after.get(key)
    }
