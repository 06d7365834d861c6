"""Which images of a folder belong to a data set, and what their captions are: one function for each layout.

A layout yields a Row, or a Skipped where a row or image cannot be used. The folder is only ever read.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ldm.config import DataConfig
from ldm.data.decode import SUFFIXES
from ldm.data.sources import DataError, Skipped

METADATA = ("metadata.jsonl", "metadata.csv")
EXAMPLE = '{"file_name": "a.png", "text": "a caption"}'
FILE_NAMES = ("filename", "file name", "file", "image", "image_path", "img", "path", "name")  # what others call `file_name`
CAPTION_NAMES = ("caption", "captions", "prompt", "description", "label", "title", "alt", "sentence")  # what others call `text`


@dataclass(frozen=True)
class Row:
    """One image with its caption, the other columns of its row, and the size of its file in bytes."""

    file_name: str  # relative to the folder, with /
    text: str
    columns: dict[str, Any]
    file_size: int


def read_rows(data: DataConfig) -> tuple[list[Row], list[Skipped]]:
    """Every usable image of ``data.folder`` in a fixed order, and what is left out. Raises DataError."""
    folder = Path(data.folder or "")
    if not folder.is_dir():
        raise DataError(f"no folder {folder}" if not folder.exists() else f"{folder} is a file, no folder of images")
    rows: list[Row] = []
    skipped: list[Skipped] = []
    for found in LAYOUTS[data.captions](folder, data):
        if isinstance(found, Row) and not _is_text(found.file_name):
            found = Skipped(repr(found.file_name), "the file's name is not UTF-8")
        if isinstance(found, Row):
            rows.append(found)
        else:
            skipped.append(found)
    if not rows and not skipped:
        raise DataError(f"{folder} holds no image ({', '.join(SUFFIXES)})")
    return rows, skipped


def _is_text(text: str) -> bool:
    """Whether it is free of half surrogate pairs, which JSON can spell and undecodable file names hold."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def image_files(folder: Path) -> Iterator[str]:
    """Names of all image files below ``folder``, relative to it, sorted; hidden files and folders are passed over."""
    for name in all_files(folder):
        if name.lower().endswith(SUFFIXES):
            yield name


def all_files(folder: Path) -> Iterator[str]:
    """Names of all files below ``folder``, as ``image_files`` gives them; linked folders are followed, each once.

    Raises DataError where it cannot be listed.
    """
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed: {error.strerror}")

    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link to a folder above, or to one that was listed
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
        below = Path(place).relative_to(folder)
        yield from ((below / name).as_posix() for name in sorted(names) if not name.startswith("."))


# --- metadata.jsonl, metadata.csv


def _metadata(folder: Path, data: DataConfig) -> Iterator[Row | Skipped]:
    present = [folder / name for name in METADATA if (folder / name).is_file()]
    if not present:
        raise DataError(missing_metadata(folder))
    if len(present) > 1:
        raise DataError(f"{folder} has both {' and '.join(METADATA)}: keep one of them")
    (path,) = present
    first_line: dict[str, int] = {}
    empty = True
    for number, values in (_json_lines if path.suffix == ".jsonl" else _csv_lines)(path):
        empty = False
        found = _row(folder, values, data.text_column)
        if isinstance(found, Row) and found.file_name in first_line:
            found = f"file_name {found.file_name!r} stands on line {first_line[found.file_name]} already"
        if isinstance(found, str):
            yield Skipped(f"{path}:{number}", found)
            continue
        first_line[found.file_name] = number
        yield found
    if empty:
        raise DataError(f"{path} has no rows: write one {EXAMPLE} a line" if path.suffix == ".jsonl" else f"{path} has no rows")


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and what stands there: an object, or text that says what is wrong."""
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            yield number, f"not JSON: {error}"
            continue
        yield number, values if isinstance(values, dict) else f"must be an object like {EXAMPLE}, got {line.strip()[:80]}"


def _csv_lines(path: Path) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    begun = 1  # the line on which the row under way began: a quote that is never closed runs on
    try:
        reader.fieldnames = names = [name.strip() for name in reader.fieldnames or []]
        if len(names) == 1 and (other := next((c for c in ";\t|" if c in names[0]), None)):
            raise DataError(f"{path}: fields are separated by {other!r}: save it with commas")
        begun = reader.line_num + 1
        for values in reader:
            faulty = None in values or None in values.values()  # csv gives None as the name of what is too much, or as what is missing
            said = f"has not the {len(names)} fields of the first line: a caption that holds commas needs quotes"
            yield begun, said if faulty else values
            begun = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{begun}: the row that begins here is no CSV: {error}") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}: save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _row(folder: Path, values: Any, text_column: str) -> Row | str:
    """The row, or what is wrong with it."""
    if isinstance(values, str):
        return values
    for key in ("file_name", text_column):
        if key not in values:
            return _no_column(key, list(values), text_column)
        if not isinstance(values[key], str):
            return f"{key} must be text, got {values[key]!r}"
        if not _is_text(values[key]):
            return f"{key} holds half of a surrogate pair, which is no text"
    name = PurePosixPath(values["file_name"])  # "./a.png" is "a.png"
    if name.is_absolute() or ".." in name.parts:
        return f"file_name {values['file_name']!r} leaves the folder: give a path relative to it, without '..'"
    size = _size(folder / name)
    if isinstance(size, str):
        hint = ": write / for \\" if "\\" in str(name) else ""
        return f"no file {values['file_name']!r} in {folder}{hint}" if size == ABSENT else f"file_name {values['file_name']!r} {size}"
    columns = {key: value for key, value in values.items() if key not in ("file_name", text_column)}
    return Row(str(name), values[text_column], columns, size)


ABSENT = "is no file"


def _size(path: Path) -> int | str:
    """Bytes of a regular file, or what is wrong with it: a pipe would be waited for, a link may lead nowhere."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL byte in the name
        return ABSENT
    return status.st_size if stat.S_ISREG(status.st_mode) else "is no regular file"


def _image(folder: Path, name: str, text: str, columns: dict[str, Any]) -> Row | Skipped:
    """A listed image with its caption."""
    size = _size(folder / name)
    return Skipped(str(folder / name), size) if isinstance(size, str) else Row(name, text, columns, size)


def _no_column(key: str, columns: list[str], text_column: str) -> str:
    others = CAPTION_NAMES if key == text_column else FILE_NAMES
    near = [c for c in columns if c.lower() in (key, *others)] or difflib.get_close_matches(key, columns, n=1)
    said = f"no {key}, only {', '.join(columns) or 'an empty object'}"
    if not near:
        return said
    return f"{said}: rename {near[0]} to {key}" + (f", or set data.text_column={near[0]}" if key == text_column else "")


def missing_metadata(folder: Path) -> str:
    """That there is no metadata, and which files look as if they were meant to be it."""
    near = near_misses(folder)
    hint = f" (found {', '.join(near[:5])}: rename it)" if near else ""
    return f"{folder} has no {METADATA[0]} and no {METADATA[1]}{hint}: it needs one, with a row {EXAMPLE} for each image"


def near_misses(folder: Path) -> list[str]:
    """Files of the folder whose names are almost those of METADATA."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file() and entry.name not in METADATA)
    near = {name for meant in METADATA for name in difflib.get_close_matches(meant, names, n=3, cutoff=0.7)}
    near |= {name for name in names if name.lower().endswith((".jsonl", ".json1", ".ndjson", ".csv", ".tsv", "captions.txt"))}
    near |= {name for name in names if name.lower().startswith(("metadata.", "captions.", "labels."))}
    return sorted(name for name in near if not name.lower().endswith(SUFFIXES))


# --- captions elsewhere than in metadata


def _sidecar(folder: Path, data: DataConfig) -> Iterator[Row | Skipped]:
    """``a.txt`` beside ``a.png``."""
    for name in image_files(folder):
        beside = (folder / name).with_suffix(".txt")
        if _size(beside) == "is no regular file":
            yield Skipped(str(beside), "is no regular file")
            continue
        try:
            text = beside.read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            yield Skipped(str(folder / name), f"no {beside.name} beside it")
        except (OSError, UnicodeDecodeError) as error:
            yield Skipped(str(beside), "not UTF-8: save it as UTF-8" if isinstance(error, UnicodeDecodeError) else str(error.strerror))
        else:
            yield _image(folder, name, text, {})


def _classes(folder: Path, data: DataConfig) -> Iterator[Row | Skipped]:
    """``class_name/…/a.png``. Which template an image gets depends on its name alone."""
    templates = data.caption_templates
    for name in image_files(folder):
        if "/" not in name:
            yield Skipped(str(folder / name), "in no class folder")
            continue
        kind = class_words(name.split("/")[0])
        if not kind:
            yield Skipped(str(folder / name), "its folder's name holds no word")
            continue
        template = templates[int.from_bytes(hashlib.sha256(f"template {name}".encode()).digest()[:4], "big") % len(templates)]
        yield _image(folder, name, template.replace("{}", kind), {"class": kind})


def class_words(folder_name: str) -> str:
    """A folder's name as it is said in a caption."""
    return " ".join(folder_name.replace("_", " ").replace("-", " ").split())


def _plain(folder: Path, data: DataConfig) -> Iterator[Row | Skipped]:
    """Images alone: for an unconditional model, or an autoencoder."""
    for name in image_files(folder):
        yield _image(folder, name, "", {})


LAYOUTS: dict[str, Callable[[Path, DataConfig], Iterator[Row | Skipped]]] = {
    "metadata": _metadata,
    "sidecar": _sidecar,
    "class": _classes,
    "none": _plain,
}
