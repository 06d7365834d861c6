"""A model as its files hold it: configurations and tensors under diffusers' names.

Every layout (a pipeline folder, a single file) is read into a Bundle and written from one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

UNET, VAE, TEXT = "unet", "vae", "text_encoder"


@dataclass(frozen=True)
class Part:
    """One network.

    Attributes:
        config: its config.json, with the keys of diffusers or transformers.
        tensors: by their names there (the text encoder's with the prefix `text_model.`);
            memory-mapped, so that a tensor that is never read costs nothing.
        files: the files that they were read from.
        sha256: file name to the hash that `ldm.json` recorded when the folder was written; empty if
            unknown.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    files: tuple[Path, ...] = ()
    sha256: Mapping[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """The file or folder of the weights, for messages."""
        if not self.files:
            return "the model"
        return str(self.files[0] if len(self.files) == 1 else self.files[0].parent)


@dataclass(frozen=True)
class Bundle:
    """A model, whole or in part.

    Attributes:
        parts: the networks present, under UNET, VAE and TEXT.
        scheduler: scheduler_config.json; None for an autoencoder alone.
        tokenizer: the files of tokenizer/ by name.
        extra: `ldm.json`: settings with no place in diffusers' files (null caption, sampling
            defaults).
        unused: tensors and sub-folders of the source that no network uses, by name there: why each
            is harmless.
        layout: a description of the source for messages; empty for a model that was not read from
            files.
        kind: the class in the `model_index.json` of a folder.
    """

    parts: Mapping[str, Part]
    scheduler: Mapping[str, Any] | None = None
    tokenizer: Mapping[str, bytes] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    unused: Mapping[str, str] = field(default_factory=dict)
    layout: str = ""
    kind: str = ""

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files of all parts, without duplicates."""
        return tuple(dict.fromkeys(file for part in self.parts.values() for file in part.files))
