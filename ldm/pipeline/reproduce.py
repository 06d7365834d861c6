"""Draws a picture again from the settings in its PNG, and names what may keep it from being the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ldm.config import ConfigError
from ldm.data.transforms import GAP, grid, to_pil, to_uint8
from ldm.errors import FolderError
from ldm.pipeline import Pipeline
from ldm.pipeline.info import ModelInfo
from ldm.pipeline.provenance import Provenance, other_hashes, part_hashes

PROMISED = 1  # of 255: another batch size, device or version may change a pixel so far, by the order of sums
_NAMES = {
    "unet": "U-Net's settings",
    "vae": "autoencoder's settings",
    "text_encoder": "text encoder's settings",
    "null_caption": "null caption",
}


def relocated(origin: Provenance, moved: Mapping[str, str]) -> Provenance:
    """``origin`` with the LoRAs, guides and images where they are now.

    Raises ConfigError for a name that it does not have.
    """
    settings = origin.settings
    named = {path for path, _ in settings.loras()} | {settings.classifier, settings.autoguidance}
    named |= set(origin.start.values())
    if unknown := sorted(moved.keys() - named):
        names = ", ".join(sorted(name for name in named if name)) or "no LoRA, no guide and no image"
        raise ConfigError(f"--moved {unknown[0]}: the picture names {names}")
    lora = tuple(f"{moved.get(path, path)}:{scale!r}" for path, scale in settings.loras())
    given = {name: getattr(settings, name) for name in ("classifier", "autoguidance")}
    guides = {name: moved.get(path, path) for name, path in given.items() if path is not None}
    others = {moved.get(name, name): value for name, value in origin.others.items()}
    start = {name: moved.get(path, path) for name, path in origin.start.items()}
    settings = dataclasses.replace(settings, lora=lora, **guides)
    return dataclasses.replace(origin, settings=settings, others=others, **start)


def check_model(origin: Provenance, pipe: Pipeline, info: ModelInfo, file: Path) -> None:
    """Raise FolderError unless the model, the LoRAs, the guides and the images are those that drew ``file``."""
    if pipe.hash != origin.model:
        raise FolderError(
            f"{info.path} has other weights than those that drew {file}"
            f" (sha256 {pipe.hash[:12]}, then {origin.model[:12]}): name the model with --model"
        )
    now = part_hashes(info)
    if changed := _changed(origin.parts, now):
        names = ", ".join(_NAMES.get(name, name) for name in changed)
        raise FolderError(f"{info.path} has the weights that drew {file}, but has changed since: {names}")
    now = other_hashes(origin.settings, origin.start.values())
    if changed := _changed(origin.others, now):
        then, here = origin.others.get(changed[0], "nothing")[:12], now.get(changed[0], "nothing")[:12]
        raise FolderError(
            f"{changed[0]} has changed since it helped to draw {file} (sha256 {here}, then {then}): bring it back"
        )


def _changed(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names whose hashes differ; none where nothing was recorded."""
    return [name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)] if then else []


def redraw(pipe: Pipeline, origin: Provenance, width: int, together: bool) -> UInt8[np.ndarray, "h w *c"]:
    """The pixels of the picture, or of the grid ``width`` pixels wide.

    ``together``: in batches of the recorded shape, where there is one, with its own caption in the
    places of others, whose captions a PNG does not hold; otherwise each image alone.
    """
    captions = dict(zip(origin.numbers, origin.prompts, strict=True))
    values = dict(zip(origin.numbers, origin.values, strict=False))
    alone = [range(i, i + 1) for i in origin.numbers]
    batches = (origin.batches() if together else alone) or alone
    images: dict[int, np.ndarray] = {}
    for numbers in batches:
        prompts = [captions.get(i, origin.prompts[0]) for i in numbers]
        how: dict[str, Any] = {"size": origin.size, "batch_size": len(numbers), "indices": numbers, **origin.start}
        if values:
            how["values"] = [values.get(i, origin.values[0]) for i in numbers]
        (drawn,) = pipe.sample(prompts, origin.settings, **how)
        images |= {i: image for i, image in zip(numbers, to_uint8(drawn), strict=True) if i in captions}
    stack = np.stack([images[i] for i in origin.numbers])
    if origin.index is not None:
        return np.asarray(to_pil(stack)[0])
    return grid(stack, max(1, (width + GAP) // (origin.sides[1] + GAP)))


def deviation(a: UInt8[np.ndarray, "h w *c"], b: UInt8[np.ndarray, "h2 w2 *c2"]) -> tuple[int, int]:
    """Number of pixels that differ, and the largest difference, of 255. Raises ValueError for two shapes."""
    if a.shape != b.shape:
        raise ValueError(f"it is {_shape(a)} and is drawn as {_shape(b)}")
    difference = np.abs(a.astype(int) - b.astype(int)).reshape(*a.shape[:2], -1).max(axis=2)
    return int((difference > 0).sum()), int(difference.max())


def elsewhere(origin: Provenance, here: Mapping[str, Any]) -> list[str]:
    """Lines naming the versions and devices that differ from those that drew the picture."""
    if not origin.drawn:
        return ["drawn by an ldm that recorded neither versions nor device"]
    names = {"device_name": "device"}
    then = {name: origin.drawn.get(name) for name in here}
    skipped = ("device_name", "threads") if then.get("device") != here["device"] else ()
    rows = [name for name in here if name not in skipped and then[name] != here[name]]
    return [f"drawn with {names.get(name, name)} {then[name]}, here {here[name]}" for name in rows]


def _shape(pixels: UInt8[np.ndarray, "h w *c"]) -> str:
    return f"{pixels.shape[1]}×{pixels.shape[0]} pixels of {pixels.shape[2] if pixels.ndim == 3 else 1} channels"
