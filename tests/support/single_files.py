"""Parts of models in diffusers' names, and files in the layout of CompVis."""

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from autoencoder.config import AutoencoderConfig
from autoencoder.layout import to_diffusers as vae_to_diffusers
from autoencoder.model import AutoencoderKL
from ldm.config import ScheduleConfig
from ldm.interop.bundle import TEXT, UNET, VAE, Bundle, Part
from ldm.interop.diffusers.schedulers import scheduler_to_diffusers
from ldm.interop.diffusers.unet import unet_from_diffusers


def unet_part(config: dict[str, Any], meta: bool = False) -> Part:
    """Random tensors of our U-Net."""
    with torch.device("meta"):
        network = unet_from_diffusers({k: v for k, v in config.items() if k != "num_class_embeds"}).make()
    tensors = {name: t if meta else torch.randn(t.shape) for name, t in network.state_dict().items()}
    if config.get("num_class_embeds"):
        tensors["class_embedding.weight"] = torch.randn(config["num_class_embeds"], 4 * config["block_out_channels"][0])
    return Part(config, tensors)


def vae_part(config: AutoencoderConfig, scale: float = 0.18215, meta: bool = False) -> Part:
    with torch.device("meta"):
        network = AutoencoderKL(config)
    tensors = {name: t if meta else torch.randn(t.shape) for name, t in network.state_dict().items()}
    return Part({**vae_to_diffusers(config), "scaling_factor": scale}, tensors)


def text_config(
    width: int = 768, layers: int = 2, heads: int = 12, act: str = "quick_gelu", inner: int = 8
) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": 40, "hidden_size": width,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "max_position_embeddings": 7, "hidden_act": act, "layer_norm_eps": 1e-5, "attention_dropout": 0.0,
        "bos_token_id": 38, "eos_token_id": 39, "pad_token_id": 1, "projection_dim": width,
    }  # fmt: skip


def prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers 5 has dropped the prefix that files have."""
    return {"text_model." + name.removeprefix("text_model."): t for name, t in state.items()}


def text_part(config: dict[str, Any], meta: bool = False) -> Part:
    with torch.device("meta"):
        state = prefixed(CLIPTextModel(CLIPTextConfig(**config)).state_dict())
    return Part(
        config,
        {name: t if meta else torch.randn(t.shape) for name, t in state.items() if not name.endswith("position_ids")},
    )


def scheduler(target: str = "eps", schedule: ScheduleConfig | None = None) -> dict[str, Any]:
    published = {"timestep_spacing": "leading", "set_alpha_to_one": False}
    return {**scheduler_to_diffusers(schedule or ScheduleConfig(), target), **published}


def published(unet: dict[str, Any], text: dict[str, Any]) -> Bundle:
    """Without numbers."""
    parts = {
        UNET: unet_part(unet, meta=True),
        VAE: vae_part(AutoencoderConfig(), meta=True),
        TEXT: text_part(text, meta=True),
    }
    return Bundle(parts, scheduler())


def openclip_file(width: int = 16, blocks: int = 4, inner: int = 24) -> dict[str, Tensor]:
    """The text tower of an open_clip model: all blocks, projection and temperature."""
    torch.manual_seed(3)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (40, width), "positional_embedding": (7, width), "ln_final.weight": (width,),
        "ln_final.bias": (width,), "text_projection": (width, 12), "logit_scale": (),
    }  # fmt: skip
    for block in range(blocks):
        here = f"transformer.resblocks.{block}."
        shapes |= {f"{here}{norm}.{kind}": (width,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
        shapes |= {here + "attn.in_proj_weight": (3 * width, width), here + "attn.in_proj_bias": (3 * width,)}
        shapes |= {here + "attn.out_proj.weight": (width, width), here + "attn.out_proj.bias": (width,)}
        shapes |= {here + "mlp.c_fc.weight": (inner, width), here + "mlp.c_fc.bias": (inner,)}
        shapes |= {here + "mlp.c_proj.weight": (width, inner), here + "mlp.c_proj.bias": (width,)}
    return {"cond_stage_model.model." + name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}
