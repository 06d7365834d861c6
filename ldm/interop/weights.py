"""Build a network on given tensors without copying; every one is used and none is missing."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from ldm.errors import FolderError
from ldm.files.tensors.archive import open_archive, write_tensors
from ldm.interop.bundle import Part
from ldm.interop.intact import check_intact

M = TypeVar("M", bound=nn.Module)


def write_module(module: nn.Module, file: Path) -> None:
    """Write all parameters and buffers under their own names. Raises FolderError."""
    write_tensors(file, module.state_dict())


def read_module(make: Callable[[], M], file: Path) -> M:
    """The module of ``make`` with the weights of ``file``, as ``fill`` loads them.

    Raises FolderError.
    """
    return fill(make, Part({}, open_archive(file).tensors, (file,)))


def fill(make: Callable[[], M], part: Part, name: str = "") -> M:
    """Build a frozen module on the tensors of ``part``: all used, none missing, all finite.

    The weights stay memory-mapped until they are moved or changed. ``name``: of the part, for
    messages. Raises FolderError.
    """
    with torch.device("meta"):
        module = make()
    check_tensors({name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}, part)
    check_intact(part, name)
    module.load_state_dict(dict(part.tensors), assign=True)
    return module.requires_grad_(False).eval()


def check_tensors(wanted: Mapping[str, tuple[int, ...]], part: Part) -> None:
    """Raise FolderError unless the part holds exactly the tensors ``wanted`` (name → shape)."""
    where, given = part.where, part.tensors
    for name, shape in wanted.items():
        if name not in given:
            near = difflib.get_close_matches(name, [n for n in given if n not in wanted], n=1)
            raise FolderError(f"{where}: tensor {name} is missing" + (f" (there is {near[0]})" if near else ""))
        if shape != tuple(given[name].shape):
            raise FolderError(
                f"{where}: tensor {name} is {list(given[name].shape)}, its configuration says {list(shape)}"
            )
    for name in given:
        if name not in wanted:
            raise FolderError(
                f"{where}: tensor {name} belongs to no part of the network that its configuration describes"
            )
