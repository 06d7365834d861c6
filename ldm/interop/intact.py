"""Checks of weights before use: all finite, and files unchanged since their folder was written.

`ldm.json` of a folder written here holds the sha256 of each weight file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ldm.config.values import shown
from ldm.errors import FolderError, NonFiniteError
from ldm.files.disk import file_hash
from ldm.files.json import read_json, write_json
from ldm.files.known import known_hash
from ldm.files.tensors.finite import counted, nonfinite
from ldm.interop.bundle import Bundle, Part

EXTRA = "ldm.json"  # settings with no place in diffusers' files: null caption, sampling defaults, hashes
HASHES = "sha256"  # its entry of hashes
FORMAT = 1
LARGEST = 2**14  # side of an image in pixels


def read_extra(folder: Path) -> dict[str, Any]:
    """`ldm.json` of a model folder, types checked; empty if there is none. Raises FolderError."""
    file = folder / EXTRA
    about = read_json(file) if file.exists() else {}
    check_extra(about, str(file))
    return about


def check_extra(about: Mapping[str, Any], where: str) -> None:
    """Raise FolderError for an entry whose type or range is not what is written here."""
    for key, (holds, what) in _ENTRIES.items():
        if key in about and not holds(about[key]):
            raise FolderError(f"{where}: {key} should be {what}, and is {shown(about[key])}")


def _is_share(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= value <= 1)


def _are_conditions(value: Any) -> bool:
    parts = value.get("parts") if isinstance(value, dict) else None
    return isinstance(parts, list) and all(isinstance(p, dict) and isinstance(p.get("name"), str) for p in parts)


_ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "format": (lambda v: type(v) is int and v == FORMAT, f"{FORMAT}, the one that is read here"),
    "null_caption": (lambda v: isinstance(v, str), "text"),
    "caption_dropout": (_is_share, "a number from 0 to 1, or null"),
    "sample_size": (lambda v: type(v) is int and 1 <= v <= LARGEST, f"a whole number from 1 to {LARGEST}"),
    "defaults": (lambda v: isinstance(v, dict), "a mapping of settings"),
    "conditions": (_are_conditions, "a mapping whose parts have a name each"),
    HASHES: (
        lambda v: isinstance(v, dict) and all(isinstance(one, str) for one in v.values()),
        "the hash of each file of weights",
    ),
}


def written_hashes(folder: Path) -> dict[str, str]:
    """The sha256 of a part's weight files, by name, recorded in `ldm.json` of the folder above.

    Empty if nothing is recorded for this part. Raises FolderError.
    """
    # Not resolved: a link to another run's part is not the part that was written here.
    folder = Path(os.path.abspath(folder))
    places = {Path(name): digest for name, digest in read_extra(folder.parent).get(HASHES, {}).items()}
    return {place.name: digest for place, digest in places.items() if str(place.parent) == folder.name}


def write_hashes(folder: Path, files: Iterable[Path], about: Mapping[str, object] | None = None) -> None:
    """Write `ldm.json` with ``about`` and the hashes of ``files``. Raises OSError."""
    hashes = {file.relative_to(folder).as_posix(): file_hash(file) for file in files}
    write_json(folder / EXTRA, {"format": FORMAT, **(about or {}), HASHES: hashes})


def check_intact(part: Part, name: str = "") -> None:
    """Raise FolderError for a weight that is not finite, or a file changed since it was written.

    Weights are read once; the hash of a large file is cached until the file changes. ``name``: of
    the part, for the message.
    """
    check_finite(part, name)
    check_hashes(part)


def check_finite(part: Part, name: str = "") -> None:
    """Raise FolderError naming the first tensor that holds NaN or infinity."""
    if bad := nonfinite(part.tensors):
        more = f", and {len(bad) - 1} further tensors are not finite either" if len(bad) > 1 else ""
        raise FolderError(
            f"{part.where}: {name and name + ': '}tensor {bad[0]} holds {counted(part.tensors[bad[0]])}{more}"
        )


def check_hashes(part: Part, anew: bool = False) -> None:
    """Raise FolderError for a weight file changed since its folder was written.

    ``anew``: ignore cached hashes.
    """
    for file in part.files if part.sha256 else ():
        if (written := part.sha256.get(file.name)) is None:
            raise FolderError(
                f"{file} was not written with its folder, whose {EXTRA} lists {min(part.sha256)}: {_REMEDY}"
            )
        try:
            found = file_hash(file) if anew else known_hash(file)
        except OSError as error:
            raise FolderError(f"{file}: cannot be read: {error.strerror}") from None
        if found != written:
            raise FolderError(
                f"{file} has changed: its sha256 is {found[:12]}, and was {written[:12]} when it was written: {_REMEDY}"
            )


_REMEDY = f'bring back the file, or, if it was meant to change, delete "{HASHES}" from the folder\'s {EXTRA}'


def check_writable(bundle: Bundle) -> None:
    """Raise NonFiniteError for a tensor with NaN or infinity: such a model is never written."""
    for name, part in bundle.parts.items():
        if bad := nonfinite(part.tensors):
            raise NonFiniteError(f"{name}: {bad[0]} holds {counted(part.tensors[bad[0]])}: such a model is not written")
