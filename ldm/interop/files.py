"""The JSON of a model, and the one error of all its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ldm.files.disk import replace


class FolderError(RuntimeError):
    """A model folder is incomplete or does not fit together; the message names the file or tensor."""

    exit_code = 4


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises FolderError naming the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FolderError(f"{file} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FolderError(f"{file}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise FolderError(f"{file}: should hold a JSON object")
    return value


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write ``value`` as readable JSON, making the folder; an earlier file stays whole until then. Raises OSError."""
    replace(file, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
