"""Memory-mapped files, copy-on-write: unread parts take no memory, changes never reach the file."""

from __future__ import annotations

import mmap
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import FolderError


class MappedFile:
    """Private, copy-on-write map of a whole file; a file renamed over it later does not change it.

    Attributes:
        data: the bytes; a slice of it is a copy.
    """

    def __init__(self, path: Path) -> None:
        """Map ``path``. Raises FolderError."""
        self.path = path
        try:
            if not path.is_file():  # opening a pipe would block
                raise FolderError(f"{path} is {'a folder, not a file' if path.is_dir() else 'missing'}")
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
        """A view of the bytes ``start:end``, which must fit file, shape and strides.

        Tensors that are not aligned in the file are not aligned here, as with safetensors' own
        reader.
        """
        if prod(n or 1 for n in shape) >= 2**63:
            raise FolderError(f"{self.path}: a tensor of {list(shape)} is not possible")
        if start == end:
            return torch.empty(shape, dtype=dtype)
        storage = torch.frombuffer(self.data, dtype=torch.uint8, offset=start, count=end - start).untyped_storage()
        tensor = torch.empty(0, dtype=dtype)
        return tensor.set_(storage, 0, shape, stride) if stride is not None else tensor.set_(storage).view(shape)

    def check_name(self, name: str) -> None:
        """Raise FolderError for a tensor name that should not be printed to a terminal."""
        if not name.isprintable() or len(name) > 1000:
            raise FolderError(f"{self.path}: the name of a tensor is {name[:80]!r}: not printable or too long")
