"""`unet/config.json`: a U-Net's settings in diffusers' keys, and back."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from ldm.config import ConfigError, UNetConfig, build
from ldm.models.unet import NetworkSpec

DIFFUSERS_VERSION = "0.30.0"  # the format, written into each file: readers compare it with their own
OUR_UNET = "LatentDiffusionUNet"  # with attention but no context, or a learned variance, which diffusers' class lacks
DIFFUSERS_UNET = "UNet2DConditionModel"

# Values that our U-Net is built with; they equal diffusers' defaults, so a key may be absent.
_FIXED: dict[str, Any] = {
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "center_input_sample": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "dropout": 0.0,
    "only_cross_attention": False,
    "mid_block_only_cross_attention": None,
    "dual_cross_attention": False,
    "cross_attention_norm": None,
    "attention_type": "default",
    "reverse_transformer_layers_per_block": None,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "addition_embed_type_num_heads": 64,  # of an embedding that addition_embed_type leaves out
    "class_embeddings_concat": False,
    "num_attention_heads": None,
}
_READ = {
    "sample_size", "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels",
    "layers_per_block", "cross_attention_dim", "attention_head_dim", "transformer_layers_per_block", "norm_num_groups",
    "use_linear_projection", "resnet_time_scale_shift", "class_embed_type", "num_class_embeds",
    "projection_class_embeddings_input_dim", "upcast_attention",
    "learned_variance",  # ours
}  # fmt: skip
# The fixed keys that are written: their default differed between releases of diffusers, or published files state them.
_WRITTEN = (
    "mid_block_type", "flip_sin_to_cos", "freq_shift", "act_fn", "norm_eps", "downsample_padding",
    "mid_block_scale_factor", "center_input_sample",
)  # fmt: skip
_HINTS = {
    "addition_embed_type": "a second condition beside the timestep, as Stable Diffusion XL has",
    "num_attention_heads": "diffusers takes the number of heads as attention_head_dim",
}
_VECTOR_MAPS = {"projection": "mlp", "simple_projection": "linear", "identity": "identity"}
_CLASS_EMBEDDINGS = (None, "timestep", *_VECTOR_MAPS)


def unet_to_diffusers(spec: NetworkSpec, sample_size: int) -> dict[str, Any]:
    """`unet/config.json` of the UNet2DConditionModel with the same parameters.

    ``sample_size``: side of x_t.

    Attention without a context, and a learned variance (twice the channels of x_t come out), get
    our own class name.
    """
    config, context_dim = spec.config, spec.context_dim
    levels, heads = len(config.channels), list(config.heads)
    attends = [level in config.attending for level in range(levels)]
    return {
        "_class_name": OUR_UNET if spec.learned_variance or (context_dim is None and any(attends)) else DIFFUSERS_UNET,
        "_diffusers_version": DIFFUSERS_VERSION,
        "sample_size": sample_size,
        "in_channels": spec.in_channels + config.concat_channels,
        "out_channels": spec.out_channels,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "block_out_channels": list(config.channels),
        "layers_per_block": config.layers_per_level,
        "cross_attention_dim": context_dim if context_dim is not None else [None] * levels,
        "attention_head_dim": heads if len(heads) > 1 else heads[0],  # the NUMBER of heads, in spite of its name
        "transformer_layers_per_block": config.transformer_layers,
        "norm_num_groups": config.groups,
        "use_linear_projection": config.linear_projection,
        "upcast_attention": config.upcast_attention,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        **_class_embedding_to_diffusers(config),
        **{key: _FIXED[key] for key in _WRITTEN},
        **({"learned_variance": True} if spec.learned_variance else {}),  # our own key
    }


def _class_embedding_to_diffusers(config: UNetConfig) -> dict[str, Any]:
    """The keys of the class embedding, which takes vector and label conditions."""
    projected = config.vector_dim if config.vector_map != "identity" else None
    names = {vector_map: name for name, vector_map in _VECTOR_MAPS.items()}
    kind = names.get(config.vector_map) if config.vector_dim else None
    return {
        "class_embed_type": "timestep" if config.sinusoidal_labels else kind,
        "num_class_embeds": config.num_labels,
        "projection_class_embeddings_input_dim": projected,
    }


def unet_from_diffusers(layout: Mapping[str, Any]) -> NetworkSpec:
    """The network of a unet/config.json.

    Raises ConfigError naming what we cannot express.

    Channels beyond those of x_t are taken as concatenated conditions (inpainting's mask and masked
    latent). x_t has the channels that come out, or half of them where the variance is learned.
    """
    _check_names(layout)
    _check_blocks(layout)
    _check_class_embedding(layout)
    out_channels, context_dim = _count(layout, "out_channels", 4), _single(layout, "cross_attention_dim", 1280)
    x_channels = out_channels // 2 if layout.get("learned_variance") else out_channels
    if (concat := _count(layout, "in_channels", 4) - x_channels) < 0:
        raise ConfigError(
            f"unet: in_channels {x_channels + concat} is less than the {x_channels} channels of the prediction"
        )
    if context_dim is not None and (type(context_dim) is not int or context_dim < 1):
        raise ConfigError(f"unet: cross_attention_dim must be a whole number from 1, got {context_dim!r}")
    settings = {
        "channels": layout["block_out_channels"],
        "layers_per_level": _single(layout, "layers_per_block", 2),
        "attention_levels": [i for i, name in enumerate(layout["down_block_types"]) if name.startswith("CrossAttn")],
        "heads": layout.get("attention_head_dim", 8),
        "transformer_layers": _single(layout, "transformer_layers_per_block", 1),
        "groups": layout.get("norm_num_groups", 32),
        "linear_projection": layout.get("use_linear_projection", False),
        "scale_shift": layout.get("resnet_time_scale_shift", "default") == "scale_shift",
        "upcast_attention": layout.get("upcast_attention", False),
        "concat_channels": concat,
        **_class_embedding_from_diffusers(layout),
    }
    return NetworkSpec(build(UNetConfig, settings, "unet."), x_channels, out_channels, context_dim)


def sample_side(layout: Mapping[str, Any]) -> int:
    """Side of x_t in training, or 64 if the file lacks it.

    Raises ConfigError if x_t is not a square.
    """
    side = layout.get("sample_size") or 64
    if isinstance(side, (list, tuple)):
        side = side[0] if all(one == side[0] for one in side) else side
    if type(side) is not int or side < 1:
        raise ConfigError(
            f"unet: sample_size {side!r} is not a square: write one whole number, the side of what is diffused"
        )
    return side


def _class_embedding_from_diffusers(layout: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the class embedding."""
    kind = layout.get("class_embed_type")
    if kind is None:
        return {"num_labels": layout.get("num_class_embeds")}
    if kind == "timestep":
        return {"sinusoidal_labels": True}
    first = layout["block_out_channels"][0]
    return {
        "vector_dim": 4 * first if kind == "identity" else layout["projection_class_embeddings_input_dim"],
        "vector_map": _VECTOR_MAPS[kind],
    }


def _check_names(layout: Mapping[str, Any]) -> None:
    """Raise ConfigError for another class, an unknown key, or a value that we cannot express."""
    if layout.get("_class_name", DIFFUSERS_UNET) not in (OUR_UNET, DIFFUSERS_UNET):
        raise ConfigError(f"unet: a {layout['_class_name']} cannot be opened, only {DIFFUSERS_UNET} and {OUR_UNET}")
    for key, value in layout.items():
        if key.startswith("_") or key in _READ:
            continue
        if key not in _FIXED:
            near = difflib.get_close_matches(key, [*_READ, *_FIXED], n=1)
            raise ConfigError(
                f"unet: unknown key {key}" + (f": did you mean {near[0]}?" if near else f" of a {DIFFUSERS_UNET}")
            )
        items = value if isinstance(value, (list, tuple)) and value else [value]
        if any(item != _FIXED[key] and (item or _FIXED[key]) for item in items):
            hint = f" ({_HINTS[key]})" if key in _HINTS else ""
            raise ConfigError(f"unet: {key} = {value!r} cannot be expressed here, only {_FIXED[key]!r}{hint}")


def _check_blocks(layout: Mapping[str, Any]) -> None:
    """Raise ConfigError unless each level has one known block down, and its mirror up."""
    for key in ("down_block_types", "up_block_types", "block_out_channels"):
        if not isinstance(layout.get(key), (list, tuple)) or not layout[key]:
            raise ConfigError(f"unet: {key} is missing, or not a list with one entry for each level")
    down, up = list(layout["down_block_types"]), list(layout["up_block_types"])
    for name in [*down, *up]:
        if name not in ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"):
            raise ConfigError(f"unet: block type {name} cannot be expressed here")
    if [name.replace("Up", "Down") for name in reversed(up)] != down or len(down) != len(layout["block_out_channels"]):
        raise ConfigError(f"unet: up_block_types {up} is not the mirror of down_block_types {down}, one for each level")
    if layout.get("resnet_time_scale_shift", "default") not in ("default", "scale_shift"):
        raise ConfigError(
            f"unet: resnet_time_scale_shift {layout['resnet_time_scale_shift']!r} cannot be expressed here"
        )


def _check_class_embedding(layout: Mapping[str, Any]) -> None:
    """Raise ConfigError for an unknown kind, one without its width, or settings of another kind."""
    kind, labels, width = (
        layout.get(key) for key in ("class_embed_type", "num_class_embeds", "projection_class_embeddings_input_dim")
    )
    if kind not in _CLASS_EMBEDDINGS:
        raise ConfigError(f"unet: class_embed_type {kind!r} cannot be expressed here")
    if kind in ("projection", "simple_projection") and width is None:
        raise ConfigError(f"unet: projection_class_embeddings_input_dim is missing: class_embed_type {kind} needs it")
    for key, given, reader in (
        ("num_class_embeds", labels is not None, kind is None),
        ("projection_class_embeddings_input_dim", width is not None, kind in ("projection", "simple_projection")),
    ):
        if given and not reader:
            raise ConfigError(
                f"unet: {key} = {layout[key]!r} has no meaning with class_embed_type {kind!r}: leave it out"
            )


def _count(layout: Mapping[str, Any], key: str, default: int) -> int:
    """A whole number from 1. Raises ConfigError."""
    value = layout.get(key, default)
    if type(value) is not int or value < 1:
        raise ConfigError(f"unet: {key} must be a whole number from 1, got {value!r}")
    return value


def _single(layout: Mapping[str, Any], key: str, default: Any) -> Any:
    """The one value for all levels. Raises ConfigError if they differ."""
    value = layout.get(key, default)
    if not isinstance(value, (list, tuple)):
        return value
    if len(set(map(str, value))) != 1:
        raise ConfigError(f"unet: {key} {list(value)} differs between levels: one value for all can be expressed here")
    return value[0]
