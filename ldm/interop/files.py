"""The files of a model: JSON, hashes, and the one error of all of them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


class FolderError(RuntimeError):
    """A model folder is incomplete or does not fit together; the message names the file or tensor."""

    exit_code = 4


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises FolderError naming the file."""
    try:
        value = json.loads(file.read_text())
    except FileNotFoundError:
        raise FolderError(f"{file} is missing") from None
    except (OSError, ValueError) as error:
        raise FolderError(f"{file}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise FolderError(f"{file}: should hold a JSON object")
    return value


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write ``value`` as readable JSON, making the folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def file_hash(file: Path) -> str:
    """sha256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Have a file or a folder on the disk before returning."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
