"""The autoencoder's config.json as diffusers reads and writes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoencoder.config import AutoencoderConfig, ConfigError

DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
# Keys that say nothing about the network: tile size, latent scale (the reader's business) and the dtype.
STATISTICS = frozenset({"sample_size", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast"})
FIXED = {"act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True}


def to_diffusers(config: AutoencoderConfig) -> dict[str, Any]:
    """Return the JSON-ready config from which diffusers' AutoencoderKL builds the same network.

    ``scaling_factor`` is 1 because the latents' statistics are folded into the weights; it is written
    out since the reader's default is 0.18215. ``sample_size`` (pixels) only sets the tile of tiled decoding.
    """
    levels = len(config.channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.30.0",
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "down_block_types": [DOWN] * levels,
        "up_block_types": [UP] * levels,
        "block_out_channels": list(config.channels),
        "layers_per_block": config.layers_per_level,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.groups,
        "mid_block_add_attention": config.mid_attention,
        **FIXED,
        "sample_size": 64 * config.factor,
        "scaling_factor": 1.0,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
        "force_upcast": False,
    }


def from_diffusers(layout: Mapping[str, Any]) -> AutoencoderConfig:
    """Return the config of a diffusers AutoencoderKL; absent keys take that class's defaults.

    The latent scale and shift are not part of the network and are left to the caller.
    Raises ConfigError naming the key that AutoencoderKL here cannot express.
    """
    given = {k: v for k, v in layout.items() if not k.startswith("_") and k not in STATISTICS}
    if layout.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise ConfigError(f"_class_name is {layout['_class_name']!r}: only AutoencoderKL can be read")
    for key, value in FIXED.items():
        if given.pop(key, value) != value:
            raise ConfigError(f"{key} is {layout[key]!r}: only {value!r} can be expressed")
    channels = tuple(given.pop("block_out_channels", (64,)))
    for key, only in (("down_block_types", DOWN), ("up_block_types", UP)):
        blocks = tuple(given.pop(key, (only,)))
        if set(blocks) != {only} or len(blocks) != len(channels):
            raise ConfigError(f"{key} is {list(blocks)}: expected {only} once for each of the {len(channels)} block_out_channels")
    image_channels = given.pop("in_channels", 3)
    if given.pop("out_channels", 3) != image_channels:
        raise ConfigError(f"out_channels {layout.get('out_channels', 3)} differs from in_channels {image_channels}: they must be equal")
    config = AutoencoderConfig(
        image_channels=image_channels,
        latent_channels=given.pop("latent_channels", 4),
        channels=channels,
        layers_per_level=given.pop("layers_per_block", 1),
        groups=given.pop("norm_num_groups", 32),
        mid_attention=given.pop("mid_block_add_attention", True),
    )
    if given:
        raise ConfigError(f"unknown key {min(given)!r} in the config of an AutoencoderKL")
    return config
