"""Posterior moments of a whole set, encoded once: sampling stays random, encoding is not paid again.

A cache is a folder of ``moments-XXXXX.safetensors``, ``texts.json`` and ``cache.json``. The last binds it to the autoencoder, the
data and the transform, and holds size and sha256 of the other files, and of itself. What is bound to something else is
refused; what is damaged is never read, and can be made again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from autoencoder.model import AutoencoderKL
from ldm.config import DataConfig
from ldm.data.folder import FolderSource
from ldm.data.sample import BadSample, Skipped, Source
from ldm.data.transforms import prepare
from ldm.distributed.processes import ALONE, Processes
from ldm.errors import DataError
from ldm.files.disk import file_hash, flush, read_bytes, replace

MANIFEST, TEXTS = "cache.json", "texts.json"
SHARD = 4096  # samples in one file
CAUSES = {"data": " (images, captions or further columns have changed)", "transform": " (image_size, crop or flip)"}


class DamagedCacheError(DataError):
    """A cache is missing or not as it was written: it can be made again. ``missing``: there is nothing at its place."""

    def __init__(self, message: str, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing


class NonFiniteLatentsError(DataError):
    """The autoencoder gives NaN or infinity."""

    exit_code = 5


def binding(autoencoder_hash: str, source: Source, data: DataConfig) -> dict[str, Any]:
    """Key of a cache: everything that determines its numbers."""
    return {
        "format": 3,
        "autoencoder": autoencoder_hash,
        "data": source.fingerprint,
        "transform": {"image_size": data.image_size, "crop": data.crop, "flip": data.flip},
    }


class LatentCache:
    """A cache folder: ``moments(index, mirror)`` and ``text(index)``; all of its files are read once here, and compared with their hashes.

    Raises DataError unless it was made for ``bound``, DamagedCacheError where a file is not as it was written; alike on all of
    ``processes``, which share the reading. ``skipped``: what could not be encoded, by index.
    """

    def __init__(self, folder: Path, bound: dict[str, Any], processes: Processes = ALONE) -> None:
        held, problem = processes.each(lambda: _read_manifest(folder, bound) if processes.main else ({}, ""))[
            0
        ]  # the main one's for all
        if not problem:
            files = sorted(held["files"].items())
            problems = processes.over(len(files), lambda mine: [_problem(folder, *files[i]) for i in mine])
            problem = next(filter(None, problems), "")
        if problem:
            missing = processes.each(lambda: not os.path.lexists(folder))[0]
            raise DamagedCacheError(
                f"no latent cache in {folder}: run `ldm cache-latents`" if missing else f"{folder}: {problem}", missing
            )
        self.folder, self.length = folder, int(held["length"])
        self.skipped = {int(index): Skipped(*said) for index, said in held["skipped"].items()}
        self._texts: list[str] = json.loads(read_bytes(folder / TEXTS).decode())
        self._shards: dict[int, dict[str, Tensor]] = {}

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._shards:
            path = self.folder / _shard_name(number)
            try:
                with safe_open(path, "pt") as file:
                    self._shards[number] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise DataError(f"{path} has changed since this start: {' '.join(str(error).split())}") from None
        return self._shards[number]

    def moments(self, index: int, mirror: bool = False) -> Tensor:
        """Mean and log-variance [2c, h, w] of the sample, or of its mirror image. Raises BadSample."""
        if index in self.skipped:
            raise BadSample(self.skipped[index].file, self.skipped[index].reason)
        return self._shard(index // SHARD)["mirrored" if mirror else "plain"][index % SHARD]

    def text(self, index: int) -> str:
        """The sample's caption."""
        return self._texts[index]


def _shard_name(number: int) -> str:
    return f"moments-{number:05d}.safetensors"


def _read_manifest(folder: Path, bound: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The contents of cache.json, and its fault, if any. Raises DataError for a cache of another ``bound``."""
    if problem := _unreadable(folder / MANIFEST):
        return {}, problem
    try:
        held = json.loads(read_bytes(folder / MANIFEST))
        digest = held.pop("sha256", None)
    except (
        ValueError,
        RecursionError,
        AttributeError,
        TypeError,
    ):  # of text that is not JSON, and of JSON that is not an object
        return {}, f"{MANIFEST} is damaged"
    if digest is not None and digest != _digest(held):
        return {}, f"{MANIFEST} is damaged (its sha256 differs)"
    for key, value in bound.items():
        if held.get(key) != value and (digest is not None or key != "format"):
            raise DataError(
                f"{folder}: this latent cache was made with another {key}{CAUSES.get(key, '')}: delete the folder, and it is made"
                " again; or use another run: directory"
            )
    return held, "" if digest is not None else "an earlier version made it, without hashes"


def _digest(manifest: dict[str, Any]) -> str:
    """sha256 of a manifest that is to hold its own."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _problem(folder: Path, name: str, held: dict[str, Any]) -> str:
    """How a file differs from what the manifest holds of it; empty where it does not."""
    path = folder / name
    if problem := _unreadable(path):
        return problem
    try:
        if (size := path.stat().st_size) != held["bytes"]:
            return f"{name} has {size} bytes, should have {held['bytes']}"
        return "" if file_hash(path) == held["sha256"] else f"{name} is damaged (its sha256 differs)"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"


def _unreadable(path: Path) -> str:
    """Why a file cannot be read; empty where it can. Raises DataError where only its rights are in the way."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            return f"{path.name} is not a regular file"
        path.open("rb").close()
    except PermissionError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    return ""


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
    """Encode every sample of a finite source into ``folder``, which appears whole or not at all, and on the disk.

    Raises DataError, OSError; NonFiniteLatentsError naming the image. Whatever ``folder`` was before is replaced.

    Each process encodes a shard of a round, on a file system that all of them share; the main one commits. A shard is
    encoded as it would be alone, so the cache is the same at any number of processes.
    """
    if source.length is None:
        raise DataError("a source without end cannot be cached: set data.size")
    length, shards = source.length, -(-source.length // SHARD)
    temporary = processes.each(lambda: _temporary(folder) if processes.main else folder)[0]

    def encoded(first: int) -> tuple[list[str], dict[int, Skipped], dict[str, Any]]:
        """This process's shard of the round that begins with ``first``."""
        number = first + processes.rank
        if number >= shards:
            return [], {}, {}

        def seen(done: int) -> None:
            if progress:  # the others are about as far
                progress(min(first * SHARD + done * processes.count, length), length)

        indices = range(number * SHARD, min((number + 1) * SHARD, length))
        texts, skipped = _write_shard(temporary, number, indices, autoencoder, source, data, device, batch, seen)
        return texts, skipped, _on_disk(temporary / _shard_name(number))

    texts: list[str] = []
    skipped: dict[str, list[str]] = {}
    files: dict[str, Any] = {}
    try:
        # In rounds: no process waits for another longer than one shard takes, since NCCL gives up after ten minutes.
        for first in range(0, shards, processes.count):
            for captions, left_out, file in processes.each(lambda first=first: encoded(first)):
                texts += captions
                skipped |= {str(index): [one.file, one.reason] for index, one in left_out.items()}
                files |= file
        manifest = {**bound, "length": length, "skipped": skipped, "files": files}
        processes.each(lambda: _commit(temporary, folder, texts, manifest) if processes.main else None)
    except BaseException:
        if processes.main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _temporary(folder: Path) -> Path:
    """Folder in which the cache is written until it is complete; named after the process that writes it."""
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    _remove(temporary)  # of an earlier life in a container, where numbers come again
    temporary.mkdir(parents=True)
    return temporary


def _commit(temporary: Path, folder: Path, texts: list[str], manifest: dict[str, Any]) -> None:
    replace(temporary / TEXTS, json.dumps(texts, ensure_ascii=False).encode())
    manifest["files"] |= _on_disk(temporary / TEXTS)
    replace(temporary / MANIFEST, json.dumps(manifest | {"sha256": _digest(manifest)}, indent=1).encode())
    flush(temporary)
    _remove(folder)
    temporary.rename(folder)
    flush(folder.parent)


def _remove(path: Path) -> None:
    """Delete whatever lies there; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _on_disk(file: Path) -> dict[str, Any]:
    """Have a file on the disk; what the manifest says of it, by its name."""
    flush(file)
    return {file.name: {"bytes": file.stat().st_size, "sha256": file_hash(file)}}


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
            _require_finite(rows[name][-1], indices[i : i + batch], source)
        progress(len(texts))
    _save({name: torch.cat(parts).contiguous() for name, parts in rows.items()}, folder / _shard_name(number))
    return texts, skipped


def _require_finite(moments: Tensor, indices: range, source: Source) -> None:
    """Raise NonFiniteLatentsError naming the first image whose moments are not."""
    finite = moments.flatten(1).isfinite().all(1)
    if not finite.all():
        index = indices[int((~finite).nonzero()[0])]
        file = f" ({source.folder / source.rows[index].file_name})" if isinstance(source, FolderSource) else ""
        raise NonFiniteLatentsError(
            f"the autoencoder's latent of image {index}{file} is not finite: its weights may be damaged"
        )


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file. Raises OSError, also where the library has an error of its own for a full disk."""
    try:
        save_file(tensors, file)
    except SafetensorError as error:
        number = int(found[1]) if (found := re.search(r"os error (\d+)", str(error))) else errno.EIO
        raise OSError(number, os.strerror(number), str(file)) from None
