"""Files on disk: hashes, flushing, atomic replacement, and one-line descriptions of OSError."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

OS_FAULT = 2  # exit code for an OSError that no other error wraps


def resolved(path: str | Path) -> Path:
    """The absolute path without links; unlike ``Path.resolve``, also of a link to itself."""
    return Path(os.path.realpath(path))


def check_regular(file: Path) -> None:
    """Raise OSError for a missing file, a named pipe or a device: reading might block.

    An anonymous pipe is allowed: a shell makes one for `<(...)`, and its other end is written to.
    """
    mode = file.stat().st_mode
    unnamed = stat.S_ISFIFO(mode) and not resolved(file).exists()
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or unnamed):
        raise OSError(errno.EINVAL, "not a regular file", str(file))


def read_bytes(file: Path) -> bytes:
    """The content of a file. Raises OSError, also for named pipes and devices."""
    check_regular(file)
    return file.read_bytes()


def file_hash(file: Path) -> str:
    """sha256 of a file's bytes. Raises OSError."""
    check_regular(file)
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Flush a file or folder to disk (fsync). Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents. Raises OSError; NotADirectoryError if a file is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None


def replace(file: Path, content: bytes) -> None:
    """Replace a file atomically: readers see the old content or the new, never a part.

    Something other than a regular file, such as /dev/stdout, is written to directly.
    Raises OSError naming ``file``.
    """
    temporary = file.with_name(f".{file.name[:40]}.tmp")  # shortened: file names have a maximum length
    try:
        if file.exists() and not file.is_file():
            file.write_bytes(content)
            return
        make_folder(file.parent)
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        # A full disk names no file, other errors name the temporary one.
        error.filename, error.filename2 = str(file), None
        raise


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """Temporary path of a file or folder, renamed to ``target`` after the block.

    ``target`` may be an empty folder. Raises OSError naming it.
    """
    place = target.with_name(f".{target.name[:40]}.tmp{target.suffix}")
    try:
        if place.is_dir():  # left by a kill
            shutil.rmtree(place)
        yield place
        os.rename(place, target)
    except BaseException as error:
        with suppress(OSError):
            shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(target), None
        raise


def described(error: OSError) -> str:
    """Path and reason of an OSError, in one line."""
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return reason if error.filename is None else f"{os.fsdecode(error.filename)}: {reason}"
