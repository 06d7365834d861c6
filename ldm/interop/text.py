"""Load a text encoder from a run, a model folder or file, or a CLIP of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ldm.errors import FolderError
from ldm.interop.bundle import TEXT, Bundle, Part
from ldm.interop.intact import check_intact
from ldm.interop.open import read_text_part
from ldm.models.text import TextEncoder


def read_text(name: str | Path) -> TextEncoder:
    """The text encoder of ``read_text_part``, frozen, float32, with its tokenizer.

    Raises FolderError.
    """
    try:
        part, tokenizer = read_text_part(str(name))
        return _made(part, tokenizer)
    except ValueError as error:
        raise FolderError(f"{name}: {error}") from None


def text_of(bundle: Bundle, where: Path) -> TextEncoder:
    """The text encoder of the model at ``where``, frozen, float32. Raises FolderError."""
    if TEXT not in bundle.parts:
        raise FolderError(f"{where} has no text encoder")
    try:
        return _made(bundle.parts[TEXT], bundle.tokenizer)
    except ValueError as error:
        raise FolderError(f"{where}: {TEXT}: {error}") from None


def _made(part: Part, tokenizer: Mapping[str, bytes]) -> TextEncoder:
    """Build the encoder and check its weights. Raises ValueError, FolderError."""
    encoder = TextEncoder.from_tensors(part.config, part.tensors, tokenizer)
    check_intact(part, "text encoder")
    return encoder
