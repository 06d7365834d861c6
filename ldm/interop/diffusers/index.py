"""`model_index.json` of a diffusers pipeline folder: the class of each part.

Parameter names need no translation: our networks use diffusers' names. Nothing is imported from
diffusers.
"""

from __future__ import annotations

from typing import Any

from ldm.interop.bundle import TEXT, UNET, VAE, Bundle
from ldm.interop.diffusers.scheduler_keys import class_name
from ldm.interop.diffusers.schedulers import OUR_SCHEDULER, OWN_TARGETS, scheduler_from_diffusers
from ldm.interop.diffusers.unet import DIFFUSERS_UNET, DIFFUSERS_VERSION, unet_from_diffusers

OUR_PIPELINE = "LatentDiffusionPipeline"  # the class name of models that diffusers cannot express
DIFFUSERS_PIPELINE = "StableDiffusionPipeline"
INPAINTING = "StableDiffusionInpaintPipeline"  # a mask and the masked image's latent as additional channels
PIPELINES = (OUR_PIPELINE, DIFFUSERS_PIPELINE, INPAINTING, "StableDiffusionImg2ImgPipeline")


def ours_alone(bundle: Bundle) -> str | None:
    """The property of a model that diffusers' pipelines cannot express, or None."""
    unet = unet_from_diffusers(bundle.parts[UNET].config)
    target = scheduler_from_diffusers(bundle.scheduler or {})[1]
    reasons = {
        "without autoencoder (a pixel model)": VAE not in bundle.parts,
        "without text encoder (an unconditional model)": TEXT not in bundle.parts,
        "with a vector, label or concatenated condition": unet.config.class_embedded
        or unet.config.concat_channels not in (0, unet.in_channels + 1),
        "with a learned variance": unet.learned_variance,
        f"with a {target} target": target in OWN_TARGETS,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def model_index(bundle: Bundle) -> dict[str, Any]:
    """`model_index.json`: the class of each sub-folder, ours where diffusers has none."""
    nothing = [None, None]
    concat = unet_from_diffusers(bundle.parts[UNET].config).config.concat_channels
    scheduler = class_name(bundle.scheduler or {})
    return {
        "_class_name": OUR_PIPELINE if ours_alone(bundle) else INPAINTING if concat else DIFFUSERS_PIPELINE,
        "_diffusers_version": DIFFUSERS_VERSION,
        "feature_extractor": nothing,
        "image_encoder": nothing,
        "requires_safety_checker": False,
        "safety_checker": nothing,
        "scheduler": ["ldm" if scheduler == OUR_SCHEDULER else "diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"] if TEXT in bundle.parts else nothing,
        "tokenizer": ["transformers", "CLIPTokenizer"] if TEXT in bundle.parts else nothing,
        "unet": ["diffusers", DIFFUSERS_UNET],
        "vae": ["diffusers", "AutoencoderKL"] if VAE in bundle.parts else nothing,
    }
