"""Tables of captions as users write them, JSON lines and CSV: each row as a dict, or as one line that says what is wrong with it."""

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
    """Line numbers, and what stands there: a row, or what is wrong with it. Blank rows are passed over.

    Raises DataError for a file that cannot be read at all, or whose columns are not clear.
    """
    text = _text(path)
    return _json_rows(text) if path.suffix == ".jsonl" else _csv_rows(path, text)


def text_columns(path: Path) -> list[str]:
    """The names of the first row's columns that hold text. Raises DataError as ``table_rows`` does."""
    rows = (row for _, row in table_rows(path) if isinstance(row, dict))
    columns = (([key for key, value in row.items() if isinstance(value, str)], "text" in row) for row in rows)
    return next((["text", *names] if has_text else names for names, has_text in columns if names or has_text), [])


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
    """A text whose lines all end in \\n, so that a caption of several lines is the same wherever it was written."""
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
        return "nested too deep"
    except ValueError as error:  # a key that stands twice; a number of thousands of digits
        return str(error)
    if not isinstance(values, dict):
        return f"must be an object like {EXAMPLE}, got {line[:80]}"
    return "nested too deep" if _deeper(values, DEPTH) else values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, whose keys must differ: of two captions, nothing says which is meant."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key!r} stands twice")
        values[key] = value
    return values


def _deeper(value: Any, levels: int) -> bool:
    """True if values are nested in more than ``levels`` lists and objects: later readers would recurse."""
    held = [value]
    for _ in range(levels):
        held = [
            inner
            for outer in held
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(held)


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a caption may be long
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    begun = 1  # the line on which the row under way began: a quote that is never closed runs on
    try:
        names = _columns(path, next(reader, []))
        begun = reader.line_num + 1
        for fields in reader:
            if any(field.strip() for field in fields):
                said = f"has not the {len(names)} fields of the first line: a caption that holds commas needs quotes"
                yield begun, dict(zip(names, fields, strict=True)) if len(fields) == len(names) else said
            begun = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{begun}: the row that begins here is not CSV: {error}") from None


def _columns(path: Path, fields: list[str]) -> list[str]:
    """The columns' names from the first line of a CSV. Raises DataError where two have one."""
    names = [field.strip() for field in fields]
    if len(names) == 1 and (other := next((c for c in ";\t|" if c in names[0]), None)):
        raise DataError(f"{path}: fields are separated by {other!r}: save it with commas")
    if twice := next((name for name in names if name and names.count(name) > 1), None):
        raise DataError(f"{path}:1: the column {twice!r} stands twice: rename or remove one of them")
    return names if names.count("") <= 1 else [name or f"column {i}" for i, name in enumerate(names, start=1)]
