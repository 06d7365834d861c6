"""Tensors of a CompVis single file that no network uses: why, and checked where possible."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from autoencoder.layout import latent_scale
from ldm.diffusion.schedule import Schedule
from ldm.errors import FolderError
from ldm.interop.bundle import VAE
from ldm.interop.compvis.header import Header
from ldm.interop.compvis.names import Slot, unused_slots
from ldm.interop.compvis.schedule import check_buffers
from ldm.interop.compvis.shapes import nearest, one_line
from ldm.interop.diffusers.schedulers import scheduler_from_diffusers

PUBLISHED_SCALE = 0.18215  # latent scale of kl-f8 with 4 channels, Stable Diffusion 1 and 2
OPENCLIP_PREFIX = "cond_stage_model.model."
EMA_PREFIX = "model_ema."
SCALE = "scale_factor"
HARMLESS = {  # a pattern of a name → why no network uses it
    r"model_ema\.(decay|num_updates)": "a counter of the EMA",
    r"(first_stage_model\.)?loss\..+": "the loss that the autoencoder was trained with",
    r"(.+\.)?position_ids": "the numbers 0, 1, … of the positions",
    r"cond_stage_model\.(model\.|transformer\.)?(text_projection(\.weight)?|logit_scale)": "for CLIP's loss alone",
}

Places = Mapping[str, Mapping[str, Slot]]  # part → full name in the file → slot


def choose_weights(
    tensors: Mapping[str, Tensor], slots: Mapping[str, Slot], weights: str | None
) -> tuple[dict[str, str], dict[str, str]]:
    """Choose between the raw weights of the U-Net and their EMA.

    Returns the EMA copy to use for each name (empty: use the raw weights), and the unused names
    with the reason. Raises FolderError if EMA copies are wanted and one is missing or has another
    shape.
    """
    copies = {place: EMA_PREFIX + place.removeprefix("model.").replace(".", "") for place in slots}
    held = [name for name in copies.values() if name in tensors]
    if weights == "ema" and not held:
        raise FolderError("the file holds no EMA of a U-Net: leave weights out, or use raw")
    if weights == "raw" or not held:
        return {}, dict.fromkeys(held, "the EMA of the U-Net: the raw weights were used")
    for place, copy in copies.items():
        if copy not in tensors:
            raise FolderError(
                f"tensor {copy} is missing: the EMA has no copy of {place} (weights: raw uses none of them)"
            )
        if tuple(tensors[copy].shape) != slots[place].shape:
            raise FolderError(
                f"tensor {copy} is {list(tensors[copy].shape)}, its configuration says {list(slots[place].shape)}"
            )
    return copies, dict.fromkeys(copies, "the raw weights of the U-Net: their EMA was used")


def check_process(tensors: Mapping[str, Tensor], header: Header) -> dict[str, str]:
    """Compare the schedule's tables and the latent scale in the file with the configuration.

    Returns their names with the reason why they are unused. Raises FolderError.
    """
    unused = {}
    if header.scheduler is not None:
        unused = check_buffers(tensors, *process_of(header.scheduler))
    if VAE in header.configs and (given := given_scale(tensors)) is not None:
        scale = latent_scale(header.configs[VAE])[0]
        rounding = torch.finfo(tensors[SCALE].dtype).eps
        if not abs(given - scale) <= rounding * abs(scale):
            raise FolderError(f"tensor {SCALE} is {given:.6g}, the configuration of the autoencoder says {scale:.6g}")
        unused[SCALE] = "the latent scale, which is in the autoencoder's configuration"
    return unused


def process_of(scheduler: Mapping[str, Any]) -> tuple[Schedule, str]:
    """The schedule and target of a scheduler_config.json.

    Raises ConfigError, or FolderError if it is unreadable.
    """
    try:
        config, target = scheduler_from_diffusers(scheduler)
        return Schedule.from_config(config), target
    except (TypeError, AttributeError) as error:
        raise FolderError(f"the configuration of the scheduler cannot be read: {one_line(error)}") from None


def given_scale(tensors: Mapping[str, Tensor]) -> float | None:
    """The latent scale that the file holds as a tensor, or None. Raises FolderError."""
    if SCALE not in tensors:
        return None
    if tensors[SCALE].numel() != 1 or not tensors[SCALE].is_floating_point() or not float(tensors[SCALE]) > 0:
        raise FolderError(f"tensor {SCALE} should be one floating-point number above 0")
    return float(tensors[SCALE])


def unused_block(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, str]:
    """The tensors of OpenCLIP's last block, if present, with the reason why they are unused."""
    names = [OPENCLIP_PREFIX + slot.name for slot in unused_slots(config)]
    return {name: "OpenCLIP's last block: the states before it are used" for name in names if name in tensors}


def check_known(tensors: Mapping[str, Tensor], expected: Collection[str], unused: dict[str, str]) -> None:
    """Add harmless tensors to ``unused``.

    Raises FolderError for the first tensor that is neither expected nor known.
    """
    for name in tensors:
        if name in expected or name in unused:
            continue
        reason = next((reason for pattern, reason in HARMLESS.items() if re.fullmatch(pattern, name)), None)
        if reason is None:
            raise FolderError(f"tensor {name} belongs to no part of the model" + nearest(name, expected))
        unused[name] = reason
