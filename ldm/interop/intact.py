"""Whether weights may be used: numbers all of them, in the files that were written with their folder.

`ldm.json` of a folder of ours holds the sha256 of each file of weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ldm.files.disk import file_hash
from ldm.files.known import known_hash
from ldm.interop.bundle import Bundle, Part
from ldm.interop.files import FolderError, read_json, write_json
from ldm.models.finite import NonFiniteError, counted, nonfinite

EXTRA = "ldm.json"  # what the folder's other files have no place for: null caption, sampling defaults, hashes
HASHES = "sha256"  # its entry


def written_hashes(folder: Path) -> dict[str, str]:
    """The sha256 of the files of weights of a part's folder, by name, as `ldm.json` of the model around it has them.

    Empty where it has none of this folder's. Raises FolderError.
    """
    folder = Path(os.path.abspath(folder))  # a link to another run's is not followed: it is not the part that was written here
    file = folder.parent / EXTRA
    if not file.exists():
        return {}
    hashes = read_json(file).get(HASHES, {})
    if not isinstance(hashes, dict) or not all(isinstance(one, str) for one in hashes.values()):
        raise FolderError(f"{file}: {HASHES} should hold the hash of each file of weights, as text")
    places = {Path(name): digest for name, digest in hashes.items()}
    return {place.name: digest for place, digest in places.items() if str(place.parent) == folder.name}


def write_hashes(folder: Path, files: Iterable[Path], about: Mapping[str, object] | None = None) -> None:
    """Write `ldm.json` with ``about`` and the hashes of these files. Raises OSError."""
    hashes = {file.relative_to(folder).as_posix(): file_hash(file) for file in files}
    write_json(folder / EXTRA, {"format": 1, **(about or {}), HASHES: hashes})


def check_intact(part: Part, name: str = "") -> None:
    """Raise FolderError for the first weight that is not a number, or file that is not the one written with its folder.

    Weights are read once; a large file is hashed once for each change of it. ``name``: of the part, for the message.
    """
    check_finite(part, name)
    check_hashes(part)


def check_finite(part: Part, name: str = "") -> None:
    """Raise FolderError naming the first weight that holds NaN or an infinity."""
    if bad := nonfinite(part.tensors):
        more = f", and {len(bad) - 1} further tensors are not finite either" if len(bad) > 1 else ""
        raise FolderError(f"{part.where}: {name and name + ': '}tensor {bad[0]} holds {counted(part.tensors[bad[0]])}{more}")


def check_hashes(part: Part, anew: bool = False) -> None:
    """Raise FolderError for a file of weights that is not the one written with its folder. ``anew``: trust no hash of before."""
    for file in part.files if part.sha256 else ():
        if (written := part.sha256.get(file.name)) is None:
            raise FolderError(f"{file} was not written with its folder, whose {EXTRA} lists {min(part.sha256)}: {_REMEDY}")
        try:
            found = file_hash(file) if anew else known_hash(file)
        except OSError as error:
            raise FolderError(f"{file}: cannot be read: {error.strerror}") from None
        if found != written:
            raise FolderError(f"{file} has changed: its sha256 is {found[:12]}, and was {written[:12]} when it was written: {_REMEDY}")


_REMEDY = f'bring back the file, or, if it was meant to change, delete "{HASHES}" from the folder\'s {EXTRA}'


def check_writable(bundle: Bundle) -> None:
    """Raise NonFiniteError for a weight that holds NaN or an infinity: such a model is never written."""
    for name, part in bundle.parts.items():
        if bad := nonfinite(part.tensors):
            raise NonFiniteError(f"{name}: {bad[0]} holds {counted(part.tensors[bad[0]])}: such a model is not written")
