"""The safetensors format: a JSON header, read strictly, and the bytes of the tensors after it.

Implemented here because the library accepts duplicate names in the header, writes metadata in
random order and holds a copy of what it writes. Source: the description of the format in the
library's README.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ldm.errors import FolderError
from ldm.files.json import parse_json
from ldm.files.tensors.mapped import MappedFile

MOST_HEADER = 100_000_000  # bytes, the library's limit
PIECE = 16 * 2**20  # bytes
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
_WORDS = {dtype: word for word, dtype in DTYPES.items()}


def read(file: MappedFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors, as views, and the metadata. Raises FolderError, also for overlaps and gaps."""
    length = int.from_bytes(file.data[:8], "little")
    if len(file) < 8 or length > len(file) - 8 or length > MOST_HEADER:
        sizes = f"a header of {length} bytes in a file of {len(file)}"
        raise FolderError(f"{file.path}: not a safetensors file, or cut off: {sizes}")
    header = parse_header(file.data[8 : 8 + length], f"{file.path}: its header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) and _is_text(k + v) for k, v in metadata.items()):
        raise FolderError(f"{file.path}: its metadata should be a JSON object of texts")
    tensors, spans = {}, []
    for name, entry in header.items():
        file.check_name(name)
        dtype, shape, begin, end = _entry(entry, f"{file.path}: tensor {name}")
        spans.append((begin, end, name))
        if end <= len(file) - 8 - length:
            tensors[name] = file.tensor(8 + length + begin, 8 + length + end, dtype, shape)
    position, before = 0, None
    for begin, end, name in sorted(spans):
        if begin != position:
            gap = begin - position
            fault = f"begins {gap} bytes after the end of the one before it" if gap > 0 else f"overlaps {before}"
            raise FolderError(f"{file.path}: tensor {name} {fault}: damaged, or not made by safetensors")
        position, before = end, name
    if position != (given := len(file) - 8 - length):
        fault = "cut off" if position > given else "too long"
        raise FolderError(f"{file.path}: its tensors have {position} bytes, there are {given}: {fault}")
    return tensors, metadata


def parse_header(data: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object in UTF-8, without duplicate keys.

    Raises FolderError beginning with ``what``.
    """
    try:
        return parse_json(data.decode(), what)
    except UnicodeDecodeError as error:
        raise FolderError(f"{what} is not JSON in UTF-8: {error}") from None


def _is_text(value: str) -> bool:
    """True if a string can be encoded as UTF-8: JSON can hold half of a surrogate pair."""
    return not any("\ud800" <= letter <= "\udfff" for letter in value)


def _entry(entry: Any, what: str) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """(dtype, shape, begin, end) of an entry, in bytes from the end of the header."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FolderError(f"{what} should have dtype, shape and data_offsets")
    word, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(word, str) or word not in DTYPES:
        raise FolderError(f"{what} is of type {str(word)[:40]!r}: only {', '.join(DTYPES)} are read")
    if not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2:
        raise FolderError(f"{what}: shape and data_offsets should be lists of whole numbers")
    size = prod(shape) * DTYPES[word].itemsize
    if offsets[1] - offsets[0] != size:
        given = offsets[1] - offsets[0]
        raise FolderError(f"{what} of {word} {shape} should have {size} bytes, the header gives it {given}")
    return DTYPES[word], tuple(shape), offsets[0], offsets[1]


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def write(stream: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file whose bytes depend on the content alone; wide types first, aligned.

    Raises FolderError for a dtype that the format lacks.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    position, names = 0, sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _WORDS or tensor.is_meta or name == "__metadata__":
            raise FolderError(f"tensor {name} ({tensor.dtype}, {tensor.device}) cannot be written as safetensors")
        end = position + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": _WORDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        for piece in pieces(tensors[name]):
            stream.write(piece)


def pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, in pieces; a contiguous tensor is never copied as a whole."""
    flat = tensor.detach().reshape(-1)
    count = PIECE // flat.dtype.itemsize
    for start in range(0, flat.numel(), count):
        piece = flat[start : start + count].cpu().contiguous()
        yield piece.as_strided(piece.shape, (1,)).view(torch.uint8).numpy().data  # a single element may have any stride
