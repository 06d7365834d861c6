"""`lora.json`: the base model that a folder with only a LoRA refers to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import FolderError
from ldm.files.disk import resolved
from ldm.files.json import read_json, write_json
from ldm.interop.intact import check_extra

REFERENCE = "lora.json"


@dataclass(frozen=True)
class Reference:
    """The base model of a LoRA.

    Attributes:
        folder: folder of the LoRA file.
        base: model folder of the base.
        sha256: hash of the base's weights (``Pipeline.hash``).
        extra: entries that replace those of the base's `ldm.json`.
    """

    folder: Path
    base: Path
    sha256: str
    extra: Mapping[str, Any]

    def write(self) -> None:
        """Write `lora.json`, with the relative path of the base, so that both may move, and the
        absolute one.
        """
        places = [os.path.relpath(self.base, self.folder), str(resolved(self.base))]
        write_json(self.folder / REFERENCE, {"format": 1, "base": places, "base_sha256": self.sha256, **self.extra})

    @classmethod
    def read(cls, folder: Path) -> Reference | None:
        """The reference in a folder, or None.

        Raises FolderError if the base is in neither of its places.
        """
        if not (folder / REFERENCE).is_file():
            return None
        about = read_json(folder / REFERENCE)
        places, sha256 = about.pop("base", None), about.pop("base_sha256", None)
        if not isinstance(places, list) or not places or not all(isinstance(one, str) for one in (*places, sha256)):
            raise FolderError(f"{folder / REFERENCE}: base and base_sha256 are missing or damaged")
        check_extra(about, str(folder / REFERENCE))
        base = next((place for p in places if _is_there(place := folder / p)), None)
        if base is None:
            raise FolderError(
                f"{folder} is the LoRA of {places[-1]}, which is not there:"
                f" bring it back, or use the LoRA with another model by --lora {folder}"
            )
        return cls(folder, base, sha256, {key: value for key, value in about.items() if key != "format"})

    def check(self, sha256: str) -> None:
        """Raise FolderError unless ``sha256`` is that of the base on which the LoRA was trained."""
        if sha256 != self.sha256:
            raise FolderError(
                f"{self.folder} is the LoRA of {self.base},"
                " whose weights have changed since it was trained: bring them back"
            )


def _is_there(place: Path) -> bool:
    """True if a path that was read from a file exists; False for one that is not a valid path."""
    try:
        return place.exists()
    except (OSError, ValueError):  # too long, or with a null byte
        return False
