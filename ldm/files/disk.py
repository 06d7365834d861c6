"""Bytes on the disk: their hash, a file replaced whole or not at all, and what the system says against it."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

OS_FAULT = 2  # exit code of an OSError that nothing else explains


def resolved(path: str | Path) -> Path:
    """The absolute path without links; of a link to itself, for which ``Path.resolve`` raises RuntimeError, as it stands."""
    return Path(os.path.realpath(path))


def check_regular(file: Path) -> None:
    """Raise OSError for what would be waited for without an end, a named pipe or a device, and for what is not there.

    A pipe without a name may be read: a shell makes one for `<(...)`, and the other end writes to it.
    """
    mode = file.stat().st_mode
    unnamed = stat.S_ISFIFO(mode) and not resolved(file).exists()
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or unnamed):
        raise OSError(errno.EINVAL, "not a regular file", str(file))


def read_bytes(file: Path) -> bytes:
    """A file's content. Raises OSError, also for what would be waited for."""
    check_regular(file)
    return file.read_bytes()


def file_hash(file: Path) -> str:
    """sha256 of a file's bytes. Raises OSError."""
    check_regular(file)
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Have a file or a folder on the disk before returning. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are missing. Raises OSError; NotADirectoryError where a file stands in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None


def replace(file: Path, content: bytes) -> None:
    """Write, flush and rename: readers see the old file or the new one, never half of one. Raises OSError naming ``file``.

    What is there and is not a regular file, such as /dev/stdout, is written to.
    """
    temporary = file.with_name(f".{file.name[:40]}.tmp")  # the whole name might leave no room for more
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
        error.filename, error.filename2 = (
            str(file),
            None,
        )  # a full disk names none, other faults name the temporary file
        raise


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A place for a new file or folder, which has its name ``target`` once the block has ended without an error.

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
    """Path and reason of a fault of the system, in one line."""
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return reason if error.filename is None else f"{os.fsdecode(error.filename)}: {reason}"
