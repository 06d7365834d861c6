"""Posterior moments of a whole data set, encoded once; each epoch samples new latents.

A cache is a folder of ``moments-XXXXX.safetensors``, ``texts.json`` and ``cache.json``. The last
holds the cache's key (autoencoder, data and transform), size and sha256 of the other files, and its
own sha256. A cache with another key is refused; a damaged one is never read, and can be made again.
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
CAUSES = {"data": " (images, captions or other columns have changed)", "transform": " (image_size, crop or flip)"}


class DamagedCacheError(DataError):
    """A cache is damaged or missing, and can be made again.

    ``missing``: its folder does not exist.
    """

    def __init__(self, message: str, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing


class NonFiniteLatentsError(DataError):
    """The autoencoder's output holds NaN or infinity."""

    exit_code = 5


def cache_key(autoencoder_hash: str, source: Source, data: DataConfig) -> dict[str, Any]:
    """Everything that determines the contents of a cache."""
    return {
        "format": 3,
        "autoencoder": autoencoder_hash,
        "data": source.fingerprint,
        "transform": {"image_size": data.image_size, "crop": data.crop, "flip": data.flip},
    }


class LatentCache:
    """A cache folder, opened: ``moments(index, mirror)`` and ``text(index)``.

    Opening verifies the hashes of all files; ``processes`` share the reading and raise alike:
    DataError if the cache has another ``key``, DamagedCacheError if a file is not as it was
    written. ``skipped``: samples that could not be encoded, by index.
    """

    def __init__(self, folder: Path, key: dict[str, Any], processes: Processes = ALONE) -> None:
        manifests = processes.each(lambda: _read_manifest(folder, key) if processes.main else ({}, ""))
        manifest, problem = manifests[0]  # all take the main process's
        if not problem:
            files = sorted(manifest["files"].items())
            problems = processes.over(len(files), lambda share: [_problem(folder, *files[i]) for i in share])
            problem = next(filter(None, problems), "")
        if problem:
            missing = processes.each(lambda: not os.path.lexists(folder))[0]
            raise DamagedCacheError(
                f"no latent cache in {folder}: run `ldm cache-latents`" if missing else f"{folder}: {problem}", missing
            )
        self.folder, self.length = folder, int(manifest["length"])
        self.skipped = {int(index): Skipped(*pair) for index, pair in manifest["skipped"].items()}
        self._texts: list[str] = json.loads(read_bytes(folder / TEXTS).decode())
        self._shards: dict[int, dict[str, Tensor]] = {}

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._shards:
            path = self.folder / _shard_name(number)
            try:
                with safe_open(path, "pt") as file:
                    self._shards[number] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise DataError(f"{path} has changed since it was opened: {' '.join(str(error).split())}") from None
        return self._shards[number]

    def moments(self, index: int, mirror: bool = False) -> Tensor:
        """Mean and log-variance [2c, h, w] of a sample, or of its mirror image.

        Raises BadSample.
        """
        if index in self.skipped:
            raise BadSample(self.skipped[index].file, self.skipped[index].reason)
        return self._shard(index // SHARD)["mirrored" if mirror else "plain"][index % SHARD]

    def text(self, index: int) -> str:
        """The caption of a sample."""
        return self._texts[index]


def _shard_name(number: int) -> str:
    return f"moments-{number:05d}.safetensors"


def _read_manifest(folder: Path, key: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Contents of cache.json, and its fault, if any.

    Raises DataError if the cache has another ``key``.
    """
    if problem := _unreadable(folder / MANIFEST):
        return {}, problem
    try:
        manifest = json.loads(read_bytes(folder / MANIFEST))
        digest = manifest.pop("sha256", None)
    except (ValueError, RecursionError, AttributeError, TypeError):  # not JSON, or JSON that is not an object
        return {}, f"{MANIFEST} is damaged"
    if digest is not None and digest != _digest(manifest):
        return {}, f"{MANIFEST} is damaged (its sha256 differs)"
    for part, value in key.items():
        if manifest.get(part) != value and (digest is not None or part != "format"):
            raise DataError(
                f"{folder}: this latent cache was made with another {part}{CAUSES.get(part, '')}:"
                " delete the folder, and it is made again; or use another run: directory"
            )
    return manifest, "" if digest is not None else "an earlier version made it, without hashes"


def _digest(manifest: dict[str, Any]) -> str:
    """sha256 that a manifest holds of its own other entries."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _problem(folder: Path, name: str, expected: dict[str, Any]) -> str:
    """Difference of a file from its entry in the manifest; empty if there is none."""
    path = folder / name
    if problem := _unreadable(path):
        return problem
    try:
        if (size := path.stat().st_size) != expected["bytes"]:
            return f"{name} has {size} bytes, should have {expected['bytes']}"
        return "" if file_hash(path) == expected["sha256"] else f"{name} is damaged (its sha256 differs)"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"


def _unreadable(path: Path) -> str:
    """Reason that a file cannot be read; empty if it can.

    Raises DataError for missing permissions.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would block
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
    key: dict[str, Any],
    autoencoder: AutoencoderKL,
    source: Source,
    data: DataConfig,
    device: torch.device,
    batch: int = 64,
    progress: Callable[[int, int], None] | None = None,
    processes: Processes = ALONE,
) -> None:
    """Encode every sample of a finite source into ``folder``, which appears whole or not at all.

    An existing ``folder`` is replaced. Each process encodes one shard per round, on a file system
    that all of them share, and the main one commits. A shard is encoded as by a single process, so
    the cache does not depend on the number of processes. Raises DataError, OSError;
    NonFiniteLatentsError naming the image.
    """
    if source.length is None:
        raise DataError("an endless source cannot be cached: set data.size")
    length, shards = source.length, -(-source.length // SHARD)
    temporary = processes.each(lambda: _temporary(folder) if processes.main else folder)[0]

    def encoded(first: int) -> tuple[list[str], dict[int, Skipped], dict[str, Any]]:
        """Encode this process's shard of the round that begins with shard ``first``."""
        number = first + processes.rank
        if number >= shards:
            return [], {}, {}

        def report(done: int) -> None:
            if progress:  # as if the other processes had done as many
                progress(min(first * SHARD + done * processes.count, length), length)

        indices = range(number * SHARD, min((number + 1) * SHARD, length))
        texts, skipped = _write_shard(temporary, number, indices, autoencoder, source, data, device, batch, report)
        return texts, skipped, _on_disk(temporary / _shard_name(number))

    texts: list[str] = []
    skipped: dict[str, list[str]] = {}
    files: dict[str, Any] = {}
    try:
        # In rounds, so that no process waits longer than one shard takes: NCCL times out after ten minutes.
        for first in range(0, shards, processes.count):
            for captions, left_out, file in processes.each(lambda first=first: encoded(first)):
                texts += captions
                skipped |= {str(index): [one.file, one.reason] for index, one in left_out.items()}
                files |= file
        manifest = {**key, "length": length, "skipped": skipped, "files": files}
        processes.each(lambda: _commit(temporary, folder, texts, manifest) if processes.main else None)
    except BaseException:
        if processes.main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _temporary(folder: Path) -> Path:
    """Make the folder that holds a cache until it is complete; its name holds the process id."""
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    _remove(temporary)  # left by an earlier start in a container, where process ids repeat
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
    """Delete a file or folder; of a symbolic link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _on_disk(file: Path) -> dict[str, Any]:
    """Flush a file to disk; returns its entry of the manifest, by name."""
    flush(file)
    return {file.name: {"bytes": file.stat().st_size, "sha256": file_hash(file)}}


def _write_shard(
    folder: Path,
    number: int,
    indices: range,
    autoencoder: AutoencoderKL,
    source: Source,
    data: DataConfig,
    device: torch.device,
    batch: int,
    progress: Callable[[int], None],
) -> tuple[list[str], dict[int, Skipped]]:
    """Encode one shard; returns its captions and unreadable samples, stored as zeros."""
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
    """Raise NonFiniteLatentsError naming the first image whose moments are not finite."""
    finite = moments.flatten(1).isfinite().all(1)
    if not finite.all():
        index = indices[int((~finite).nonzero()[0])]
        file = f" ({source.folder / source.rows[index].file_name})" if isinstance(source, FolderSource) else ""
        raise NonFiniteLatentsError(
            f"the autoencoder's latent of image {index}{file} is not finite: its weights may be damaged"
        )


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file. Raises OSError, also for the library's own error on a full disk."""
    try:
        save_file(tensors, file)
    except SafetensorError as error:
        number = int(found[1]) if (found := re.search(r"os error (\d+)", str(error))) else errno.EIO
        raise OSError(number, os.strerror(number), str(file)) from None
