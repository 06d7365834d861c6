"""A text encoder alone: of a run of `train-clip`, a model folder or file, a CLIP of transformers, by path or by its name on the hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ldm.interop.bundle import TEXT, Bundle
from ldm.interop.files import FolderError
from ldm.interop.folder import read_part, read_tokenizer_files
from ldm.interop.hub import find_or_fetch
from ldm.interop.intact import check_intact
from ldm.interop.layouts import read_file
from ldm.models.text import TextEncoder

OTHERS = ("vision_model.", "visual_projection.", "logit_scale")  # of a whole CLIP


def read_text(name: str | Path) -> TextEncoder:
    """The text encoder, frozen, float32, with its tokenizer. Raises FolderError."""
    path = Path(name)
    try:
        if path.is_file():
            return text_of(read_file(path), path)
        folder = path / "model" if (path / "model/text_encoder").is_dir() else find_or_fetch(str(name))
        split = (folder / "text_encoder").is_dir()
        part, _ = read_part(folder / "text_encoder" if split else folder, TEXT)
        tower = {key: tensor for key, tensor in part.tensors.items() if not key.startswith(OTHERS)}
        tokenizer = read_tokenizer_files(folder / "tokenizer" if split else folder)
        encoder = TextEncoder.from_tensors(part.config, tower, tokenizer)
        check_intact(replace(part, tensors=tower), "text encoder")
        return encoder
    except ValueError as error:
        raise FolderError(f"{name}: {error}") from None


def text_of(bundle: Bundle, where: Path) -> TextEncoder:
    """The text encoder of the model at ``where``, frozen, float32. Raises FolderError."""
    if TEXT not in bundle.parts:
        raise FolderError(f"{where} has no text encoder")
    try:
        encoder = TextEncoder.from_tensors(bundle.parts[TEXT].config, bundle.parts[TEXT].tensors, bundle.tokenizer)
        check_intact(bundle.parts[TEXT], "text encoder")
        return encoder
    except ValueError as error:
        raise FolderError(f"{where}: {TEXT}: {error}") from None
