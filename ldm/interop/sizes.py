"""Plausibility of a configuration's sizes, checked before a network is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ldm.config.values import shown
from ldm.errors import FolderError
from ldm.interop.bundle import TEXT, UNET

WIDEST = 10**8  # largest side of a tensor that is accepted
# Keys of any part whose values are sides of tensors.
WIDTHS = (
    "in_channels", "out_channels", "block_out_channels", "latent_channels", "cross_attention_dim", "num_class_embeds",
    "norm_num_groups", "projection_class_embeddings_input_dim", "attention_head_dim", "hidden_size",
    "intermediate_size", "vocab_size", "max_position_embeddings", "num_attention_heads", "sample_size",
)  # fmt: skip

# Keys of a text encoder that must be whole numbers; transformers, too, reads this configuration.
TEXT_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip


def check_sizes(part: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise FolderError for more layers than ``tensors``, or widths beyond any machine.

    Values of a wrong type in the U-Net's and autoencoder's settings are left to their own readers.
    """
    if part == TEXT:
        inner = config.get("text_config")
        config = inner if isinstance(inner, Mapping) else config
        for key in TEXT_COUNTS:
            if key in config and (type(config[key]) is not int or config[key] < 1):
                raise FolderError(f"{where}: {key} is {shown(config[key])}: expected a whole number from 1")
    for key in WIDTHS:
        if (widest := max(_numbers(config.get(key)), default=0)) > WIDEST:
            raise FolderError(f"{where}: {key} is {shown(widest)}: no network is that wide")
    if len(tensors) < (layers := _layers(part, config)):
        raise FolderError(
            f"{where}: its configuration describes {shown(layers)} layers, and there are {len(tensors):,} tensors"
        )


def _layers(part: str, config: Mapping[str, Any]) -> int:
    """A lower bound on the number of blocks with tensors of their own."""
    if part == TEXT:
        return max(_numbers(config.get("num_hidden_layers")), default=0)
    channels = config.get("block_out_channels")
    levels = len(channels) if isinstance(channels, (list, tuple)) else 1
    blocks = levels * max(_numbers(config.get("layers_per_block")), default=1)
    deep = max(_numbers(config.get("transformer_layers_per_block")), default=1) if part == UNET else 1
    types = config.get("down_block_types")
    attending = sum(str(name).startswith("CrossAttn") for name in types) if isinstance(types, (list, tuple)) else levels
    return max(blocks, blocks // max(levels, 1) * attending * deep, deep)


def _numbers(value: Any) -> list[int]:
    """The integers in a value: itself, or those of a list."""
    return [number for number in (value if isinstance(value, (list, tuple)) else [value]) if type(number) is int]
