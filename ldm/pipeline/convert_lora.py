"""Converts a LoRA file to another layout, whose names are those of the layers of the model that it changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.config import ConfigError
from ldm.errors import FolderError
from ldm.interop.convert import DTYPES
from ldm.interop.diffusers.lora_folder import Reference
from ldm.interop.lora import find_lora, read_lora, write_lora
from ldm.models.lora import Lora
from ldm.pipeline.model import Model


def base_of(source: Path, named: str | None) -> str | Path:
    """The model that a LoRA changes: ``named``, or that its run records. Raises ConfigError, FolderError."""
    if named is not None:
        return named
    reference = Reference.read(find_lora(source).parent)
    if reference is None:
        raise ConfigError(
            f"{source} does not say which model it changes: give --lora-base, a run, folder or file of that model"
        )
    return reference.base


def convert_lora(
    source: Path, target: Path, layout: str, dtype: str, networks: Mapping[str, nn.Module]
) -> dict[str, Lora]:
    """Write the LoRA at ``source`` in a layout of ``LAYOUTS``, and return what was read.

    ``dtype``: of the tensors, keep is float32. Raises FolderError, ConfigError.
    """
    loras = read_lora(source, networks)
    write_lora(loras, target, layout, DTYPES.get(dtype, torch.float32))
    return loras


def networks_of(base: str | Path, **reading: Any) -> dict[str, nn.Module]:
    """The networks of a model that a LoRA may change. Raises FolderError, ConfigError."""
    return Model.from_pretrained(base, "cpu", **reading).networks


def verify_lora(loras: Mapping[str, Lora], written: Path, networks: Mapping[str, nn.Module]) -> str:
    """Read a written file back and state, in one line, the largest difference from ``loras``. Raises FolderError."""
    again = read_lora(written, networks)
    most = 0.0
    for part, lora in loras.items():
        found = again[part].changes if part in again else {}
        if found.keys() != lora.changes.keys():
            raise FolderError(f"verify: {part} was not written whole: {len(found)} of {len(lora.changes)} layers")
        for name, change in lora.changes.items():
            wanted = change.matrix()
            most = max(most, float((found[name].matrix() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)))
    layers = ", ".join(f"{len(lora.changes)} of {part}" for part, lora in loras.items())
    return f"verified: layers read back: {layers}; largest difference of a change: {most:.2g} of its largest weight"
