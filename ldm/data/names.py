"""The files of a folder by name, and names that differ in capitals or Unicode form alone."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath

from ldm.data.decode import SUFFIXES
from ldm.errors import DataError


def image_files(folder: Path) -> Iterator[str]:
    """Names of the image files below ``folder``, relative to it, sorted, without hidden ones."""
    return Listing(folder).images


def all_files(folder: Path) -> Iterator[str]:
    """Names of all files below ``folder``, relative to it, sorted; hidden ones are skipped.

    Linked folders are followed, each once. Raises DataError for a folder that cannot be listed.
    """
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed: {error.strerror}")

    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link to a folder above, or to one already listed
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
        below = Path(place).relative_to(folder)
        yield from ((below / name).as_posix() for name in sorted(names) if not name.startswith("."))


def composed(name: str) -> str:
    """A name in Unicode form NFC: in names from a Mac, é may be two characters."""
    return unicodedata.normalize("NFC", name)


def folded(name: str) -> str:
    """A name in form NFC and without case."""
    return composed(name).casefold()


def caption_file(name: str) -> str:
    """Key that is equal for `a.txt`, `a.TXT` and their other Unicode forms."""
    path = PurePosixPath(composed(name))
    return str(path.with_suffix(".txt")) if path.suffix else str(path)


class Listing:
    """The files of a folder, listed on first use and cached."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of all files."""
        return tuple(all_files(self.folder))

    @property
    def images(self) -> Iterator[str]:
        """Names of the files with an image suffix."""
        return (name for name in self.names if name.lower().endswith(SUFFIXES))

    @cached_property
    def _forms(self) -> dict[str, list[str]]:
        return _grouped(self.names, composed)

    @cached_property
    def _folded(self) -> dict[str, list[str]]:
        return _grouped(self.names, folded)

    @cached_property
    def _captions(self) -> dict[str, list[str]]:
        return _grouped((name for name in self.names if name.lower().endswith(".txt")), caption_file)

    def same(self, name: str) -> list[str]:
        """Files of this name in any Unicode form."""
        return self._forms.get(composed(name), [])

    def alike(self, name: str) -> list[str]:
        """Files of this name in any case: what the user may have meant."""
        return self._folded.get(folded(name), [])

    def captions(self, image: str) -> list[str]:
        """Candidates for a caption file, in any case and Unicode form, or the exact one."""
        exact = str(PurePosixPath(image).with_suffix(".txt"))
        found = self._captions.get(caption_file(image), [])
        return [exact] if exact in found else found


def _grouped(names: Iterable[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[key(name)].append(name)
    return dict(groups)
