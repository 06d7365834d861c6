"""`model_index.json` of a diffusers pipeline folder: which class reads which part, and what no class of theirs can express.

Parameter names need no translation: our networks use the names found there. Nothing is imported from diffusers.
"""

from __future__ import annotations

from typing import Any

from ldm.interop.bundle import TEXT, UNET, VAE, Bundle
from ldm.interop.diffusers.scheduler_keys import class_name
from ldm.interop.diffusers.schedulers import OUR_SCHEDULER, scheduler_from_diffusers
from ldm.interop.diffusers.unet import DIFFUSERS_VERSION, THEIR_UNET, unet_from_diffusers

OUR_PIPELINE = "LatentDiffusionPipeline"  # the class name of what none of theirs can express
THEIR_PIPELINE = "StableDiffusionPipeline"
INPAINTING = "StableDiffusionInpaintPipeline"  # a mask and the latent of the masked image as further channels
PIPELINES = (OUR_PIPELINE, THEIR_PIPELINE, INPAINTING, "StableDiffusionImg2ImgPipeline")


def ours_alone(bundle: Bundle) -> str | None:
    """The part of a model that diffusers' text-to-image (or inpainting) pipeline cannot express, or None."""
    unet = unet_from_diffusers(bundle.parts[UNET].config)
    target = scheduler_from_diffusers(bundle.scheduler or {})[1]
    reasons = {
        "without autoencoder (a pixel model)": VAE not in bundle.parts,
        "without text encoder (an unconditional model)": TEXT not in bundle.parts,
        "with a vector, label or concatenated condition": unet.config.class_embedded
        or unet.config.concat_channels not in (0, unet.in_channels + 1),
        "with a learned variance": unet.learned_variance,
        "with a score target": target == "score",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def model_index(bundle: Bundle) -> dict[str, Any]:
    """`model_index.json`: which class reads which sub-folder; our own class name for what none of theirs can express."""
    nothing = [None, None]
    concat = unet_from_diffusers(bundle.parts[UNET].config).config.concat_channels
    scheduler = class_name(bundle.scheduler or {})
    return {
        "_class_name": OUR_PIPELINE if ours_alone(bundle) else INPAINTING if concat else THEIR_PIPELINE,
        "_diffusers_version": DIFFUSERS_VERSION,
        "feature_extractor": nothing,
        "image_encoder": nothing,
        "requires_safety_checker": False,
        "safety_checker": nothing,
        "scheduler": ["ldm" if scheduler == OUR_SCHEDULER else "diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"] if TEXT in bundle.parts else nothing,
        "tokenizer": ["transformers", "CLIPTokenizer"] if TEXT in bundle.parts else nothing,
        "unet": ["diffusers", THEIR_UNET],
        "vae": ["diffusers", "AutoencoderKL"] if VAE in bundle.parts else nothing,
    }
