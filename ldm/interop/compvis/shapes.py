"""Shapes of a file's tensors by name, and messages for missing and unknown names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from ldm.errors import FolderError


class Shapes:
    """Shapes of the tensors of one part, by their names without its prefix."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        self.prefix = prefix
        self._shapes = {
            name.removeprefix(prefix): tuple(t.shape) for name, t in tensors.items() if name.startswith(prefix)
        }

    def __call__(self, name: str, dimension: int) -> int:
        """One side of a tensor.

        Raises FolderError if the tensor is missing or has too few dimensions.
        """
        if name not in self._shapes:
            raise missing(self.prefix + name, [self.prefix + n for n in self._shapes])
        shape = self._shapes[name]
        if dimension >= len(shape):
            raise FolderError(
                f"tensor {self.prefix}{name} is {list(shape)}, which has too few dimensions for any network here"
            )
        return shape[dimension]

    def dimensions(self, name: str) -> int:
        """Number of dimensions of a tensor."""
        self(name, 0)
        return len(self._shapes[name])

    def has(self, prefix: str) -> bool:
        """True if any name starts with this prefix."""
        return any(name.startswith(prefix) for name in self._shapes)

    def count(self, prefix: str) -> int:
        """One more than the largest number that follows ``prefix`` in a name, or 0."""
        found = [m for name in self._shapes if (m := re.match(re.escape(prefix) + r"(\d+)\.", name))]
        return max((int(m[1]) + 1 for m in found), default=0)


def missing(name: str, among: Iterable[str]) -> FolderError:
    """The error for a missing tensor, with the most similar name ``among`` those present."""
    near = difflib.get_close_matches(name, list(among), n=1)
    return FolderError(f"tensor {name} is missing" + (f" (there is {near[0]})" if near else ""))


def nearest(name: str, expected: Iterable[str]) -> str:
    """The end of a message about an unknown tensor: the most similar expected name."""
    near = difflib.get_close_matches(name, list(expected), n=1)
    return f": the nearest that does is {near[0]}" if near else ""


def one_line(error: Exception) -> str:
    """An error of another library in one line, with its type (a KeyError's text is its key)."""
    return f"{type(error).__name__} {' '.join(str(error).split())}"
