"""A file in memory without being read: what is not looked at costs nothing, what is written to stays here."""

from __future__ import annotations

import mmap
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import FolderError


class MappedFile:
    """A private, copy-on-write map of a whole file, by its content at the moment of opening: a new file renamed over it is another.

    Attributes:
        data: the bytes; a slice of it is a copy.
    """

    def __init__(self, path: Path) -> None:
        """Map ``path``. Raises FolderError."""
        self.path = path
        try:
            if not path.is_file():  # a pipe would wait for ever
                raise FolderError(f"{path} is {'a folder, no file' if path.is_dir() else 'missing'}")
            with path.open("rb") as stream:
                self.data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        except ValueError:
            raise FolderError(f"{path} is empty") from None
        except OSError as error:
            raise FolderError(f"{path}: cannot be read: {error.strerror}") from None

    def __len__(self) -> int:
        return len(self.data)

    def tensor(
        self, start: int, end: int, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...] | None = None
    ) -> Tensor:
        """A view of the bytes ``start:end``, which the caller has checked: inside the file, and enough for shape and strides.

        Where the file does not align its tensors, the view is not aligned either, as with safetensors' own reader.
        """
        if prod(n or 1 for n in shape) >= 2**63:
            raise FolderError(f"{self.path}: a tensor of {list(shape)} is not possible")
        if start == end:
            return torch.empty(shape, dtype=dtype)
        storage = torch.frombuffer(self.data, dtype=torch.uint8, offset=start, count=end - start).untyped_storage()
        tensor = torch.empty(0, dtype=dtype)
        return tensor.set_(storage, 0, shape, stride) if stride is not None else tensor.set_(storage).view(shape)

    def check_name(self, name: str) -> None:
        """Raise FolderError for the name of a tensor that no terminal should be shown."""
        if not name.isprintable() or len(name) > 1000:
            raise FolderError(f"{self.path}: the name of a tensor is {name[:80]!r}: not printable or too long")
