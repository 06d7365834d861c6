"""Images of a folder and their captions: one function for each layout of the captions.

A layout yields a Row, or a Skipped for a row or image that cannot be used. Nothing is written.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ldm.config import DataConfig
from ldm.data.decode import SUFFIXES
from ldm.data.names import Listing, image_files
from ldm.data.sample import Skipped
from ldm.data.tables import EXAMPLE, METADATA, ended, table_rows
from ldm.errors import DataError
from ldm.files.text import read_text

# What other data sets call the columns `file_name` and `text`.
FILE_NAMES = ("filename", "file name", "file", "image", "image_path", "img", "path", "name")
CAPTION_NAMES = ("caption", "captions", "prompt", "description", "label", "title", "alt", "sentence")


@dataclass(frozen=True)
class Row:
    """An image with its caption, the other columns of its row, and its file size in bytes."""

    file_name: str  # relative to the folder, with / between its parts
    text: str
    columns: dict[str, Any]
    file_size: int


def read_rows(data: DataConfig) -> tuple[list[Row], list[Skipped]]:
    """The usable images of ``data.folder`` in a fixed order, and those left out.

    Raises DataError.
    """
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
    """True if free of lone surrogates, which JSON can spell and undecodable file names contain."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


# --- metadata.jsonl, metadata.csv


def _metadata(folder: Path, data: DataConfig) -> Iterator[Row | Skipped]:
    present = [folder / name for name in METADATA if (folder / name).is_file()]
    if not present:
        raise DataError(missing_metadata(folder))
    if len(present) > 1:
        raise DataError(f"{folder} has both {' and '.join(METADATA)}: keep one of them")
    (path,), listing = present, Listing(folder)
    first_line: dict[str, int] = {}
    empty = True
    for number, values in table_rows(path):
        empty = False
        found = values if isinstance(values, str) else _row(listing, values, data.text_column)
        if isinstance(found, Row) and found.file_name in first_line:
            found = f"file_name {found.file_name!r} is already on line {first_line[found.file_name]}"
        if isinstance(found, str):
            yield Skipped(f"{path}:{number}", found)
            continue
        first_line[found.file_name] = number
        yield found
    if empty:
        raise DataError(f"{path} has no rows" + (f": write one {EXAMPLE} per line" if path.suffix == ".jsonl" else ""))


def _row(listing: Listing, values: dict[str, Any], text_column: str) -> Row | str:
    """The row, or an error message."""
    for key in ("file_name", text_column):
        if key not in values:
            return _no_column(key, list(values), text_column)
        if not isinstance(values[key], str):
            return f"{key} must be text, got {repr(values[key])[:80]}"
        if not _is_text(values[key]):
            return f"{key} holds half of a surrogate pair, which is not text"
    if "\0" in values[text_column]:
        return f"{text_column} holds a NUL character, which is not text"
    found = _find(listing, values["file_name"])
    if isinstance(found, str):
        return found
    columns = {key: value for key, value in values.items() if key not in ("file_name", text_column)}
    return Row(found[0], values[text_column], columns, found[1])


ABSENT = "is not a file"


def _find(listing: Listing, file_name: str) -> tuple[str, int] | str:
    """Name and size of the file that a row names, or an error message.

    A file whose name differs only in its Unicode form is taken if there is no exact match.
    """
    name = PurePosixPath(file_name)  # "./a.png" is "a.png"
    if name.is_absolute() or ".." in name.parts:
        return f"file_name {file_name!r} leaves the folder: give a path relative to it, without '..'"
    size = _size(listing.folder / name)
    if not isinstance(size, str):
        return str(name), size
    if size != ABSENT:
        return f"file_name {file_name!r} {size}"
    same = listing.same(str(name))
    if len(same) == 1 and isinstance(size := _size(listing.folder / same[0]), int):
        return same[0], size
    hint = ": write / for \\" if "\\" in file_name else ""
    if len(same) > 1:
        hint = f", but {len(same)} whose names differ in their Unicode form alone: write one of them exactly"
    elif not hint and (alike := listing.alike(str(name))):
        hint = f": did you mean {alike[0]!r}?"
    return f"no file {file_name!r} in {listing.folder}{hint}"


def _size(path: Path) -> int | str:
    """Size of a regular file in bytes, or an error message (for pipes, broken links …)."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL byte in the name
        return ABSENT
    return status.st_size if stat.S_ISREG(status.st_mode) else "is not a regular file"


def _image(folder: Path, name: str, text: str, columns: dict[str, Any]) -> Row | Skipped:
    """Row of an image that the listing has; Skipped if it is not a regular file."""
    size = _size(folder / name)
    return Skipped(str(folder / name), size) if isinstance(size, str) else Row(name, text, columns, size)


def _no_column(key: str, columns: list[str], text_column: str) -> str:
    others = CAPTION_NAMES if key == text_column else FILE_NAMES
    near = [c for c in columns if c.lower() in (key, *others)] or difflib.get_close_matches(key, columns, n=1)
    problem = f"no {key}, only {', '.join(columns) or 'an empty object'}"
    if not near:
        return problem
    advice = f", or set data.text_column={near[0]}" if key == text_column else ""
    return f"{problem}: rename {near[0]} to {key}{advice}"


def missing_metadata(folder: Path) -> str:
    """Error message for a folder without metadata, naming files that may be meant as it."""
    near = near_misses(folder)
    hint = f" (found {', '.join(near[:5])}: rename it)" if near else ""
    return (
        f"{folder} has no {METADATA[0]} and no {METADATA[1]}{hint}: it needs one, with a row {EXAMPLE} for each image"
    )


def near_misses(folder: Path) -> list[str]:
    """Files of the folder whose names resemble those of METADATA."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file() and entry.name not in METADATA)
    near = {name for meant in METADATA for name in difflib.get_close_matches(meant, names, n=3, cutoff=0.7)}
    endings = (".jsonl", ".json1", ".ndjson", ".csv", ".tsv", "captions.txt")
    beginnings = ("metadata.", "captions.", "labels.")
    near |= {name for name in names if name.lower().endswith(endings) or name.lower().startswith(beginnings)}
    return sorted(name for name in near if not name.lower().endswith(SUFFIXES))


# --- captions without a metadata file


def _sidecar(folder: Path, data: DataConfig) -> Iterator[Row | Skipped]:
    """``a.txt`` beside ``a.png``; also ``A.TXT`` beside ``A.PNG``."""
    listing = Listing(folder)
    for name in listing.images:
        yield _beside(listing, name)


def _beside(listing: Listing, name: str) -> Row | Skipped:
    """An image with the caption in the text file beside it."""
    wanted, found = PurePosixPath(name).with_suffix(".txt"), listing.captions(name)
    if len(found) != 1:
        near = [other for other in listing.alike(str(wanted)) if other not in found]
        several = f"{' and '.join(PurePosixPath(one).name for one in found)} are beside it: keep one of them"
        hint = f" ({PurePosixPath(near[0]).name} is another name: rename it)" if near else ""
        return Skipped(str(listing.folder / name), several if found else f"no {wanted.name} beside it{hint}")
    beside = listing.folder / found[0]
    if isinstance(size := _size(beside), str):
        return Skipped(str(beside), size)
    try:
        text = ended(read_text(beside)).strip()
    except ValueError as error:
        return Skipped(str(beside), str(error).removeprefix(str(beside)).lstrip(": "))
    except OSError as error:
        return Skipped(str(beside), f"cannot be read: {error.strerror}")
    if "\0" in text:
        return Skipped(str(beside), "holds a NUL character, as UTF-16 does: save it as UTF-8")
    return _image(listing.folder, name, text, {})


def _classes(folder: Path, data: DataConfig) -> Iterator[Row | Skipped]:
    """``class_name/…/a.png``. An image's caption template depends on its file name alone."""
    templates = data.caption_templates
    for name in image_files(folder):
        if "/" not in name:
            yield Skipped(str(folder / name), "in no class folder")
            continue
        kind = class_words(name.split("/")[0])
        if not kind:
            yield Skipped(str(folder / name), "its folder's name holds no word")
            continue
        if not _is_text(kind):
            yield Skipped(str(folder / name), "its folder's name is not UTF-8: rename it")
            continue
        digest = hashlib.sha256(f"template {name}".encode(errors="surrogateescape")).digest()
        template = templates[int.from_bytes(digest[:4], "big") % len(templates)]
        yield _image(folder, name, template.replace("{}", kind), {"class": kind})


def class_words(folder_name: str) -> str:
    """A folder's name as words for a caption."""
    return " ".join(folder_name.replace("_", " ").replace("-", " ").split())


def _plain(folder: Path, data: DataConfig) -> Iterator[Row | Skipped]:
    """Images without captions: for an unconditional model, or an autoencoder."""
    for name in image_files(folder):
        yield _image(folder, name, "", {})


LAYOUTS: dict[str, Callable[[Path, DataConfig], Iterator[Row | Skipped]]] = {
    "metadata": _metadata,
    "sidecar": _sidecar,
    "class": _classes,
    "none": _plain,
}
