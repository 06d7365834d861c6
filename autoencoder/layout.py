"""The autoencoder's config.json as diffusers reads and writes it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from autoencoder.config import AutoencoderConfig, ConfigError

DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
ATTENTION_DOWN, ATTENTION_UP = "AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D"
# Keys that do not concern the network: tile size, latent scale (`latent_scale`) and dtype.
STATISTICS = frozenset({"sample_size", "scaling_factor", "shift_factor", "force_upcast"})
FIXED = {
    "act_fn": "silu",
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "latents_mean": None,
    "latents_std": None,
}
LARGEST = 1e30  # of a latent scale or shift
COUNTS = ("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups")


def to_diffusers(config: AutoencoderConfig) -> dict[str, Any]:
    """Return the JSON-ready config from which diffusers' AutoencoderKL builds the same network.

    ``scaling_factor`` is 1 because the latents' statistics are folded into the weights; it is
    written out since the reader's default is 0.18215. ``sample_size`` (pixels) only sets the tile
    of tiled decoding; ``force_upcast`` keeps readers from half precision, which is untested on
    these weights.
    """
    attends = [level in config.attention_levels for level in range(len(config.channels))]
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.30.0",
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "down_block_types": [ATTENTION_DOWN if a else DOWN for a in attends],
        "up_block_types": [ATTENTION_UP if a else UP for a in reversed(attends)],
        "block_out_channels": list(config.channels),
        "layers_per_block": config.layers_per_level,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.groups,
        "mid_block_add_attention": config.mid_attention,
        **FIXED,
        "sample_size": 64 * config.factor,
        "scaling_factor": 1.0,
        "shift_factor": None,
        "force_upcast": True,
    }


def from_diffusers(layout: Mapping[str, Any]) -> AutoencoderConfig:
    """Return the config of a diffusers AutoencoderKL; absent keys take that class's defaults.

    The latent scale and shift are not part of the network and are left to the caller.
    Raises ConfigError naming the key that AutoencoderKL here cannot express.
    """
    _check_types(layout)
    given = {k: v for k, v in layout.items() if not k.startswith("_") and k not in STATISTICS}
    if layout.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise ConfigError(f"_class_name is {layout['_class_name']!r}: only AutoencoderKL can be read")
    for key, value in FIXED.items():
        if given.pop(key, value) != value:
            raise ConfigError(f"{key} is {layout[key]!r}: only {value!r} can be expressed")
    channels = tuple(given.pop("block_out_channels", (64,)))
    levels = _attends(given, "down_block_types", DOWN, ATTENTION_DOWN, len(channels))
    if _attends(given, "up_block_types", UP, ATTENTION_UP, len(channels)) != levels[::-1]:
        raise ConfigError(
            f"up_block_types is {list(layout['up_block_types'])}: expected the mirror of down_block_types"
        )
    image_channels = given.pop("in_channels", 3)
    if given.pop("out_channels", 3) != image_channels:
        out_channels = layout.get("out_channels", 3)
        raise ConfigError(f"out_channels {out_channels} differs from in_channels {image_channels}: they must be equal")
    config = AutoencoderConfig(
        image_channels=image_channels,
        latent_channels=given.pop("latent_channels", 4),
        channels=channels,
        layers_per_level=given.pop("layers_per_block", 1),
        groups=given.pop("norm_num_groups", 32),
        mid_attention=given.pop("mid_block_add_attention", True),
        attention_levels=tuple(level for level, attends in enumerate(levels) if attends),
    )
    if given:
        near = difflib.get_close_matches(key := min(given), to_diffusers(config), n=1)
        raise ConfigError(
            f"unknown key {key!r} in the config of an AutoencoderKL" + (f": did you mean {near[0]!r}?" if near else "")
        )
    return config


def _check_types(layout: Mapping[str, Any]) -> None:
    """Raise ConfigError for a value of another type than this network's settings have."""
    for key in COUNTS:
        if key in layout and (type(layout[key]) is not int or layout[key] < 1):
            raise ConfigError(f"{key} is {layout[key]!r}: expected a whole number from 1")
    for key, kind, what in (
        ("block_out_channels", int, "whole numbers"),
        ("down_block_types", str, "names"),
        ("up_block_types", str, "names"),
    ):
        values = layout.get(key, [])
        is_list = isinstance(values, (list, tuple)) and all(type(value) is kind for value in values)
        if not is_list or (key in layout and not values):
            raise ConfigError(f"{key} is {values!r}: expected a list of {what}, as many as down_block_types")
    if type(layout.get("mid_block_add_attention", True)) is not bool:
        raise ConfigError(f"mid_block_add_attention is {layout['mid_block_add_attention']!r}: expected true or false")


def _attends(given: dict[str, Any], key: str, plain: str, attention: str, levels: int) -> list[bool]:
    """Flags of the blocks with attention; removes ``key`` from ``given``.

    Raises ConfigError for other blocks or another number of them.
    """
    blocks = list(given.pop(key, (plain,)))
    if not set(blocks) <= {plain, attention} or len(blocks) != levels:
        raise ConfigError(
            f"{key} is {blocks}: expected {plain} or {attention}, one for each of the {levels} block_out_channels"
        )
    return [block == attention for block in blocks]


def latent_scale(layout: Mapping[str, Any]) -> tuple[float, float]:
    """(scale, shift) of the normalised latent (z − shift)·scale.

    Absent keys take that class's defaults.

    Raises ConfigError unless both are finite numbers and the scale is positive.
    """
    scale, shift = layout.get("scaling_factor", 0.18215), layout.get("shift_factor")
    for key, value in (("scaling_factor", scale), ("shift_factor", 0.0 if shift is None else shift)):
        if type(value) not in (int, float) or not abs(value) <= LARGEST or (key == "scaling_factor" and value <= 0):
            raise ConfigError(
                f"{key} is {value!r}: expected a finite number" + (" above 0" if key == "scaling_factor" else "")
            )
    return float(scale), float(shift or 0.0)
