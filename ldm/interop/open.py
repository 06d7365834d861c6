"""Read a model in any layout: run, pipeline folder, autoencoder's folder or single file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.config import ConfigError
from ldm.config.values import check_names
from ldm.errors import FolderError
from ldm.files.json import read_json
from ldm.files.tensors.archive import Archive, open_archive
from ldm.interop.bundle import TEXT, UNET, VAE, Bundle, Part
from ldm.interop.compvis.header import KEY
from ldm.interop.compvis.inferred import Hints
from ldm.interop.compvis.kinds import OPENED, is_lora, other_kind
from ldm.interop.compvis.layout import from_compvis
from ldm.interop.compvis.names import shapes_of
from ldm.interop.compvis.spelling import spelled
from ldm.interop.diffusers.folder import (
    INDEX,
    find_autoencoder,
    find_model,
    read_folder,
    read_part,
    read_tokenizer_files,
)
from ldm.interop.diffusers.lora_folder import REFERENCE, Reference
from ldm.interop.hub import find_or_fetch
from ldm.interop.lora import NAMES as LORA_NAMES
from ldm.interop.weights import check_tensors

_OTHERS = ("vision_model.", "visual_projection.", "logit_scale")  # tensors of a whole CLIP that no text encoder has
_WHAT_FOR = "draw with it by `ldm sample MODEL --lora`, convert it by `ldm convert --lora-layout` (docs/lora.md)"
OPENCLIP_PAD = "!"  # token 0, with which OpenCLIP pads captions; OpenAI's CLIP pads with the end-of-text token


def read_model(
    path: str | Path, variant: str | None = None, vae: str | None = None, text: str | None = None, **reading: Any
) -> Bundle:  # fmt: skip
    """The model at a path; weights are not read.

    Args:
        variant: weight files of a folder to prefer, such as fp16.
        vae, text: a run, folder, single file or hub name; its autoencoder or text encoder (with
            tokenizer) replaces the model's own.
        reading: options for a single file (``read_file``).

    Raises:
        FolderError, ConfigError.
    """
    given = {name for name, other in ((VAE, vae), (TEXT, text)) if other is not None}
    if Path(path).is_file():
        return _with_parts(read_file(Path(path), variant, **reading), vae, text)
    folder = find_model(path)
    _refuse(reading, path)
    if (reference := Reference.read(folder)) is not None:
        raise ConfigError(f"{path} is a LoRA of {reference.base}, not a model: {_WHAT_FOR}")
    return _with_parts(read_folder(folder, variant, given), vae, text)


def _with_parts(bundle: Bundle, vae: str | None, text: str | None) -> Bundle:
    """The model with its autoencoder or text encoder replaced.

    Raises FolderError or ConfigError.
    """
    parts, tokenizer, extra = dict(bundle.parts), bundle.tokenizer, dict(bundle.extra)
    if vae is not None:
        parts[VAE] = read_autoencoder(vae)
        extra.pop("sample_size", None)  # follows from the side of x_t and this autoencoder's factor
    if text is not None:
        parts[TEXT], tokenizer = read_text_part(text)
    parts = {name: parts[name] for name in (UNET, VAE, TEXT) if name in parts}
    return replace(bundle, parts=parts, tokenizer=tokenizer, extra=extra)


def read_any(
    path: str | Path, variant: str | None = None, vae: str | None = None, text: str | None = None, **reading: Any
) -> Bundle:  # fmt: skip
    """The model, or the autoencoder alone, at a path; every tensor's shape is checked.

    Arguments as ``read_model``.

    Raises FolderError or ConfigError.
    """
    folder = Path(path)
    files = (folder / place / name for place in (".", "model") for name in (INDEX, REFERENCE))
    if folder.is_dir() and not any(file.is_file() for file in files):
        _refuse(reading, path)
        _refuse({"vae": vae, "text": text}, path, "models with a U-Net", "holds an autoencoder alone")
        part, unused = read_part(_alone(folder), VAE, variant)
        bundle = Bundle({VAE: part}, unused=unused, layout="a folder of an AutoencoderKL")
    else:
        bundle = read_model(path, variant, vae, text, **reading)
    for name, part in bundle.parts.items():
        check_tensors(shapes_of(name, part.config), part)
    return bundle


def _refuse(
    reading: Mapping[str, Any],
    path: str | Path,
    kind: str = "single files",
    reason: str = "is a folder, whose own files say it",
) -> None:
    """Raise ConfigError if an option is given that is only for another ``kind`` of model."""
    if given := [name for name, value in reading.items() if value is not None]:
        raise ConfigError(f"{given[0]} is for {kind}, and {path} {reason}")


def _alone(path: Path) -> Path:
    """The folder of an autoencoder.

    Raises FolderError that says what else is at a path without model_index.json.
    """
    if (path / UNET).is_dir():
        raise FolderError(f"{path} holds {UNET}/ but no {INDEX}, which says what belongs to the model")
    if any((folder / name).is_file() for folder in (path, path / "model") for name in LORA_NAMES):
        raise ConfigError(f"{path} is a LoRA, not a model: {_WHAT_FOR}")
    own = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if own.get("_class_name", "AutoencoderKL") != "AutoencoderKL" or "model_type" in own:
        raise FolderError(
            f"{path} is one part of a pipeline (a {own.get('_class_name') or own['model_type']}):"
            " name the folder above it"
        )
    places = (path, path / VAE, path / "model" / VAE)
    if path.is_dir() and not any((folder / "config.json").is_file() for folder in places):
        raise FolderError(
            f"{path} holds no model: expected {INDEX}, a run's model/, or the config.json of an autoencoder"
        )
    return find_autoencoder(path)


def read_file(
    file: Path, variant: str | None = None, weights: str | None = None, tokenizer: str | None = None, **hints: Any
) -> Bundle:  # fmt: skip
    """The model of a single file in CompVis' layout.

    Args:
        variant: must be None; it is an option for folders.
        weights: `ema` or `raw` weights of the U-Net; None: EMA if the file has it.
        tokenizer: a folder or hub name, for a file without a tokenizer.
        hints: fields of ``Hints``.

    Raises:
        FolderError, ConfigError: as ``from_compvis``; or an option that does not apply to this
            file.
    """
    if variant is not None:
        raise ConfigError(f"variant {variant} is for folders, and {file} is a single file")
    check_names(hints, [field.name for field in fields(Hints)])
    hinted = Hints(**hints) if hints else None
    archive = open_archive(file)
    tensors = _known_kind(file, archive)
    bundle = from_compvis(tensors, archive.metadata, weights, hinted)
    if tokenizer is not None:
        bundle = replace(bundle, tokenizer=_tokenizer(file, bundle, tokenizer))
    parts = {name: replace(part, files=archive.files) for name, part in bundle.parts.items()}
    return replace(bundle, parts=parts, layout=f"a single file of CompVis' layout ({file.suffix})")


def _known_kind(file: Path, archive: Archive) -> dict[str, Tensor]:
    """The tensors of a file by their names in CompVis' code.

    Raises ConfigError for a LoRA, FolderError for another kind of model.
    """
    tensors = spelled(archive.tensors)
    if is_lora(tensors):
        raise ConfigError(f"{file} is a LoRA, not a model: {_WHAT_FOR}")
    if KEY not in archive.metadata and (kind := other_kind(tensors)) is not None:
        raise FolderError(f"{file} is {kind}: {OPENED}")
    return tensors


def _tokenizer(file: Path, bundle: Bundle, name: str) -> dict[str, bytes]:
    """The tokenizer called ``name``, for a file without one. Raises ConfigError or FolderError."""
    if TEXT not in bundle.parts or bundle.tokenizer:
        raise ConfigError(
            f"tokenizer: {file} {'holds its own' if bundle.tokenizer else 'has no text encoder'}: leave it out"
        )
    folder = find_or_fetch(name)
    files = read_tokenizer_files(folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder)
    if bundle.parts[TEXT].config.get("hidden_act") == "gelu":
        from ldm.models.text import padded_with  # transformers takes seconds to import

        try:
            return padded_with(files, OPENCLIP_PAD)
        except ValueError as error:
            raise FolderError(f"{folder}: {error}") from None
    return files


def read_autoencoder(path: str | Path) -> Part:
    """The autoencoder of a run, folder or single file. Raises FolderError or ConfigError."""
    if not Path(path).is_file():
        return read_part(find_autoencoder(path), VAE)[0]
    bundle = read_file(Path(path))
    if VAE not in bundle.parts:
        raise ConfigError(f"{path} holds no autoencoder")
    return bundle.parts[VAE]


def read_text_part(name: str) -> tuple[Part, dict[str, bytes]]:
    """A text encoder and the files of its tokenizer. Raises FolderError or ConfigError.

    ``name``: a run, a model folder or file, or a CLIP of transformers as a folder or hub name.
    """
    path = Path(name)
    if path.is_file():
        bundle = read_file(path)
        if TEXT not in bundle.parts:
            raise FolderError(f"{path} has no text encoder")
        return bundle.parts[TEXT], dict(bundle.tokenizer)
    folder = path / "model" if (path / "model/text_encoder").is_dir() else find_or_fetch(name)
    split = (folder / "text_encoder").is_dir()
    part, _ = read_part(folder / "text_encoder" if split else folder, TEXT)
    tower = {key: tensor for key, tensor in part.tensors.items() if not key.startswith(_OTHERS)}
    config, inner = part.config, part.config.get("text_config")
    if config.get("model_type") == "clip" and isinstance(inner, Mapping):
        config = {**inner, "model_type": "clip_text_model"}
    return replace(part, config=config, tensors=tower), read_tokenizer_files(folder / "tokenizer" if split else folder)
