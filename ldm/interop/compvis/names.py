"""The name of each tensor of our networks in a CompVis single file.

Our names are those of diffusers and transformers; names in the file are given without the part's
prefix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from autoencoder.layout import from_diffusers as autoencoder_from_diffusers
from autoencoder.model import AutoencoderKL
from ldm.interop.bundle import UNET, VAE
from ldm.interop.diffusers.unet import unet_from_diffusers


@dataclass(frozen=True)
class Slot:
    """A tensor of the file.

    Attributes:
        name, shape: as in the file.
        holds: names of the network's tensors in it; several are concatenated along the first axis.
        inner: shape of each of these.
    """

    name: str
    shape: tuple[int, ...]
    holds: tuple[str, ...]
    inner: tuple[int, ...]


# ---------------------------------------------------------------- U-Net

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_slots(config: Mapping[str, Any]) -> list[Slot]:
    """Every tensor of the U-Net of a unet/config.json.

    Raises ConfigError naming what we cannot express.
    """
    spec = unet_from_diffusers(config)
    with torch.device("meta"):
        network = spec.make()
    shapes = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    layers = network.config.layers_per_level
    attends = [name.startswith("CrossAttn") for name in config["up_block_types"]]
    return [Slot(unet_name(name, layers, attends), shape, (name,), shape) for name, shape in shapes.items()]


def unet_name(name: str, layers: int, attends: list[bool]) -> str:
    """A U-Net tensor's name in the file.

    ``layers``: residual blocks per level; ``attends``: true for up blocks with attention.
    """
    owner, kind = name.rsplit(".", 1)
    if owner in _UNET_ENDS:
        return f"{_UNET_ENDS[owner]}.{kind}"
    if part := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        if part[1] == "resnets":
            return f"middle_block.{2 * int(part[2])}.{_resnet(part[3])}"
        return f"middle_block.1.{part[3]}"
    part = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    assert part is not None, name
    level, index, rest = int(part[2]), int(part[4]), part[5]
    if part[3] == "downsamplers":
        return f"input_blocks.{(level + 1) * (layers + 1)}.0.op.{kind}"
    if part[3] == "upsamplers":  # the last module of its level's last block
        return f"output_blocks.{level * (layers + 1) + layers}.{2 if attends[level] else 1}.conv.{kind}"
    number = level * (layers + 1) + index
    block = f"input_blocks.{number + 1}" if part[1] == "down" else f"output_blocks.{number}"
    return f"{block}.0.{_resnet(rest)}" if part[3] == "resnets" else f"{block}.1.{rest}"


def _resnet(name: str) -> str:
    owner, kind = name.rsplit(".", 1)
    return f"{_RESNET[owner]}.{kind}"


# ---------------------------------------------------------------- autoencoder

_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def vae_slots(config: Mapping[str, Any]) -> list[Slot]:
    """Every tensor of the autoencoder of a vae/config.json. Raises ConfigError."""
    with torch.device("meta"):
        network = AutoencoderKL(autoencoder_from_diffusers(config))
    slots = []
    for name, t in network.state_dict().items():
        shape = tuple(t.shape)
        as_conv = ".attentions." in name and len(shape) == 2  # attention is a 1×1 convolution there
        there = vae_name(name, len(network.config.channels))
        slots.append(Slot(there, (*shape, 1, 1) if as_conv else shape, (name,), shape))
    return slots


def vae_name(name: str, levels: int) -> str:
    """An autoencoder tensor's name in the file.

    The file counts the decoder's levels from the highest resolution.
    """
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"mid_block\.attentions\.0", "mid.attn_1", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", name.replace("down_blocks", "down"))
    name = name.replace(".resnets.", ".block.").replace(".attentions.", ".attn.")
    name = name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    if part := re.fullmatch(r"(.+\.attn[._]\d+)\.(.+)\.(weight|bias)", name):
        return f"{part[1]}.{_ATTENTION[part[2]]}.{part[3]}"
    return name


# ---------------------------------------------------------------- text encoder

_OPENCLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_TEXT_DEFAULTS = {  # CLIPTextConfig's defaults, for keys that a config.json omits
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "max_position_embeddings": 77,
}


def text_slots(config: Mapping[str, Any], openclip: bool) -> list[Slot]:
    """Every tensor of a CLIPTextModel's config.json, in transformers' names or in OpenCLIP's."""
    config = {**_TEXT_DEFAULTS, **config}
    width, inner = config["hidden_size"], config["intermediate_size"]
    ends = {
        "embeddings.token_embedding.weight": ("token_embedding.weight", (config["vocab_size"], width)),
        "embeddings.position_embedding.weight": ("positional_embedding", (config["max_position_embeddings"], width)),
        "final_layer_norm.weight": ("ln_final.weight", (width,)),
        "final_layer_norm.bias": ("ln_final.bias", (width,)),
    }
    slots = [
        Slot(there if openclip else f"text_model.{name}", shape, (f"text_model.{name}",), shape)
        for name, (there, shape) in ends.items()
    ]
    for layer in range(config["num_hidden_layers"]):
        slots += _openclip_block(layer, width, inner) if openclip else _text_block(layer, width, inner)
    return slots


def unused_slots(config: Mapping[str, Any]) -> list[Slot]:
    """The tensors of OpenCLIP's last block, which follows the last one in use."""
    config = {**_TEXT_DEFAULTS, **config}
    return _openclip_block(config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"])


def _text_block(layer: int, width: int, inner: int) -> list[Slot]:
    """Layer ``layer`` in transformers' names."""
    owners = {f"self_attn.{p}_proj": (width, width) for p in ("k", "v", "q", "out")}
    owners |= {"layer_norm1": (width,), "mlp.fc1": (inner, width), "mlp.fc2": (width, inner), "layer_norm2": (width,)}
    slots = []
    for owner, shape in owners.items():
        for kind, size in (("weight", shape), ("bias", shape[:1])):
            name = f"text_model.encoder.layers.{layer}.{owner}.{kind}"
            slots.append(Slot(name, size, (name,), size))
    return slots


def _openclip_block(layer: int, width: int, inner: int) -> list[Slot]:
    """Layer ``layer`` in OpenCLIP's names: queries, keys and values are one projection."""
    here, there = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
    slots = []
    for slot in _text_block(layer, width, inner):
        owner, kind = slot.name.removeprefix(here + ".").rsplit(".", 1)
        if owner in _OPENCLIP:
            slots.append(Slot(f"{there}.{_OPENCLIP[owner]}.{kind}", slot.shape, slot.holds, slot.shape))
        elif owner == "self_attn.q_proj":
            holds = tuple(f"{here}.self_attn.{p}_proj.{kind}" for p in "qkv")
            slots.append(Slot(f"{there}.attn.in_proj_{kind}", (3 * slot.shape[0], *slot.shape[1:]), holds, slot.shape))
    return slots


def shapes_of(part: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a part's network.

    Raises ConfigError naming what we cannot express.
    """
    slots = unet_slots(config) if part == UNET else vae_slots(config) if part == VAE else text_slots(config, False)
    return {name: slot.inner for slot in slots for name in slot.holds}
