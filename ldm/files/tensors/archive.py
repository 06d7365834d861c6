"""Weight files: memory-mapped when opened, atomically replaced when written."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from ldm.errors import FolderError
from ldm.files.disk import flush, read_bytes
from ldm.files.tensors import safetensors, torchfile
from ldm.files.tensors.mapped import MappedFile

TORCH = (".ckpt", ".pt", ".pth", ".bin")
_INDEX = re.compile(r".+\.(safetensors|bin)(\.\w+)?\.index(\.\w+)?\.json")
_BIN = {"model": "pytorch_model"}  # name of transformers' model.safetensors in old folders
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Archive:
    """Contents of one file, or of the shards of one index.

    Attributes:
        tensors: views of the files, mapped copy-on-write: an unused one takes no memory, a change
            never reaches the file. No two share memory.
        metadata: from the safetensors header.
        files: the files that were opened, the index first.
        counters: numbers beside the tensors of a torch file, such as `global_step`.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    files: tuple[Path, ...]
    counters: dict[str, int | float] = field(default_factory=dict)


def open_archive(path: str | Path) -> Archive:
    """Open `.safetensors`, a torch file (`.ckpt`, `.pt`, `.pth`, `.bin`) or a `….index.json`.

    Raises FolderError for a file that is damaged, not of the kind that its name says, or needs more
    than tensors.
    """
    path = Path(path)
    if _INDEX.fullmatch(path.name):
        return _open_shards(path)
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", *TORCH):
        known = f".safetensors, {', '.join(TORCH)} and .safetensors.index.json"
        raise FolderError(f"{path}: unknown file type: only {known} are opened")
    file = MappedFile(path)
    kind = _kind(file)
    if suffix == ".safetensors":
        if kind != "safetensors":
            raise FolderError(f"{path} should be safetensors and holds {kind}: not opened")
        tensors, metadata = safetensors.read(file)
        return Archive(tensors, metadata, (path,))
    if kind != "a torch file":
        raise FolderError(f"{path} should be a torch file and holds {kind}: not opened{_renamed(kind)}")
    tensors, counters = torchfile.read(file)
    return Archive(tensors, {}, (path,), counters)


def _renamed(kind: str) -> str:
    return ", rename it" if kind == "safetensors" else ""


def _kind(file: MappedFile) -> str:
    """The type of a file, by its first bytes."""
    start = file.data[:512]
    if torchfile.is_torch(start):
        return "a torch file"
    if start[8:9] == b"{":
        return "safetensors"
    if start.startswith(_LFS):
        return "the pointer of a file that was not fetched (`git lfs pull` does)"
    if start[0] == 0x80 and len(start) > 1 and start[1] <= 5:
        return "a pickle that torch.save did not write"
    return "a tar archive (torch before 0.1.10)" if start[257:262] == b"ustar" else "something unknown"


def _open_shards(index: Path) -> Archive:
    """Open shards, which must hold exactly the tensors that the index assigns to each."""
    try:
        content = safetensors.parse_header(read_bytes(index), f"{index}: it")
    except OSError as error:
        raise FolderError(f"{index}: cannot be read: {error.strerror}") from None
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(shard, str) for shard in places.values()):
        raise FolderError(f"{index}: its weight_map should name the file of each tensor")
    tensors, metadata, files = {}, {}, [index]
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard or _INDEX.fullmatch(shard):
            raise FolderError(f"{index}: {shard!r} is not the name of a file beside it")
        archive = open_archive(index.parent / shard)
        expected = {name for name, place in places.items() if place == shard}
        if wrong := sorted(expected ^ archive.tensors.keys()):
            elsewhere = f"the index places it in {places[wrong[0]]}" if wrong[0] in places else "it is not in the index"
            fault = (
                "is missing, although the index places it here" if wrong[0] in expected else f"is extra: {elsewhere}"
            )
            raise FolderError(f"{index.parent / shard}: tensor {wrong[0]} {fault}")
        for key, value in archive.metadata.items():
            if metadata.setdefault(key, value) != value:
                raise FolderError(f"{index.parent / shard}: its metadata {key} differs from that of other shards")
        tensors |= archive.tensors
        files.append(index.parent / shard)
    return Archive(tensors, metadata, tuple(files))


def find_weights(folder: Path, stem: str, variant: str | None = None) -> Path:
    """File or index of the weights in a folder of a diffusers pipeline, for `open_archive`.

    ``stem`` is `diffusion_pytorch_model`, or `model` for a text encoder; safetensors is preferred
    to `.bin`. Without ``variant`` the plain weights are taken, or else fp16, which is the same
    weights rounded. Any other variant (non_ema, ema) is other weights, and only taken by name.
    Raises FolderError naming the variants that exist.
    """
    found = _variants(folder, stem)
    chosen = (variant or "") if variant or "" in found else "fp16"
    if chosen not in found:
        wanted = f"variant {variant} of {stem}" if variant else stem
        instead = ", ".join("the plain one" if not name else f"variant {name}" for name in sorted(found))
        raise FolderError(f"{folder} holds no weights {wanted}.safetensors: there is {instead or 'none at all'}")
    files = found[chosen]
    best = [file for file in files if ".safetensors" in file.name] or files
    if len(best) > 1:
        raise FolderError(f"{folder} holds both {best[0].name} and {best[1].name}: remove the one that is not meant")
    return best[0]


def _variants(folder: Path, stem: str) -> dict[str, list[Path]]:
    """Files of weights in a folder, by variant; "" is the plain one.

    Source of the names: `_add_variant` in diffusers/utils/hub_utils.py.
    """
    old = re.escape(_BIN.get(stem, stem))
    names = rf"(?:{re.escape(stem)}(?:\.(?P<a>\w+))?\.safetensors|{old}(?:\.(?P<b>\w+))?\.bin)"
    # c is deprecated in diffusers
    indices = rf"(?:{re.escape(stem)}\.safetensors|{old}\.bin)(?:\.(?P<c>\w+))?\.index(?:\.(?P<d>\w+))?\.json"
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := re.fullmatch(names, file.name) or re.fullmatch(indices, file.name):
            variant = next((name for name in match.groups() if name), "")
            found.setdefault(variant, []).append(file)
    return found


def write_tensors(
    file: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
) -> Path:
    """Write a safetensors ``file``, or shards of at most ``max_shard_bytes`` and their index.

    Returns the path to open. Everything is written under temporary names, flushed and renamed, so
    an earlier file stays valid until then, also for processes that have it mapped, and survives a
    failure. The bytes depend on the content alone. Tensors that share memory are each written in
    full. The shards and index, or the single file, that this replaces are removed. Raises
    FolderError.
    """
    about = {"format": "pt", **(metadata or {})}
    shards = _split(tensors, max_shard_bytes)
    if len(shards) == 1:
        content = {file: shards[0]}
    else:
        of = f"of-{len(shards):05d}.safetensors"
        content = {file.with_name(f"{file.stem}-{i:05d}-{of}"): shard for i, shard in enumerate(shards, start=1)}
    index = index_name(file)
    temporary = {target: target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp") for target in [*content, index]}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for target, part in content.items():
            with _flushed(temporary[target]) as stream:
                safetensors.write(stream, part, about)
        if len(shards) > 1:
            total = sum(t.numel() * t.dtype.itemsize for t in tensors.values())
            places = {name: target.name for target, part in content.items() for name in part}
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2, sort_keys=True)
            with _flushed(temporary[index]) as stream:
                stream.write(text.encode() + b"\n")
            index.unlink(missing_ok=True)  # first: an index over shards of two models would be worse than none
            content[index] = {}
        for target in content:
            os.replace(temporary[target], target)
        _remove_replaced(file, index, set(content))
        flush(file.parent)
    except OSError as error:
        raise FolderError(f"{file}: cannot be written: {error.strerror}") from None
    finally:
        for left in temporary.values():
            with suppress(OSError):  # missing where the folder could not be made
                left.unlink()
    return index if index in content else file


def index_name(file: Path) -> Path:
    """`a.safetensors.index.json` for `a.safetensors`, with a variant before `.json`."""
    stem, *variant = file.name.removesuffix(".safetensors").split(".")
    return file.with_name(".".join([stem, "safetensors.index", *variant, "json"]))


def _split(tensors: Mapping[str, Tensor], most: int | None) -> list[dict[str, Tensor]]:
    """Split tensors into parts of at most ``most`` bytes; a larger tensor is alone in one."""
    parts: list[dict[str, Tensor]] = [{}]
    room = most
    for name, tensor in sorted(tensors.items()):
        size = tensor.numel() * tensor.dtype.itemsize
        if most is not None and room is not None:
            if size > room and parts[-1]:
                parts.append({})
                room = most
            room -= size
        parts[-1][name] = tensor
    return parts


@contextmanager
def _flushed(file: Path) -> Iterator[BinaryIO]:
    """Open a new file, which is flushed to disk when the block ends."""
    with file.open("xb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())


def _remove_replaced(file: Path, index: Path, new: set[Path]) -> None:
    """Remove replaced files that readers might take: index, shards, or single file."""
    shard = re.compile(re.escape(file.stem) + r"-\d{5}-of-\d{5}\.safetensors")
    for old in [index, file, *(f for f in sorted(file.parent.iterdir()) if shard.fullmatch(f.name))]:
        if old not in new:
            old.unlink(missing_ok=True)


def tensor_hash(tensor: Tensor) -> str:
    """sha256 of dtype, shape and bytes; read in pieces, so that a mapped tensor takes no memory."""
    digest = hashlib.sha256(f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
    for piece in safetensors.pieces(tensor):
        digest.update(piece)
    return digest.hexdigest()
