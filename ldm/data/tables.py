"""Tables of captions in JSON lines and CSV: each row as a dict, or as a one-line error message."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldm.errors import DataError
from ldm.files.text import lines, read_text

METADATA = ("metadata.jsonl", "metadata.csv")
EXAMPLE = '{"file_name": "a.png", "text": "a caption"}'
DEPTH = 100  # levels of nesting in a row


def table_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield line numbers with a row or an error message each; blank rows are skipped.

    Raises DataError for a file that cannot be read at all, or whose columns are ambiguous.
    """
    text = _text(path)
    return _json_rows(text) if path.suffix == ".jsonl" else _csv_rows(path, text)


def text_columns(path: Path) -> list[str]:
    """Columns of the first row that has any with text; `text` comes first. Raises DataError."""
    for _, row in table_rows(path):
        if isinstance(row, dict):
            names = [key for key, value in row.items() if isinstance(value, str)]
            if "text" in row:
                return ["text", *names]
            if names:
                return names
    return []


def _text(path: Path) -> str:
    try:
        text = read_text(path)
    except ValueError as error:
        raise DataError(str(error)) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if "\0" in text[:100]:
        raise DataError(f"{path} holds NUL bytes, as UTF-16 does: save it as UTF-8")
    return ended(text)


def ended(text: str) -> str:
    """A text with \\n for every line end, so that captions are the same on all systems."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _json_rows(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for number, line in enumerate(lines(text), start=1):
        if line.strip():
            yield number, _json_row(line.strip())


def _json_row(line: str) -> dict[str, Any] | str:
    try:
        values = json.loads(line, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        hint = ": remove the comma at its end" if line.endswith("},") else ""
        return f"not JSON: {error.msg} (character {error.pos + 1}){hint}"
    except RecursionError:
        return "nested too deeply"
    except ValueError as error:  # a duplicate key; a number of thousands of digits
        return str(error)
    if not isinstance(values, dict):
        return f"must be an object like {EXAMPLE}, got {line[:80]}"
    return "nested too deeply" if _deeper(values, DEPTH) else values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object without duplicate keys: which of two captions is meant would be unclear."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key!r} appears twice")
        values[key] = value
    return values


def _deeper(value: Any, levels: int) -> bool:
    """True if a value is nested more than ``levels`` deep: later readers recurse."""
    level = [value]
    for _ in range(levels):
        contents = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list))]
        level = [inner for several in contents for inner in several]
    return bool(level)


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a caption may be long
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    begun = 1  # first line of the current row: an unclosed quote runs to the end of the file
    try:
        names = _columns(path, next(reader, []))
        begun = reader.line_num + 1
        for fields in reader:
            if any(field.strip() for field in fields):
                problem = f"does not have the {len(names)} fields of the first line: quote a caption that holds commas"
                yield begun, dict(zip(names, fields, strict=True)) if len(fields) == len(names) else problem
            begun = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{begun}: the row that begins here is not CSV: {error}") from None


def _columns(path: Path, fields: list[str]) -> list[str]:
    """Column names from the first line of a CSV. Raises DataError for duplicates."""
    names = [field.strip() for field in fields]
    if len(names) == 1 and (other := next((c for c in ";\t|" if c in names[0]), None)):
        raise DataError(f"{path}: fields are separated by {other!r}: save it with commas")
    if twice := next((name for name in names if name and names.count(name) > 1), None):
        raise DataError(f"{path}:1: the column {twice!r} appears twice: rename or remove one of them")
    return names if names.count("") <= 1 else [name or f"column {i}" for i, name in enumerate(names, start=1)]
