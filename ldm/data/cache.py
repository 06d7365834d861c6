"""Posterior moments of a whole set, encoded once: sampling stays random, encoding is not paid again.

The cache is bound to the autoencoder, to the data and to the transform; what does not match is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from autoencoder.model import AutoencoderKL
from ldm.config import DataConfig
from ldm.data.images import prepare
from ldm.data.processes import ALONE, Processes
from ldm.data.sources import BadSample, DataError, Skipped, Source

MANIFEST = "cache.json"
SHARD = 4096  # samples in one file
CAUSES = {"data": " (images, captions or further columns have changed)", "transform": " (image_size, crop or flip)"}


def binding(autoencoder_hash: str, source: Source, data: DataConfig) -> dict[str, Any]:
    """What determines every number in a cache."""
    return {
        "format": 2,
        "autoencoder": autoencoder_hash,
        "data": source.fingerprint,
        "transform": {"image_size": data.image_size, "crop": data.crop, "flip": data.flip},
    }


class LatentCache:
    """A cache folder: ``moments(index, mirror)`` and ``text(index)``. Raises DataError unless it was made for ``bound``.

    ``skipped``: what could not be encoded, by index.
    """

    def __init__(self, folder: Path, bound: dict[str, Any]) -> None:
        file = folder / MANIFEST
        if not file.is_file():
            raise DataError(f"no latent cache in {folder}: run `ldm cache-latents`")
        manifest = json.loads(file.read_text(encoding="utf-8"))
        for key, value in bound.items():
            if manifest.get(key) != value:
                raise DataError(
                    f"{folder}: this latent cache was made with another {key}{CAUSES.get(key, '')}: delete the folder, and it is made"
                    " again; or use another run: directory"
                )
        self.folder, self.length = folder, int(manifest["length"])
        self.skipped = {int(index): Skipped(*said) for index, said in manifest["skipped"].items()}
        self._texts: list[str] = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
        self._shards: dict[int, dict[str, Tensor]] = {}

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._shards:
            with safe_open(self.folder / f"moments-{number:05d}.safetensors", "pt") as file:
                self._shards[number] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return self._shards[number]

    def moments(self, index: int, mirror: bool = False) -> Tensor:
        """Mean and log-variance [2c, h, w] of the sample, or of its mirror image. Raises BadSample."""
        if index in self.skipped:
            raise BadSample(self.skipped[index].file, self.skipped[index].reason)
        return self._shard(index // SHARD)["mirrored" if mirror else "plain"][index % SHARD]

    def text(self, index: int) -> str:
        """The sample's caption."""
        return self._texts[index]


@torch.no_grad()
def write(
    folder: Path,
    bound: dict[str, Any],
    autoencoder: AutoencoderKL,
    source: Source,
    data: DataConfig,
    device: torch.device,
    batch: int = 64,
    progress: Callable[[int, int], None] | None = None,
    processes: Processes = ALONE,
) -> None:
    """Encode every sample of a finite source into ``folder``, which appears whole or not at all. Raises DataError.

    Each process encodes a shard of a round, on a file system that all of them share; the main one commits. A shard is
    encoded as it would be alone, so the cache is the same at any number of processes.
    """
    if source.length is None:
        raise DataError("a source without end cannot be cached: set data.size")
    length, shards = source.length, -(-source.length // SHARD)
    temporary = processes.each(lambda: _temporary(folder) if processes.main else folder)[0]

    def encoded(first: int) -> tuple[list[str], dict[int, Skipped]]:
        """This process's shard of the round that begins with ``first``."""
        number = first + processes.rank
        if number >= shards:
            return [], {}

        def seen(done: int) -> None:
            if progress:  # the others are about as far
                progress(min(first * SHARD + done * processes.count, length), length)

        indices = range(number * SHARD, min((number + 1) * SHARD, length))
        return _write_shard(temporary, number, indices, autoencoder, source, data, device, batch, seen)

    texts: list[str] = []
    skipped: dict[int, Skipped] = {}
    try:
        # In rounds: no process waits for another longer than one shard takes, since NCCL gives up after ten minutes.
        for first in range(0, shards, processes.count):
            for captions, left_out in processes.each(lambda first=first: encoded(first)):
                texts += captions
                skipped |= left_out
        manifest = {**bound, "length": length, "skipped": {index: [s.file, s.reason] for index, s in skipped.items()}}
        processes.each(lambda: _commit(temporary, folder, texts, manifest) if processes.main else None)
    except BaseException:
        if processes.main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _temporary(folder: Path) -> Path:
    """Where the cache is written until it is whole; named for the process that answers for it."""
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    temporary.mkdir(parents=True)
    return temporary


def _commit(temporary: Path, folder: Path, texts: list[str], manifest: dict[str, Any]) -> None:
    (temporary / "texts.json").write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)


def _write_shard(
    folder: Path, number: int, indices: range, autoencoder: AutoencoderKL, source: Source, data: DataConfig, device: torch.device,
    batch: int, progress: Callable[[int], None],
) -> tuple[list[str], dict[int, Skipped]]:  # fmt: skip
    """Encode one shard; returns its captions, and what could not be read, whose place is filled with zeros."""
    texts: list[str] = []
    skipped: dict[int, Skipped] = {}

    def image(index: int) -> Tensor:
        try:
            return prepare(source[index].image, data.image_size)
        except BadSample as bad:
            skipped[index] = bad.skipped
            return torch.zeros(data.image_channels, data.image_size, data.image_size)

    rows: dict[str, list[Tensor]] = {"plain": [], "mirrored": []} if data.flip else {"plain": []}
    for i in range(0, len(indices), batch):
        texts += [source.text(j) for j in indices[i : i + batch]]
        images = torch.stack([image(j) for j in indices[i : i + batch]]).to(device)
        for name in rows:
            rows[name].append(autoencoder.encode(images.flip(3) if name == "mirrored" else images).moments.cpu())
        progress(len(texts))
    save_file({name: torch.cat(parts).contiguous() for name, parts in rows.items()}, folder / f"moments-{number:05d}.safetensors")
    return texts, skipped
