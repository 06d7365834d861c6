"""The run directory: who may write into it, what it was started with, what it measured and where it stands.

`config.yaml`, `metrics.jsonl`, `status.json`, `checkpoints/`, `samples/`, `model/`; only the first process opens it.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ldm import config as configuration
from ldm.data.sources import Skipped
from ldm.evaluation.record import RunError, parse_line, read_skipped, read_status

STATES = ("running", "done", "interrupted", "failed")

# What a resumed run may change: it alters what is written and seen, or how the work is split, never what is learned.
CHANGEABLE = {
    "run",  # the folder may have been moved
    "prompts",
    "data.workers",
    "data.max_skipped",
    "data.accept_changes",
    *(f"train.{name}" for name in ("log_every", "validate_every", "sample_every", "checkpoint_every", "keep_checkpoints")),
    *(f"train.{name}" for name in ("trackers", "micro_batch")),
}

_held: set[int] = set()  # descriptors of locks


def _let_go() -> None:
    """In a forked child (a data worker): close its copy of the lock, or the lock would outlive a killed trainer."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


class RunDirectory:
    """A run's folder, created where needed and locked for as long as this object is open.

    The lock is the kernel's and ends with the process, however it ends. Raises RunError.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = _lock(self.path)
        try:
            self._seconds = float((read_status(self.path) or {}).get("seconds", 0.0))
        except BaseException:
            self.close()
            raise
        self._opened = time.monotonic()

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """Folder of the image grids drawn while training."""
        return self.path / "samples"

    @property
    def model(self) -> Path:
        """Folder of the exported model, EMA weights."""
        return self.path / "model"

    def start(self, config: Any) -> None:
        """Write ``config.yaml``; where there is one already, refuse a config that would train something else.

        Raises RunError listing each key that differs, old → new.
        """
        file = self.path / "config.yaml"
        if file.exists():
            try:
                old = configuration.load(type(config), file)
            except configuration.ConfigError as error:
                raise RunError(f"{file} is no configuration of this command ({error}): use another run: directory") from None
            differing = refused_changes(old, config)
            if differing:
                raise RunError(f"{file}: {'; '.join(differing)}: use another run: directory or restore the setting")
        temporary = file.with_name(".config.yaml.tmp")
        configuration.save(config, temporary)
        _replace(temporary, file)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line of JSON to ``metrics.jsonl``; a number that is not finite becomes null."""
        line = json.dumps({"step": step, **{key: _finite(value) for key, value in values.items()}}, allow_nan=False)
        with (self.path / "metrics.jsonl").open("a") as stream:
            stream.write(line + "\n")

    def skip(self, skipped: Sequence[Skipped]) -> None:
        """Add to ``skipped.jsonl`` those that it does not list yet."""
        file, temporary = self.path / "skipped.jsonl", self.path / ".skipped.jsonl.tmp"
        rows = [*read_skipped(self.path)[0], *((one.file, one.reason) for one in skipped)]
        lines = [json.dumps({"file": name, "reason": reason}, ensure_ascii=False) for name, reason in dict.fromkeys(rows)]
        temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        _replace(temporary, file)

    def cut_back(self, step: int) -> None:
        """Drop the lines of ``metrics.jsonl`` after ``step`` (they will be logged again), and one torn by a kill."""
        file, temporary = self.path / "metrics.jsonl", self.path / ".metrics.jsonl.tmp"
        if file.exists():
            lines = [line for line in file.read_text().splitlines() if (parsed := parse_line(line)) is not None and parsed["step"] <= step]
            temporary.write_text("".join(line + "\n" for line in lines))
            _replace(temporary, file)

    def status(self, state: str, step: int, steps: int) -> None:
        """Write ``status.json``; its seconds are wall time summed over all resumes of the run."""
        if state not in STATES:
            raise ValueError(f"state must be one of {', '.join(STATES)}, got {state!r}")
        seconds = self._seconds + time.monotonic() - self._opened
        temporary = self.path / ".status.json.tmp"
        temporary.write_text(json.dumps({"state": state, "step": step, "steps": steps, "seconds": round(seconds, 3)}) + "\n")
        _replace(temporary, self.path / "status.json")

    def close(self) -> None:
        """Release the lock. A second call does nothing."""
        if self._lock in _held:
            _held.discard(self._lock)
            os.close(self._lock)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _lock(path: Path) -> int:
    try:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunError(f"{path} cannot be a run directory: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise RunError(f"{path} is in use by another process ({holder}): wait for it, or use another run: directory") from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)  # for the message alone
    _held.add(descriptor)
    return descriptor


def _replace(temporary: Path, file: Path) -> None:
    """Flush and rename: readers see the old file or the new one, never half of one."""
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    number = float(value)  # floats, numpy and torch scalars
    return number if math.isfinite(number) else None


def refused_changes(old: Any, new: Any) -> list[str]:
    """The settings, as ``key old → new``, that differ and that a resumed run may not change."""
    before, after = _flat(configuration.to_dict(old)), _flat(configuration.to_dict(new))
    allowed = set(CHANGEABLE)
    if before.get("train.lr_schedule") == after.get("train.lr_schedule") == "constant":
        allowed.add("train.steps")  # any other schedule is stretched by it
    return [
        f"{key} {json.dumps(before.get(key))} → {json.dumps(after.get(key))}"
        for key in sorted(before.keys() | after.keys())
        if key not in allowed and before.get(key) != after.get(key)
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
