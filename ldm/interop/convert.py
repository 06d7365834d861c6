"""Conversion between layouts: cast a bundle, report what was read, write it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import torch

from ldm.config import ConfigError
from ldm.files.tensors.archive import write_tensors
from ldm.interop.bundle import UNET, VAE, Bundle
from ldm.interop.compvis.layout import to_compvis
from ldm.interop.diffusers.folder import write_folder, write_part
from ldm.interop.diffusers.schedulers import blind_end
from ldm.interop.intact import check_writable

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHOWN = 3  # names of unused tensors per reason


def cast(bundle: Bundle, dtype: str) -> Bundle:
    """The bundle with floating-point tensors in ``dtype`` (``keep``: unchanged).

    Raises ConfigError where a finite value would overflow.
    """
    if dtype == "keep":
        return bundle
    parts = {}
    for name, part in bundle.parts.items():
        tensors = {key: t.to(DTYPES[dtype]) if t.is_floating_point() else t for key, t in part.tensors.items()}
        for key, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()) and bool(torch.isfinite(part.tensors[key]).all()):
                raise ConfigError(f"{name} {key} has values that {dtype} cannot hold: use bf16 or keep")
        parts[name] = dataclasses.replace(part, tensors=tensors)
    return dataclasses.replace(bundle, parts=parts)


def coverage(bundle: Bundle) -> list[str]:
    """Report lines: how many tensors each part used, what was left unused and why."""
    counts = {name: len(part.tensors) for name, part in bundle.parts.items()}
    by_part = ", ".join(f"{count} of {name}" for name, count in counts.items())
    lines = [f"read from {bundle.layout}: {sum(counts.values())} tensors used ({by_part}), none missing"]
    for reason, count in Counter(bundle.unused.values()).items():
        names = [name for name, why in bundle.unused.items() if why == reason]
        lines.append(f"unused, {count}: {', '.join(names[:SHOWN])}{' …' if count > SHOWN else ''}: {reason}")
    if bundle.scheduler is not None and (blind := blind_end(bundle.scheduler)) is not None:
        lines.append(f"warning: the model {blind}")
    return lines


def write_model(bundle: Bundle, target: Path, max_shard_bytes: int | None = None, openclip: bool = False) -> None:
    """Write a folder, or a single file if the name ends in .safetensors.

    Raises FolderError or ConfigError.
    """
    check_writable(bundle)
    if target.suffix == ".safetensors":
        tensors, metadata = to_compvis(bundle, openclip)
        write_tensors(target, tensors, metadata)
    elif UNET in bundle.parts:
        write_folder(bundle, target, max_shard_bytes)
    else:
        write_part(bundle.parts[VAE], target, VAE, max_shard_bytes)
