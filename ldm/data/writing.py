"""A new folder of captioned images, in the layout that ``data.captions: metadata`` reads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.data.tables import METADATA
from ldm.errors import DataError
from ldm.files.disk import make_folder, whole

if TYPE_CHECKING:
    from PIL.Image import Image


def check_new(folder: Path) -> None:
    """Raise DataError if ``folder`` is a file or holds anything."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DataError(f"{folder} exists: name a new folder, or delete it")


def write_folder(folder: Path, rows: Iterable[tuple[Image, dict[str, Any]]]) -> int:
    """Write images and their rows in metadata.jsonl; returns their number.

    A row needs ``file_name`` and ``text``; other columns are kept with the sample. The folder
    appears once it is complete. Raises DataError if it exists or there is no row, and OSError.
    """
    check_new(folder)
    make_folder(folder.parent)
    with whole(folder) as place:
        place.mkdir()
        lines = []
        for image, row in rows:
            image.save(place / row["file_name"])
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        if not lines:
            raise DataError(f"{folder}: there is no image to write")
        (place / METADATA[0]).write_text("".join(lines), encoding="utf-8")
    return len(lines)
