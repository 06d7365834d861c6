"""Models of the Hugging Face hub: a text encoder and its tokenizer, safetensors only."""

from __future__ import annotations

import re
from pathlib import Path

from ldm.errors import FolderError
from ldm.interop.bundle import TEXT
from ldm.interop.diffusers.folder import FILES, TOKENIZER_FILES

_MODEL_FILES = ("config.json", FILES[TEXT])
_PATTERNS = [
    *_MODEL_FILES,
    *TOKENIZER_FILES,
    *(f"text_encoder/{name}" for name in _MODEL_FILES),
    *(f"tokenizer/{name}" for name in TOKENIZER_FILES),
]


def find_or_fetch(name: str) -> Path:
    """The local folder called ``name``, or a local copy of the hub model called so.

    Raises FolderError.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is None or name.startswith("."):
        raise FolderError(f"no folder {name}, and it is not the name of a hub model either (owner/name)")
    try:
        return Path(snapshot_download(name, allow_patterns=_PATTERNS))
    except (OSError, ValueError, RuntimeError) as error:
        raise FolderError(
            f"no folder {name}, and the hub gives no such model: {' '.join(str(error).split())}"
        ) from None
