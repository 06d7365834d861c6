"""From one layout to another: bundles cast, counted and written."""

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
SHOWN = 3  # names of a kind


def cast(bundle: Bundle, dtype: str) -> Bundle:
    """With every floating-point tensor in ``dtype``; ``keep``: as they are. Raises ConfigError where a value would be lost."""
    if dtype == "keep":
        return bundle
    parts = {}
    for name, part in bundle.parts.items():
        tensors = {key: t.to(DTYPES[dtype]) if t.is_floating_point() else t for key, t in part.tensors.items()}
        for key, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()) and bool(torch.isfinite(part.tensors[key]).all()):
                raise ConfigError(f"{name} {key} has values that {dtype} cannot hold: take bf16 or keep")
        parts[name] = dataclasses.replace(part, tensors=tensors)
    return dataclasses.replace(bundle, parts=parts)


def coverage(bundle: Bundle) -> list[str]:
    """Report of what each tensor that was read was used for."""
    used = ", ".join(f"{len(part.tensors)} of {name}" for name, part in bundle.parts.items())
    lines = [
        f"read from {bundle.layout}: {sum(len(part.tensors) for part in bundle.parts.values())} tensors used ({used}), none missing"
    ]
    for reason, count in Counter(bundle.besides.values()).items():
        names = [name for name, why in bundle.besides.items() if why == reason]
        lines.append(f"left aside, {count}: {', '.join(names[:SHOWN])}{' …' if count > SHOWN else ''}: {reason}")
    if bundle.scheduler is not None and (blind := blind_end(bundle.scheduler)) is not None:
        lines.append(f"warning: the model {blind}")
    return lines


def write_model(bundle: Bundle, target: Path, max_shard_bytes: int | None = None, openclip: bool = False) -> None:
    """Write a folder, or a single file where the name ends in .safetensors. Raises FolderError or ConfigError."""
    check_writable(bundle)
    if target.suffix == ".safetensors":
        tensors, metadata = to_compvis(bundle, openclip)
        write_tensors(target, tensors, metadata)
    elif UNET in bundle.parts:
        write_folder(bundle, target, max_shard_bytes)
    else:
        write_part(bundle.parts[VAE], target, VAE, max_shard_bytes)
