"""JSON objects, read strictly and written atomically."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ldm.errors import FolderError
from ldm.files.disk import replace
from ldm.files.text import read_text

DIGITS = 100  # most digits of an integer: no setting needs more


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object without duplicate keys. Raises FolderError naming the file."""
    try:
        text = read_text(file)
    except FileNotFoundError:
        raise FolderError(f"{file} is missing") from None
    except OSError as error:
        raise FolderError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise FolderError(str(error)) from None
    return parse_json(text, f"{file}: cannot be read: it")


def parse_json(text: str, what: str) -> dict[str, Any]:
    """Parse a JSON object without duplicate keys. Raises FolderError beginning with ``what``."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            raise FolderError(f"{what} names {next(name for name in found if names.count(name) > 1)[:200]!r} twice")
        return found

    def whole(digits: str) -> int:
        if len(digits) > DIGITS:
            raise FolderError(f"{what} holds a number of {len(digits):,} digits")
        return int(digits)

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_int=whole)
    except RecursionError:
        raise FolderError(f"{what} is not JSON in UTF-8: nested too deeply") from None
    except ValueError as error:
        raise FolderError(f"{what} is not JSON in UTF-8: {error}") from None
    if not isinstance(value, dict):
        raise FolderError(f"{what} should hold a JSON object")
    return value


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write ``value`` as indented JSON, atomically, making the folder. Raises OSError."""
    replace(file, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
