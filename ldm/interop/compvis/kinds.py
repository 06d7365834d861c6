"""Names the kind of a file of tensors that cannot be opened, by tensor names that only its kind has."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

OPENED = "latent diffusion with a KL autoencoder, Stable Diffusion 1 and 2, and their autoencoders are opened"
_AT = r"(?:^|\.)"  # at the beginning of a name's part
_NET = r"^(?:model\.diffusion_model\.|transformer\.|model\.)?"  # of a denoiser's own name
_KINDS: dict[str, str] = {  # a pattern of one name → what has it; the narrower first
    r"control_model\.|(?:^|\.)input_hint_block\.|(?:^|\.)controlnet_|^lllite_": "a ControlNet",
    r"^(?:adapter\.)?body\.\d+\.(?:block\d|resnets|in_conv)": "a T2I-Adapter",
    r"^(?:image_proj|ip_adapter)\.": "an IP-Adapter",
    r"^conditioner\.embedders\.1\.": "Stable Diffusion XL",
    r"\.time_stack\.|temporal_transformer|temopral_conv|motion_modules?\.|time_mix_conv": "a video model",
    r"^conditioner\.embedders\.0\.model\.": "the refiner of Stable Diffusion XL",
    r"^conditioner\.": "a model of Stability's generative-models",
    _NET + r"joint_blocks\.": "Stable Diffusion 3",
    _NET + r"double_blocks\.": "Flux, or another diffusion transformer of its kind",
    _NET
    + r"(?:double_layers|transformer_blocks|single_transformer_blocks|blocks|layers|x_embedder)\.": "a diffusion transformer",
    r"^cond_stage_model\.transformer\.(?:token_emb|attn_layers)\.": "latent diffusion's first text-to-image model (with a BERT)",
    r"^cond_stage_model\.embedding\.weight$": "a class-conditional latent diffusion model",
    r"^cond_stage_model\.(?:model\.visual|.*vision_model)\.|^embedder\.|^noise_augmentor\.": "a model that is conditioned on images",
    r"^cond_stage_model\.roberta\.": "AltDiffusion, whose text encoder is XLM-RoBERTa",
    r"^cond_stage_model\.(?:channel_mapper|quantize|encoder|decoder)\.": "a latent diffusion model that is conditioned on pictures",
    r"^depth_model\.|^low_scale_model\.": "Stable Diffusion 2 with a depth map or a small picture as its condition",
    _AT + r"quantize\.embedding\.weight$": "a VQ autoencoder, or a latent diffusion model on one",
    r"^(?:unet\.)?(?:down_blocks|mid_block|up_blocks)\.": "a U-Net in diffusers' names, which belongs with its config.json into a folder",
    r"^(?:text_model\.|model\.)?(?:encoder\.layers|transformer\.resblocks)\.\d+\.|^text_model\.": "a text encoder alone",
    _AT + r"encoder\.block\.\d+\.layer\.": "a T5 text encoder",
    r"^(?:emb_params$|<[^>]*>$)": "a textual inversion",
    _AT + r"(?:exp_avg|exp_avg_sq|momentum_buffer)(?:\.|$)|^optimizer\.": "the state of an optimizer",
    r"^(?:conv_first\.|model\.0\.weight$|model\.1\.sub\.|body\.0\.rdb1\.)": "an upscaler of the ESRGAN family",
}
_XL_VECTORS = {
    2816: "the U-Net of Stable Diffusion XL",
    2560: "the U-Net of the refiner of Stable Diffusion XL",
}  # widths of label_emb
_CONDITIONED = "model.diffusion_model.label_emb.0.0.weight"


_LORA = re.compile(r"lora|[._](?:hada_w|lokr_w|oft_blocks)|\.dora_scale$")


def is_lora(tensors: Mapping[str, Tensor]) -> bool:
    """True if a file holds a low-rank change of a model rather than a model."""
    return any(_LORA.search(name) for name in tensors) and not any(
        name.startswith("model.diffusion_model.") for name in tensors
    )


def other_kind(tensors: Mapping[str, Tensor]) -> str | None:
    """The kind of a file that cannot be opened, in words, or None. ``tensors``: by their names as CompVis' code spells them."""
    for pattern, kind in _KINDS.items():
        search = re.compile(pattern).search
        if any(search(name) for name in tensors):
            return kind
    if _CONDITIONED in tensors and (kind := _XL_VECTORS.get(tensors[_CONDITIONED].shape[-1])) is not None:
        return kind
    if tensors and all(name.startswith("model_ema.") for name in tensors):
        return "the EMA of a U-Net without the U-Net: its names have lost their dots"
    bare = any(name.startswith(("encoder.", "decoder.")) for name in tensors)
    if bare and any(tensor.ndim == 5 for tensor in tensors.values()):
        return "an autoencoder of videos"
    if bare and not any(name.startswith("quant_conv.") for name in tensors):
        return "an autoencoder without quant_conv, as those of Stable Diffusion 3 and Flux, or half of one"
    if (
        0 < len(tensors) <= 2
        and all(tensor.ndim <= 2 for tensor in tensors.values())
        and not any("." in name for name in tensors)
    ):
        return "a textual inversion"
    return None
