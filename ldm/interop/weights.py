"""Weights in safetensors: written whole, read strictly."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class FolderError(RuntimeError):
    """A model folder is incomplete or does not fit together; the message names the file or tensor."""

    exit_code = 4


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises FolderError naming the file."""
    try:
        value = json.loads(file.read_text())
    except FileNotFoundError:
        raise FolderError(f"{file} is missing") from None
    except (OSError, ValueError) as error:
        raise FolderError(f"{file}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise FolderError(f"{file}: should hold a JSON object")
    return value


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write ``value`` as readable JSON, making the folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_module(module: nn.Module, file: Path) -> None:
    """Write all parameters and buffers under their own names."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().cpu().contiguous() for name, t in module.state_dict().items()}, file, metadata={"format": "pt"})


def read_module(make: Callable[[], M], file: Path) -> M:
    """Build a module without allocating it and give it the weights of ``file``: every tensor used, none missing."""
    try:
        tensors = load_file(file)
    except FileNotFoundError:
        raise FolderError(f"{file} is missing") from None
    except (OSError, SafetensorError) as error:
        raise FolderError(f"{file}: cannot be read: {' '.join(str(error).split())}") from None
    with torch.device("meta"):
        module = make()
    check_tensors(module.state_dict(), tensors, str(file))
    module.load_state_dict(tensors, assign=True)
    return module.requires_grad_(False).eval()


def check_tensors(wanted: dict[str, Tensor], given: dict[str, Tensor], where: str) -> None:
    """Raise FolderError unless both hold the same names and shapes."""
    for name in wanted:
        if name not in given:
            near = difflib.get_close_matches(name, [n for n in given if n not in wanted], n=1)
            raise FolderError(f"{where}: tensor {name} is missing" + (f" (there is {near[0]})" if near else ""))
        if wanted[name].shape != given[name].shape:
            raise FolderError(f"{where}: tensor {name} is {list(given[name].shape)}, its configuration says {list(wanted[name].shape)}")
    for name in given:
        if name not in wanted:
            raise FolderError(f"{where}: tensor {name} belongs to no part of the network its configuration describes")


def file_hash(file: Path) -> str:
    """sha256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
