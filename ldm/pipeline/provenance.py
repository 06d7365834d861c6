"""Provenance of a picture: everything that determines its pixels, kept in the PNG.

`ldm sample` writes it under ``ldm`` as one JSON object; `ldm reproduce` reads it back.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from autoencoder.layout import from_diffusers as autoencoder_from_diffusers
from autoencoder.layout import latent_scale
from ldm import __version__
from ldm.config import NULL_CAPTION, ConfigError, SampleConfig
from ldm.config.values import changed
from ldm.errors import FolderError
from ldm.files.disk import check_regular, file_hash
from ldm.interop.bundle import TEXT, UNET, VAE
from ldm.interop.classifier import read_classifier
from ldm.interop.lora import find_lora
from ldm.pipeline.codec import joined_hash
from ldm.pipeline.info import ModelInfo

KEY = "ldm"
# keys of a text encoder's config.json that decide no pixel
_PASSING = ("_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype")
_SETTINGS = tuple(f.name for f in dataclasses.fields(SampleConfig))
_WORK = ("images", "batch_size", "processes")
_NAMED, _TABLES = ("path", "variant", "vae", "text", "image", "mask"), ("parts", "others", "drawn")


@dataclass(frozen=True)
class Provenance:
    """Provenance of a picture, or of a grid of several.

    Attributes:
        prompts: a caption for each image; of a grid its images are the first of the seed.
        index: number of the image within the seed; None: a grid.
        model: ``Pipeline.hash``.
        path, variant: where the model was, as it was named, and which of its weights.
        size: side in pixels, or height and width.
        vae, text: the autoencoder and the text encoder that were named in the place of the model's own.
        image, mask: the files that the images start from.
        values: of the model's conditions, for each prompt; empty: none were given.
        parts: a hash of each thing of the model that decides pixels and is not a weight.
        others: a hash of each LoRA, guide and given image, by the name that the settings or the call give it.
        drawn: versions, device, and how the images were shared out; these change a pixel by at most
            1 of 255.
    """

    prompts: tuple[str, ...]
    index: int | None
    settings: SampleConfig
    size: int | tuple[int, int]
    model: str
    path: str | None = None
    variant: str | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)
    drawn: Mapping[str, Any] = field(default_factory=dict)
    vae: str | None = None
    text: str | None = None
    image: str | None = None
    mask: str | None = None
    values: tuple[Mapping[str, Any], ...] = ()

    @property
    def given(self) -> dict[str, Any]:
        """Those of ``vae`` and ``text`` that were named."""
        return self._named("vae", "text")

    @property
    def start(self) -> dict[str, Any]:
        """Those of ``image`` and ``mask`` that were given."""
        return self._named("image", "mask")

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of an image."""
        return self.settings.canvas((self.size, self.size) if isinstance(self.size, int) else self.size)

    def _named(self, *names: str) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def numbers(self) -> tuple[int, ...]:
        """The number of each image within the seed."""
        return tuple(range(len(self.prompts))) if self.index is None else (self.index,)

    def batches(self) -> list[range]:
        """Numbers of the images of each batch that holds one of these; empty where it is not recorded."""
        if not all(name in self.drawn for name in _WORK):
            return []
        images, size, processes = (self.drawn[name] for name in _WORK)
        if self.index is not None:
            mine, place = range(self.index % processes, images, processes), self.index // processes
            return [mine[place - place % size :][:size]]
        shares = [range(rank, images, processes) for rank in range(min(processes, images))]
        return [mine[start : start + size] for mine in shares for start in range(0, len(mine), size)]

    def png(self) -> PngInfo:
        """The metadata of a PNG, for Pillow's ``pnginfo``."""
        about: dict[str, Any] = {"prompts": self.prompts}
        if self.index is not None:
            about = {"prompt": self.prompts[0], "index": self.index}
        rest = {name: getattr(self, name) for name in ("size", "model", "path", "variant", "parts", "others", "drawn")}
        values = {**about, **dataclasses.asdict(self.settings), **rest, **self.given, **self.start}
        if self.values:
            values["values"] = self.values
        info = PngInfo()
        info.add_itxt(KEY, json.dumps(values, ensure_ascii=False))
        return info


def surroundings(device: torch.device) -> dict[str, Any]:
    """Versions, device and threads, which may move a pixel by 1 of 255."""
    cuda = device.type == "cuda"
    return {
        "ldm": __version__,
        "torch": torch.__version__,
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": None if cuda else torch.get_num_threads(),
    }


def read_provenance(file: str | Path) -> tuple[Provenance, UInt8[np.ndarray, "h w *c"]]:
    """The provenance in a PNG, and its pixels. Raises ConfigError for one that `ldm sample` did not write."""
    try:
        check_regular(Path(file))
        with Image.open(file, formats=["PNG"]) as picture:
            picture.load()
            text, pixels = picture.info.get(KEY), np.array(picture)
    except FileNotFoundError:
        raise ConfigError(f"no picture {file}") from None
    except Image.UnidentifiedImageError:
        raise ConfigError(f"{file} is not a PNG") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    if text is None:
        raise ConfigError(
            f"{file} holds no settings: name a PNG as `ldm sample` wrote it, not one that another program saved again"
        )
    try:
        return _parsed(json.loads(text)), pixels
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ConfigError(f"{file}: its settings are damaged, of another command or of a newer ldm: {what}") from None


def _parsed(about: Any) -> Provenance:
    """Provenance from JSON. Settings that an older ldm lacks have their defaults, which draw as it did."""
    if not isinstance(about, dict) or "model" not in about or not {"prompt", "prompts"} & about.keys():
        raise ValueError("they are not settings of `ldm sample`")
    values: dict[str, Any] = {name: about.pop(name) for name in _SETTINGS if name in about}
    settings = changed(SampleConfig(), values)
    prompts = tuple(about.pop("prompts")) if "prompts" in about else (about.pop("prompt"),)
    index, size, model = about.pop("index", None), about.pop("size"), about.pop("model")
    rest = {name: about.pop(name) for name in (*_NAMED, *_TABLES) if name in about}
    rest["values"] = tuple(about.pop("values", ()))
    if len(rest["values"]) not in (0, len(prompts)) or not all(isinstance(one, dict) for one in rest["values"]):
        raise ValueError("values must be an object for each prompt")
    if about:
        raise ValueError(f"unknown: {', '.join(about)}")
    if wrong := [name for name in _NAMED if not isinstance(rest.get(name), (str, NoneType))]:
        raise ValueError(f"{wrong[0]} must be text")
    tables = [rest.get(name, {}) for name in _TABLES]
    hashes = [value for table in tables[:2] if isinstance(table, dict) for value in table.values()]
    texts = [model, *hashes, *prompts]
    if not all(isinstance(table, dict) for table in tables) or not all(isinstance(text, str) for text in texts):
        raise ValueError("parts, others and drawn must be objects, hashes and prompts text")
    sides = [size, size] if isinstance(size, int) else size
    counts = [*(sides if isinstance(sides, list) else [None]), *(rest.get("drawn", {}).get(name, 1) for name in _WORK)]
    if not prompts or not all(isinstance(n, int) and n >= 1 for n in counts) or len(sides) != 2:
        raise ValueError("size and the counts must be whole numbers, with a prompt at least")
    if index is not None:
        images = rest.get("drawn", {}).get("images", float("inf"))
        if not isinstance(index, int) or not 0 <= index < images:
            raise ValueError(f"there is no image {index} among them")
    return Provenance(prompts, index, settings, size if isinstance(size, int) else tuple(size), model, **rest)


def part_hashes(info: ModelInfo) -> dict[str, str]:
    """A hash of each thing of a model that decides pixels and lies in no file of weights."""
    unet = info.unet
    about: dict[str, Any] = {
        UNET: [dataclasses.asdict(unet.config), unet.in_channels, unet.out_channels, unet.context_dim],
        "process": [dataclasses.asdict(info.schedule), info.target],
        "null_caption": info.extra.get("null_caption", NULL_CAPTION),
    }
    if info.conditioner is not None:
        about["conditions"] = info.conditioner.to_dict()
    if info.autoencoder is not None:
        about[VAE] = [dataclasses.asdict(autoencoder_from_diffusers(info.autoencoder)), *latent_scale(info.autoencoder)]
    if info.has_text:
        about[TEXT] = {key: value for key, value in info.bundle.parts[TEXT].config.items() if key not in _PASSING}
        about["tokenizer"] = {name: sha256(content).hexdigest() for name, content in info.bundle.tokenizer.items()}
    return {name: _hash(value) for name, value in about.items()}


def other_hashes(settings: SampleConfig, start: Iterable[str] = ()) -> dict[str, str]:
    """A hash of each LoRA and guide that settings name, and of the files ``start``.

    Raises FolderError or ConfigError.
    """
    found = {path: file_hash(find_lora(path)) for path, _ in settings.loras()}
    for path in start:
        try:
            found[path] = file_hash(Path(path))
        except OSError as error:
            raise FolderError(f"{path} cannot be read: {error.strerror}") from None
    if settings.classifier is not None:
        weights = read_classifier(settings.classifier)[1]
        found[settings.classifier] = joined_hash((weights, weights.with_name("config.json")))
    if settings.autoguidance is not None:
        info = ModelInfo.read(settings.autoguidance)
        lora = [find_lora(info.lora.folder)] if info.lora is not None else []
        found[settings.autoguidance] = _hash([joined_hash((*info.bundle.files, *lora)), part_hashes(info)])
    return found


def _hash(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
