"""Targets of `--out`: a command overwrites only files of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ldm.config import ConfigError
from ldm.files.disk import make_folder


def check_target(
    file: Path,
    written_by_us: Callable[[bytes], bool],
    suffixes: Sequence[str] = (),
    beside: Sequence[str] = (),
    option: str = "--out",
) -> None:
    """Raise ConfigError unless ``file`` can be written without overwriting a user's file; makes its folder.

    Args:
        file: the target.
        written_by_us: true for the content of a file that an earlier call of the command wrote.
        suffixes: those that the name may have; any by default.
        beside: suffixes of files that are written with it; they may exist only if ``file`` does.
        option: the option to name in messages.
    """
    if file.is_dir():
        raise ConfigError(f"{option} {file} is a folder: name a file in it")
    if suffixes and file.suffix.lower() not in suffixes:
        choices = " or ".join(part for part in (", ".join(suffixes[:-1]), suffixes[-1]) if part)
        raise ConfigError(f"{option} {file} must end in {choices}")
    try:
        if file.exists() and not (file.is_file() and written_by_us(file.read_bytes())):
            raise ConfigError(
                f"{option} {file} exists and was not written by this command: name another file, or remove it"
            )
        for other in () if file.exists() else (file.with_suffix(suffix) for suffix in beside):
            if other.exists():
                written = f"{option} {file}: {other}, which is written with it,"
                raise ConfigError(f"{written} exists already: name another file, or remove it")
        make_folder(file.parent)
        probe = file.with_name(f".{file.name[:40]}.tmp")  # as ``ldm.files.disk.replace`` names it
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{option} {file} cannot be written: {error.strerror}") from None
