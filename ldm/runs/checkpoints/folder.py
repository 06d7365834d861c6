"""The folder of a run's checkpoints: listing, verification and retention.

A checkpoint is a folder `step-XXXXXXXX` whose `manifest.json` holds size and sha256 of every other
file. Folders with other names are ignored; "newest" means the highest number, never a date. Imports
no torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from ldm.errors import CheckpointError
from ldm.files.disk import file_hash, read_bytes

MANIFEST, STATE, CONFIG = "manifest.json", "state.json", "config.yaml"
FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")


def steps(folder: Path) -> list[Path]:
    """Checkpoint folders in ``folder``, intact or not, oldest first."""
    return sorted((p for p in folder.glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir()), key=step_of)


def step_of(path: Path) -> int:
    """Update after which the checkpoint ``path`` was taken."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not a checkpoint: the folder should be named step-XXXXXXXX")
    return int(match[1])


# verification


def check(path: Path, only: Iterable[str] | None = None, fast: bool = False) -> list[str]:
    """Faults of a checkpoint (empty: intact), by the sizes and hashes in its manifest.

    ``only``: check these files alone. ``fast``: check the sizes alone.
    """
    try:
        manifest = json.loads(read_bytes(path / MANIFEST).decode())
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        return [f"{path / MANIFEST}: cannot be read ({type(error).__name__})"]
    if manifest.get("format") != FORMAT or manifest.get("step") != step_of(path):
        return [f"{path / MANIFEST}: is not the manifest of this checkpoint"]
    problems = [] if only is None else [f"{path / name}: is missing" for name in only if name not in files]
    for name, (size, digest) in files.items():
        if only is None or name in only:
            problems += _check_file(path / name, size, None if fast else digest)
    return problems


def _check_file(file: Path, size: int, digest: str | None) -> list[str]:
    try:
        if (found := file.stat().st_size) != size:
            return [f"{file}: has {found} bytes, should have {size}"]
        if digest is not None and file_hash(file) != digest:
            return [f"{file}: its content does not match its sha256"]
    except FileNotFoundError:
        return [f"{file}: is missing"]
    except OSError as error:
        return [f"{file}: cannot be read ({error.strerror or error})"]
    except ValueError as error:  # an impossible file name
        return [f"{str(file)!r}: {error}"]
    return []


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint, or None, and the faults of newer ones.

    Changes nothing on disk.
    """
    problems: list[str] = []
    for path in reversed(steps(folder)):
        found = check(path)
        if not found:
            return path, problems
        problems += found
    return None, problems


# retention


def retained(folder: Path, keep: int, keep_every: int | None, intact: Callable[[Path], bool]) -> dict[Path, str]:
    """Checkpoints to keep, newest first, and the reason for each.

    Those are the ``keep`` newest intact ones, and multiples of ``keep_every``, which are not
    counted; damaged ones are not counted either. Raises CheckpointError for ``keep`` < 2.
    """
    if keep < 2:
        raise CheckpointError(f"keep must be at least 2, got {keep}")
    stay: dict[Path, str] = {}
    counted = 0
    for path in reversed(steps(folder)):
        if keep_every is not None and step_of(path) % keep_every == 0:
            stay[path] = f"multiple of {keep_every}"
        elif counted < keep:
            whole = intact(path)
            counted += whole
            stay[path] = f"newest {keep}" if whole else "not counted"
    return stay


def prune(folder: Path, keep: int, keep_every: int | None, fresh: Path) -> None:
    """Delete what ``retained`` does not name; ``fresh`` was just written.

    Raises CheckpointError, OSError.
    """
    stay = retained(folder, keep, keep_every, lambda path: path == fresh or not check(path))
    for path in steps(folder):
        if path not in stay:
            remove(path)


def remove(path: Path) -> None:
    """Delete a checkpoint, renaming it first, so that a kill leaves no partial one."""
    doomed = path.with_name(f".tmp-old-{path.name}-{os.getpid()}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


# left by killed writers


def unfinished(folder: Path) -> list[tuple[Path, bool]]:
    """Temporary folders, each with true if another, living process is writing it."""
    found = []
    for path in sorted(folder.glob(".tmp-*")):
        pid = path.name.rpartition("-")[2]  # our own id was reused, as in a restarted container
        found.append((path, pid.isdecimal() and int(pid) != os.getpid() and _alive(int(pid))))
    return found


def remove_stale(folder: Path) -> list[str]:
    """Delete folders of killed writers; returns messages. Only for the owner of the run's lock."""
    messages = []
    for path, alive in unfinished(folder):
        if not alive:
            shutil.rmtree(path)
            messages.append(f"{path}: removed, left half-written by a process that is gone")
    return messages


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


# sizes


def size_of(path: Path) -> int:
    """Size of the files in a folder, in bytes."""
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())


def size_text(count: int) -> str:
    """A number of bytes as text, in powers of 1000."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.{1 if count < 100 * size else 0}f} {unit}"
    return f"{count} bytes"
