"""A model as files hold it: configurations and tensors, in diffusers' words, and no network.

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
        config: its config.json, in diffusers' or transformers' words.
        tensors: by the names used there (the text encoder's with the prefix `text_model.`); memory-mapped, so that one which
            is not looked at costs nothing.
        files: where they were read.
        sha256: of the files that were written with their folder, by name; empty where that is not known.
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
        parts: by UNET, VAE, TEXT; those that are there.
        scheduler: scheduler_config.json; None for an autoencoder alone.
        tokenizer: the files of tokenizer/ by name.
        extra: `ldm.json`: what only we know (null caption, sampling defaults).
        kind: the class in the `model_index.json` of a folder.
        layout: what it was read from, in words; empty for a model of this process.
        besides: what the source carries and no network uses, tensors and sub-folders by their name there: why that is harmless.
    """

    parts: Mapping[str, Part]
    scheduler: Mapping[str, Any] | None = None
    tokenizer: Mapping[str, bytes] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    besides: Mapping[str, str] = field(default_factory=dict)
    layout: str = ""
    kind: str = ""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the weights, each once."""
        return tuple(dict.fromkeys(file for part in self.parts.values() for file in part.files))
