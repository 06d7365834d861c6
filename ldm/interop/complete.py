"""Completeness of a model: the autoencoder and text encoder that fit its U-Net."""

from __future__ import annotations

from pathlib import Path

from autoencoder.layout import from_diffusers as autoencoder_from_diffusers
from ldm.errors import FolderError
from ldm.interop.bundle import TEXT, UNET, VAE, Bundle
from ldm.interop.diffusers.index import OUR_PIPELINE
from ldm.interop.diffusers.unet import sample_side, unet_from_diffusers
from ldm.interop.intact import HASHES

PIXELS = (1, 3)  # channels of images
OPTIONS = {VAE: "vae", TEXT: "text"}
NAMES = {VAE: "autoencoder", TEXT: "text encoder"}


def lacking(bundle: Bundle) -> dict[str, str]:
    """Missing parts of a model with a U-Net, each with the evidence that it belongs to the model.

    Raises ConfigError.
    """
    if UNET not in bundle.parts:
        return {}
    unet = unet_from_diffusers(bundle.parts[UNET].config)
    channels, context = unet.in_channels, unet.context_dim
    hashed = {str(name).split("/")[0] for name in bundle.extra.get(HASHES, {})}
    side, size = sample_side(bundle.parts[UNET].config), bundle.extra.get("sample_size") or 0
    signs = {
        VAE: {
            f"every {bundle.kind} has one": bundle.kind not in ("", OUR_PIPELINE),
            "ldm.json has the hash of one": VAE in hashed,
            f"its U-Net predicts {channels} channels, and images have 1 or 3": channels not in PIXELS,
            f"its images have {size} pixels a side and its U-Net takes {side}": bool(size) and size != side,
        },
        TEXT: {f"its U-Net takes the states of one, of width {context}": context is not None},
    }
    found = {
        part: next((sign for sign, holds in signs[part].items() if holds), None)
        for part in signs
        if part not in bundle.parts
    }
    return {part: sign for part, sign in found.items() if sign is not None}


def check_complete(bundle: Bundle, where: str | Path) -> None:
    """Raise FolderError for a part that is missing or does not fit the U-Net."""
    for part, sign in lacking(bundle).items():
        option = OPTIONS[part]
        raise FolderError(
            f"{where} has no {NAMES[part]}, but {sign}: bring it back,"
            f" or name one by --{option} PATH ({option}= in Python)"
        )
    if UNET not in bundle.parts:
        return
    unet = unet_from_diffusers(bundle.parts[UNET].config)
    channels, context = unet.in_channels, unet.context_dim
    latent = autoencoder_from_diffusers(bundle.parts[VAE].config).latent_channels if VAE in bundle.parts else channels
    if latent != channels:
        raise FolderError(
            f"{where}: the autoencoder's latents have {latent} channels, and the U-Net predicts {channels}:"
            " they do not belong to one model"
        )
    if TEXT not in bundle.parts:
        return
    if context is None:
        raise FolderError(
            f"{where}: there is a text encoder, and the U-Net takes no caption: they do not belong to one model"
        )

    # A whole CLIP's config.json nests the settings of its text half.
    tower = bundle.parts[TEXT].config
    inner = tower.get("text_config")
    width = (inner if isinstance(inner, dict) else tower).get("hidden_size")
    if type(width) is int and width != context:
        raise FolderError(
            f"{where}: the text encoder's states have width {width}, and the U-Net takes {context}:"
            " they do not belong to one model"
        )
