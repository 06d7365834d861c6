"""Files of torch.save: zip archives or (before 1.6) series of pickles, as views.

Their pickle is read by our own unpickler; torch.load is not called. Sources:
torch/serialization.py, PKWARE's APPNOTE 4.3.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from ldm.errors import FolderError
from ldm.files.tensors.mapped import MappedFile
from ldm.files.tensors.pickled import TensorRef
from ldm.files.tensors.unpickle import LIMIT, Unpickler

ZIP = b"PK\x03\x04"
LEGACY = bytes.fromhex("6cfc9c46f9206aa85019")  # torch's magic number, in the first pickle of an old file
SPARE = 2**24  # bytes that copies of shared memory may exceed the file's length by: small files often expand a tensor
_OTHER_KINDS = {  # by a key that identifies them
    "param_groups": "the state of an optimizer",
    "optimizer": "the state of an optimizer, or of a training with one",
    "string_to_param": "a textual inversion",
    "ip_adapter": "an IP-Adapter",
}
Regions = Mapping[str, tuple[int, int]]  # storage → first and last byte in the file


def read(file: MappedFile) -> tuple[dict[str, Tensor], dict[str, int | float]]:
    """Tensors of `state_dict`, or of the file itself if it has none, and the numbers beside them.

    A tensor that shares bytes with another, or whose own elements overlap, is a copy; the others
    are views of the file. Raises FolderError.
    """
    content, regions = _zipped(file) if file.data[:4] == ZIP else _legacy(file)
    references, counters = _state_dict(content, file)
    return _build(references, regions, file), counters


def is_torch(start: bytes) -> bool:
    """True if a file that starts with these bytes was written by torch.save."""
    return start.startswith(ZIP) or (start.startswith(b"\x80") and LEGACY in start[:24])


def _zipped(file: MappedFile) -> tuple[Any, Regions]:
    """Contents of the pickle of a zip archive, and its storages."""
    try:
        entries = zipfile.ZipFile(file.data).infolist()  # type: ignore[arg-type]  # it can seek, read and tell
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as error:
        raise FolderError(f"{file.path}: a damaged or cut off zip archive: {error}") from None
    regions: dict[str, tuple[int, int]] = {}
    checks: dict[str, int] = {}
    for entry in entries:
        if entry.filename in regions:
            raise FolderError(f"{file.path}: its archive holds {entry.filename!r} twice")
        regions[entry.filename], checks[entry.filename] = _region(entry, file), entry.CRC
    roots = [name.removesuffix("data.pkl") for name in regions if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1 or f"{roots[0]}constants.pkl" in regions:
        raise FolderError(f"{file.path}: a zip archive, but not of torch.save with a data.pkl (is it TorchScript?)")
    root = roots[0]

    def content(name: str) -> bytes:
        start, end = regions[name]
        data = file.data[start : min(end, start + LIMIT + 1)]
        # torch writes 0 for a checksum that it did not compute
        if checks[name] and zlib.crc32(data) != checks[name] and len(data) <= LIMIT:
            raise FolderError(f"{file.path}: {name} is damaged: its checksum is wrong")
        return data

    order = f"{root}byteorder"
    if order in regions and content(order) != b"little":
        raise FolderError(f"{file.path}: its bytes are not in little-endian order")
    value = Unpickler(content(f"{root}data.pkl")[:LIMIT], str(file.path)).load()
    folder = f"{root}data/"
    return value, {name.removeprefix(folder): region for name, region in regions.items() if name.startswith(folder)}


def _region(entry: zipfile.ZipInfo, file: MappedFile) -> tuple[int, int]:
    """First and last byte of an entry, from its local header."""
    where = f"{file.path}: {entry.filename!r} of its archive"
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
        raise FolderError(f"{where} is compressed or encrypted: torch.save writes neither, repack it without")
    local = file.data[entry.header_offset : entry.header_offset + 30] if entry.header_offset >= 0 else b""
    if len(local) < 30 or local[:4] != ZIP:
        raise FolderError(f"{where} has no header where it should be")
    start = entry.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))
    if start + entry.file_size > len(file):
        raise FolderError(f"{where} reaches outside the file")
    return start, start + entry.file_size


def _legacy(file: MappedFile) -> tuple[Any, Regions]:
    """Contents and storages of a file of torch before 1.6, of counts and elements."""
    reader = Unpickler(file.data[:LIMIT], str(file.path))
    number, protocol, system = reader.load(), reader.load(), reader.load()
    little_endian = isinstance(system, dict) and system.get("little_endian") is True
    if number != int.from_bytes(LEGACY, "little") or protocol != 1001 or not little_endian:
        raise FolderError(f"{file.path}: a torch file of another protocol than 1001, or not in little-endian order")
    content, keys = reader.load(), reader.load()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        raise FolderError(f"{file.path}: its list of storages is damaged")
    regions, position = {}, reader.position
    for key in keys:
        if key not in reader.storages:
            raise FolderError(f"{file.path}: its list of storages is damaged")
        count = int.from_bytes(file.data[position : position + 8], "little", signed=True)
        end = position + 8 + count * reader.storages[key].itemsize
        if count < 0 or end > len(file):
            raise FolderError(f"{file.path}: storage {key[:40]!r} reaches outside the file: cut off")
        regions[key], position = (position + 8, end), end
    if position != len(file):
        raise FolderError(f"{file.path}: {len(file) - position} bytes too long")
    return content, regions


def _state_dict(content: Any, file: MappedFile) -> tuple[dict[str, TensorRef], dict[str, int | float]]:
    """Tensors of a `state_dict`, or of a file without one, and the numbers beside them, by name."""
    if not isinstance(content, dict):
        raise FolderError(f"{file.path} holds a {type(content).__name__}, not tensors by name")
    inside = content.get("state_dict", content)
    if not isinstance(inside, dict):
        raise FolderError(f"{file.path}: its state_dict is a {type(inside).__name__}, not tensors by name")
    numbers = {k: v for k, v in content.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    counters = {name: value for name, value in numbers.items() if isinstance(name, str)}
    if (kind := next((kind for key, kind in _OTHER_KINDS.items() if key in inside), None)) is not None:
        raise FolderError(f"{file.path} is {kind}: not a model")
    if (kept := [str(name) for name, value in inside.items() if isinstance(value, dict)]) and inside is content:
        raise FolderError(f"{file.path} holds no state_dict: its tensors are under {', '.join(kept[:4])[:200]}")
    references = {}
    for name, value in inside.items():
        if inside is content and name in counters:
            continue
        if not isinstance(name, str) or not isinstance(value, TensorRef):
            kind = getattr(value, "name", type(value).__name__)
            raise FolderError(f"{file.path}: {str(name)[:200]!r} is a {kind}, not a tensor")
        file.check_name(name)
        references[name] = value
    if not references:
        raise FolderError(f"{file.path} holds no tensors")
    return references, counters


def _build(references: dict[str, TensorRef], regions: Regions, file: MappedFile) -> dict[str, Tensor]:
    """Tensors in the file's order; copies take at most SPARE bytes more than the file."""
    spans = {
        name: _span(reference, regions, f"{file.path}: tensor {name}", len(file) + SPARE)
        for name, reference in references.items()
    }
    shared, reach, copied = set(), 0, 0
    for start, end, name in sorted((*span, name) for name, span in spans.items() if span[0] < span[1]):
        if start < reach or _overlaps_itself(references[name]):
            shared.add(name)
            copied += prod(references[name].shape) * references[name].dtype.itemsize
        reach = max(reach, end)
    if copied > len(file) + SPARE:
        raise FolderError(f"{file.path}: copies of tensors that share bytes would take {copied}: more than the file")
    tensors = {name: file.tensor(*spans[name], ref.dtype, ref.shape, ref.stride) for name, ref in references.items()}
    return {
        name: tensor.clone(memory_format=torch.contiguous_format) if name in shared else tensor
        for name, tensor in tensors.items()
    }


def _span(reference: TensorRef, regions: Regions, where: str, longest: int) -> tuple[int, int]:
    """First and last byte of a tensor in the file. Raises FolderError if it exceeds its storage."""
    storage, size = reference.storage, reference.dtype.itemsize
    if storage.key not in regions:
        raise FolderError(f"{where} is in storage {storage.key[:40]!r}, which the file lacks")
    start, end = regions[storage.key]
    if storage.nbytes != end - start:
        raise FolderError(
            f"{where}: storage {storage.key[:40]!r} should have {storage.nbytes} bytes and has {end - start}"
        )
    if max(reference.shape, default=0) >= 2**63 or prod(reference.shape) > longest:
        raise FolderError(f"{where} of {list(reference.shape)} has more elements than the file has bytes")
    if prod(reference.shape) == 0:
        return start, start
    last = reference.offset + sum((n - 1) * step for n, step in zip(reference.shape, reference.stride, strict=True))
    if (last + 1) * size > storage.nbytes:
        raise FolderError(f"{where} reaches outside its storage: element {last} of {storage.nbytes // size}")
    return start + reference.offset * size, start + (last + 1) * size


def _overlaps_itself(reference: TensorRef) -> bool:
    """True if elements may overlap: the stride of an axis is within narrower axes."""
    reach = 0
    for step, n in sorted((step, n) for n, step in zip(reference.shape, reference.stride, strict=True) if n > 1):
        if step <= reach:
            return True
        reach += (n - 1) * step
    return False
