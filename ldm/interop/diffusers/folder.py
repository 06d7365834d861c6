"""Read and write a diffusers pipeline folder: `model_index.json` and a sub-folder for each part."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from ldm.config import ConfigError
from ldm.config.values import shown
from ldm.errors import FolderError
from ldm.files.json import read_json, write_json
from ldm.files.tensors.archive import find_weights, open_archive, write_tensors
from ldm.interop.bundle import TEXT, UNET, VAE, Bundle, Part
from ldm.interop.diffusers import index as layout
from ldm.interop.diffusers.lora_folder import REFERENCE, Reference
from ldm.interop.intact import check_writable, read_extra, write_hashes, written_hashes
from ldm.interop.sizes import check_sizes

WEIGHTS = "diffusion_pytorch_model.safetensors"
FILES = {UNET: WEIGHTS, VAE: WEIGHTS, TEXT: "model.safetensors"}
INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
# Names of the autoencoder's attention before diffusers 0.17, as in the published Stable Diffusion folders.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_UNUSED = {  # tensors of a text encoder → why they are unused
    "text_model.embeddings.position_ids": "0, 1, 2 …: nothing learned",
    "text_projection.weight": "the U-Net takes states, not their projection",
}


def find_model(path: str | Path) -> Path:
    """The model folder of a run directory, or the folder itself; also that of a LoRA.

    Raises FolderError that says what is there instead.
    """
    path = Path(path)
    for folder in (path, path / "model"):
        if (folder / INDEX).is_file() or (folder / REFERENCE).is_file():
            return folder
    if not path.exists():
        raise FolderError(f"no run or model folder {path}")
    if (path / "config.yaml").is_file():
        raise FolderError(
            f"{path} is a run without a diffusion model yet: train one with `ldm train-ldm`, or let it finish"
        )
    raise FolderError(f"{path} holds no model_index.json, neither directly nor in model/")


def find_autoencoder(path: str | Path) -> Path:
    """The folder with an autoencoder's config.json in a run or model folder, or the folder itself.

    Raises FolderError.
    """
    path = Path(path)
    for folder in (path, path / "model"):
        if (reference := Reference.read(folder)) is not None:
            path = reference.base
    for folder in (path / "model/vae", path / "vae", path):
        if (folder / "config.json").is_file():
            return folder
    if not path.exists():
        raise FolderError(
            f"no autoencoder {path}: train one with `ldm train-autoencoder`, or name a folder that holds one"
        )
    raise FolderError(f"{path} holds no autoencoder, neither in model/vae nor in vae/: let its training finish")


def read_folder(folder: Path, variant: str | None = None, without: Collection[str] = ()) -> Bundle:
    """The model in a pipeline folder; weights are not read.

    A part in the index whose folder is missing is left out; ``complete.lacking`` reports it.

    Args:
        variant: fp16, non_ema …; the U-Net must have it, other parts are read without it if they
            lack it.
        without: parts to skip.

    Raises:
        FolderError, ConfigError.
    """
    index = read_json(folder / INDEX)
    if (kind := index.get("_class_name")) not in layout.PIPELINES:
        name = kind if isinstance(kind, str) else shown(kind)
        raise ConfigError(f"{folder}: a {name} cannot be opened, only {', '.join(layout.PIPELINES)}")
    named = [name for name, entry in index.items() if _names_class(folder / INDEX, name, entry)]
    unused = {
        f"{name}/": "not used by this pipeline"
        for name in named
        if name not in (UNET, VAE, TEXT, "scheduler", "tokenizer")
    }
    parts = {}
    for name in (UNET, VAE, TEXT):
        place = folder / name
        if name == UNET or (name in named and name not in without and place.exists()):
            has_variant = name == UNET or any(f".{variant}" in file.name for file in place.glob("*"))
            parts[name], tensors = read_part(place, name, variant if has_variant else None)
            unused |= {f"{name}/{tensor}": why for tensor, why in tensors.items()}
    return Bundle(
        parts,
        scheduler=read_json(folder / SCHEDULER),
        tokenizer=read_tokenizer_files(folder / "tokenizer") if TEXT in parts else {},
        extra=read_extra(folder),
        unused=unused,
        layout=f"a folder of a {kind}",
        kind=kind,
    )


def _names_class(file: Path, name: str, entry: Any) -> bool:
    """True if an entry of the index names a sub-folder.

    Raises FolderError for a malformed entry of a part.
    """
    pair = isinstance(entry, list) and len(entry) == 2
    if pair and all(isinstance(one, str) for one in entry):
        return True
    if name in (UNET, VAE, TEXT, "scheduler", "tokenizer") and not (pair and entry == [None, None]):
        raise FolderError(f"{file}: {name} should be a library and a class, or two nulls, and is {shown(entry)}")
    return False


def read_part(folder: Path, name: str, variant: str | None = None) -> tuple[Part, dict[str, str]]:
    """One sub-folder (config.json and weights), and its unused tensors with the reason.

    Raises FolderError.
    """
    config = read_json(folder / "config.json")
    archive = open_archive(find_weights(folder, FILES[name].removesuffix(".safetensors"), variant))
    tensors = {current_name(name, key): tensor for key, tensor in archive.tensors.items()}
    unused = {key: why for key, why in _UNUSED.items() if name == TEXT and tensors.pop(key, None) is not None}
    check_sizes(name, config, tensors, str(folder / "config.json"))
    hashes = written_hashes(folder)
    if variant is not None and not any(file.name in hashes for file in archive.files):
        hashes = {}  # a variant that was added after the folder was written
    return Part(config, tensors, archive.files, hashes), unused


def write_folder(bundle: Bundle, folder: Path, max_shard_bytes: int | None = None) -> tuple[Path, ...]:
    """Write all parts, `model_index.json` last, so that a folder that has it is complete.

    Returns the weight files.

    Raises FolderError, or ConfigError for a bundle that is not a whole model.
    """
    if UNET not in bundle.parts or bundle.scheduler is None:
        raise ConfigError(
            "a pipeline folder needs a U-Net and a scheduler: write an autoencoder alone to a folder of its own"
        )
    check_writable(bundle)
    index = layout.model_index(bundle)
    (folder / INDEX).unlink(missing_ok=True)
    files: list[Path] = []
    for name, part in bundle.parts.items():
        files += write_part(part, folder / name, name, max_shard_bytes)
    for file, content in bundle.tokenizer.items():
        (folder / "tokenizer").mkdir(exist_ok=True)
        (folder / "tokenizer" / file).write_bytes(content)
    write_json(folder / SCHEDULER, dict(bundle.scheduler))
    if bundle.extra:
        write_hashes(folder, files, bundle.extra)
    write_json(folder / INDEX, index)
    return tuple(files)


def write_part(part: Part, folder: Path, name: str, max_shard_bytes: int | None = None) -> tuple[Path, ...]:
    """Write one sub-folder; returns its weight files. Raises FolderError."""
    written = write_tensors(folder / FILES[name], part.tensors, max_shard_bytes=max_shard_bytes)
    write_json(folder / "config.json", dict(part.config))
    return open_archive(written).files


def current_name(part: str, key: str) -> str:
    """A tensor's current name: for old autoencoders' attention, text towers without prefix."""
    if part == VAE and ".attentions." in key:
        for old, new in _OLD_ATTENTION.items():
            if f".{old}." in key:
                return key.replace(f".{old}.", f".{new}.", 1)
    if part == TEXT and key.startswith(("embeddings.", "encoder.", "final_layer_norm.")):  # transformers 5
        return f"text_model.{key}"
    return key


def read_tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The files of a tokenizer by name. Raises FolderError if they are not there."""
    try:
        files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    except OSError as error:
        raise FolderError(f"{folder}: its tokenizer cannot be read: {error.strerror}") from None
    if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files.keys():
        half = "".join(f" ({name} alone is half of one)" for name in ("vocab.json", "merges.txt") if name in files)
        raise FolderError(f"{folder} holds no tokenizer: expected tokenizer.json, or vocab.json and merges.txt{half}")
    return files
