"""Kinds of files that cannot be opened here, recognised by names that only this kind has."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

OPENED = "latent diffusion with a KL autoencoder, Stable Diffusion 1 and 2, and their autoencoders are opened"
_AT = r"(?:^|\.)"  # the start of a name or of a part of it
_NET = r"^(?:model\.diffusion_model\.|transformer\.|model\.)?"  # prefixes of a denoiser
_KINDS: dict[str, str] = {  # a pattern of one name → the kind; narrower patterns first
    r"control_model\.|(?:^|\.)input_hint_block\.|(?:^|\.)controlnet_|^lllite_": "a ControlNet",
    r"^(?:adapter\.)?body\.\d+\.(?:block\d|resnets|in_conv)": "a T2I-Adapter",
    r"^(?:image_proj|ip_adapter)\.": "an IP-Adapter",
    r"^conditioner\.embedders\.1\.": "Stable Diffusion XL",
    r"\.time_stack\.|temporal_transformer|temopral_conv|motion_modules?\.|time_mix_conv": "a video model",
    r"^conditioner\.embedders\.0\.model\.": "the refiner of Stable Diffusion XL",
    r"^conditioner\.": "a model of Stability's generative-models",
    _NET + r"joint_blocks\.": "Stable Diffusion 3",
    _NET + r"double_blocks\.": "Flux, or another diffusion transformer of its kind",
    _NET + r"(?:double_layers|(?:single_)?transformer_blocks|blocks|layers|x_embedder)\.": "a diffusion transformer",
    r"^cond_stage_model\.transformer\.(?:token_emb|attn_layers)\.": "a latent diffusion model with a BERT text encoder",
    r"^cond_stage_model\.embedding\.weight$": "a class-conditional latent diffusion model",
    r"^cond_stage_model\.(?:model\.visual|.*vision_model)\.|^embedder\.|^noise_augmentor\.": "an image variation model",
    r"^cond_stage_model\.roberta\.": "AltDiffusion, whose text encoder is XLM-RoBERTa",
    r"^cond_stage_model\.(?:channel_mapper|quantize|encoder|decoder)\.": "an image-conditioned latent diffusion model",
    r"^depth_model\.|^low_scale_model\.": "Stable Diffusion 2 with a depth map or small image as condition",
    _AT + r"quantize\.embedding\.weight$": "a VQ autoencoder, or a latent diffusion model on one",
    r"^(?:unet\.)?(?:down_blocks|mid_block|up_blocks)\.": "a U-Net in diffusers' names, without its folder",
    r"^(?:model\.)?(?:encoder\.layers|transformer\.resblocks)\.\d+\.|^text_model\.": "only a text encoder",
    _AT + r"encoder\.block\.\d+\.layer\.": "a T5 text encoder",
    r"^(?:emb_params$|<[^>]*>$)": "a textual inversion",
    _AT + r"(?:exp_avg|exp_avg_sq|momentum_buffer)(?:\.|$)|^optimizer\.": "the state of an optimizer",
    r"^(?:conv_first\.|model\.0\.weight$|model\.1\.sub\.|body\.0\.rdb1\.)": "an upscaler of the ESRGAN family",
}
_XL_VECTORS = {  # width of label_emb → the kind
    2816: "the U-Net of Stable Diffusion XL",
    2560: "the U-Net of the refiner of Stable Diffusion XL",
}
_CONDITIONED = "model.diffusion_model.label_emb.0.0.weight"


_LORA = re.compile(r"lora|[._](?:hada_w|lokr_w|oft_blocks)|\.dora_scale$")


def is_lora(tensors: Mapping[str, Tensor]) -> bool:
    """True if a file holds a LoRA (or LoHa, LoKr, OFT) rather than a model."""
    return any(_LORA.search(name) for name in tensors) and not any(
        name.startswith("model.diffusion_model.") for name in tensors
    )


def other_kind(tensors: Mapping[str, Tensor]) -> str | None:
    """The kind of a file that cannot be opened, in words, or None.

    ``tensors``: by the names of ``spelled``.
    """
    for pattern, kind in _KINDS.items():
        search = re.compile(pattern).search
        if any(search(name) for name in tensors):
            return kind
    if _CONDITIONED in tensors and (kind := _XL_VECTORS.get(tensors[_CONDITIONED].shape[-1])) is not None:
        return kind
    if tensors and all(name.startswith("model_ema.") for name in tensors):
        return "the EMA of a U-Net without the U-Net, whose names have lost their dots"
    bare = any(name.startswith(("encoder.", "decoder.")) for name in tensors)
    if bare and any(tensor.ndim == 5 for tensor in tensors.values()):
        return "an autoencoder of videos"
    if bare and not any(name.startswith("quant_conv.") for name in tensors):
        return "an autoencoder without quant_conv (as in Stable Diffusion 3 and Flux), or half of one"
    flat = all(tensor.ndim <= 2 for tensor in tensors.values()) and not any("." in name for name in tensors)
    if 0 < len(tensors) <= 2 and flat:
        return "a textual inversion"
    return None
