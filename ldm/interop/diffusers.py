"""The configuration files of a diffusers pipeline folder: our settings in its words, and back.

Parameter names need no translation: our networks use the names found there. Nothing is imported from diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.config import GIVEN, ConfigError, ScheduleConfig, UNetConfig
from ldm.diffusion.schedule import Schedule

DIFFUSERS_VERSION = "0.30.0"  # the format, written into each file: readers compare it with their own
OUR_PIPELINE = "LatentDiffusionPipeline"  # the class name of what a StableDiffusionPipeline cannot express
THEIR_PIPELINE = "StableDiffusionPipeline"
OUR_UNET = "LatentDiffusionUNet"  # attention on a level without a context, or a learned variance: no UNet2DConditionModel has them
THEIR_UNET = "UNet2DConditionModel"
OUR_SCHEDULER = "LatentDiffusionScheduler"  # a score target, which their schedulers do not know
THEIR_SCHEDULER = "DDIMScheduler"

_PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction", "score": "score"}  # the last is ours alone
_BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}  # of their DDIMScheduler
_BETAS = {"scaled_linear": (0.00085, 0.012)}  # published values of schedule.py; the others' are (1e-4, 0.02), or they have none


def ours_alone(has_autoencoder: bool, has_text: bool, unet: UNetConfig, learned_variance: bool, target: str) -> str | None:
    """What of a model a StableDiffusionPipeline cannot express, or None where it can."""
    reasons = {
        "without autoencoder (a pixel model)": not has_autoencoder,
        "without text encoder (an unconditional model)": not has_text,
        "with a vector or concatenated condition": unet.vector_dim is not None or unet.concat_channels > 0,
        "with a learned variance": learned_variance,
        "with a score target": target == "score",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def model_index(has_autoencoder: bool, has_text: bool, target: str, ours: bool) -> dict[str, Any]:
    """`model_index.json`: which class reads which sub-folder. ``ours``: it carries our own class name (``ours_alone``)."""
    nothing = [None, None]
    return {
        "_class_name": OUR_PIPELINE if ours else THEIR_PIPELINE,
        "_diffusers_version": DIFFUSERS_VERSION,
        "feature_extractor": nothing,
        "image_encoder": nothing,
        "requires_safety_checker": False,
        "safety_checker": nothing,
        "scheduler": ["ldm", OUR_SCHEDULER] if target == "score" else ["diffusers", THEIR_SCHEDULER],
        "text_encoder": ["transformers", "CLIPTextModel"] if has_text else nothing,
        "tokenizer": ["transformers", "CLIPTokenizer"] if has_text else nothing,
        "unet": ["diffusers", THEIR_UNET],
        "vae": ["diffusers", "AutoencoderKL"] if has_autoencoder else nothing,
    }


def scheduler_to_diffusers(schedule: ScheduleConfig, target: str) -> dict[str, Any]:
    """`scheduler/scheduler_config.json` of a DDIMScheduler with the same process, target and (trailing) grid.

    A process that has no name there is written as the table of its β. A score target carries our own class name.
    """
    start, end = _BETAS.get(schedule.name, (1e-4, 0.02))
    named = schedule.name in _BETA_SCHEDULES and schedule.shift == 1.0
    betas = None if named else Schedule.from_config(schedule).betas.tolist()
    return {
        "_class_name": OUR_SCHEDULER if target == "score" else THEIR_SCHEDULER,
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": schedule.num_steps,
        "beta_schedule": _BETA_SCHEDULES.get(schedule.name, "linear"),
        "beta_start": start if schedule.beta_start is None else schedule.beta_start,
        "beta_end": end if schedule.beta_end is None else schedule.beta_end,
        "trained_betas": betas,
        "prediction_type": _PREDICTIONS[target],
        "timestep_spacing": "trailing",
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": True,
        "rescale_betas_zero_snr": named and schedule.zero_terminal_snr,
    }


def scheduler_from_diffusers(layout: Mapping[str, Any]) -> tuple[ScheduleConfig, str]:
    """The schedule and target of a scheduler_config.json. Raises ConfigError naming what is not offered."""
    names = {theirs: ours for ours, theirs in _BETA_SCHEDULES.items()} | {"sigmoid": "sigmoid"}  # of their DDPMScheduler
    targets = {theirs: ours for ours, theirs in _PREDICTIONS.items()}
    prediction, zero_terminal = layout.get("prediction_type", "epsilon"), layout.get("rescale_betas_zero_snr", False)
    if prediction not in targets:
        raise ConfigError(f"scheduler: prediction_type {prediction!r} is not offered")
    if (given := layout.get("trained_betas")) is not None:
        return ScheduleConfig(GIVEN, len(given), betas=tuple(given), zero_terminal_snr=zero_terminal), targets[prediction]
    beta_schedule = layout.get("beta_schedule", "linear")
    if beta_schedule not in names:
        raise ConfigError(f"scheduler: beta_schedule {beta_schedule!r} is not offered")
    name = names[beta_schedule]
    start, end = (None, None) if name == "cosine" else (layout.get("beta_start", 1e-4), layout.get("beta_end", 0.02))
    schedule = ScheduleConfig(name, layout.get("num_train_timesteps", 1000), start, end, zero_terminal_snr=zero_terminal)
    return schedule, targets[prediction]


def unet_to_diffusers(config: UNetConfig, in_channels: int, out_channels: int, context_dim: int | None, sample_size: int) -> dict[str, Any]:
    """`unet/config.json` of the UNet2DConditionModel with the same parameters. ``sample_size``: side of x_t.

    Attention on a level without a context, and a learned variance (twice the channels of x_t come out), carry our own class name.
    """
    learned = out_channels == 2 * in_channels
    levels = len(config.channels)
    attends = [level in config.attention_levels for level in range(levels)]
    heads = list(config.heads if len(config.heads) > 1 else config.heads * levels)
    return {
        "_class_name": OUR_UNET if learned or (context_dim is None and any(attends)) else THEIR_UNET,
        "_diffusers_version": DIFFUSERS_VERSION,
        "sample_size": sample_size,
        "in_channels": in_channels + config.concat_channels,
        "out_channels": out_channels,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "block_out_channels": list(config.channels),
        "layers_per_block": config.layers_per_level,
        "cross_attention_dim": context_dim if context_dim is not None else [None] * levels,
        "attention_head_dim": heads,  # the NUMBER of heads, in spite of its name
        "transformer_layers_per_block": config.transformer_layers,
        "norm_num_groups": config.groups,
        "use_linear_projection": config.linear_projection,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "class_embed_type": "projection" if config.vector_dim else None,
        "projection_class_embeddings_input_dim": config.vector_dim,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "act_fn": "silu",
        "norm_eps": 1e-5,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "center_input_sample": False,
        **({"learned_variance": True} if learned else {}),  # a key of ours: which half of the output is what
    }


_UNET_FIXED: dict[str, Any] = {  # values that our U-Net is built with; where a key is absent, its reader's default is the same
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
    "addition_embed_type_num_heads": 64,  # of an embedding that addition_embed_type leaves out
}
_UNET_READ = {
    "sample_size", "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels", "layers_per_block",
    "cross_attention_dim", "attention_head_dim", "transformer_layers_per_block", "norm_num_groups", "use_linear_projection",
    "resnet_time_scale_shift", "class_embed_type", "projection_class_embeddings_input_dim", "upcast_attention", "learned_variance",
}  # fmt: skip


def unet_from_diffusers(layout: Mapping[str, Any]) -> tuple[UNetConfig, int, int, int | None]:
    """(config, in_channels, out_channels, context_dim) of a unet/config.json. Raises ConfigError naming what we cannot express.

    Channels beyond those of x_t are taken as concatenated conditions (inpainting's mask and masked latent). x_t has the
    channels that come out, or half of them where the variance is learned.
    """
    _check_unet(layout)
    down, heads, out_channels = layout["down_block_types"], layout.get("attention_head_dim", 8), layout.get("out_channels", 4)
    x_channels = out_channels // 2 if layout.get("learned_variance") else out_channels
    config = UNetConfig(
        channels=tuple(layout["block_out_channels"]),
        layers_per_level=_single(layout, "layers_per_block", 2),
        attention_levels=tuple(i for i, name in enumerate(down) if name.startswith("CrossAttn")),
        heads=tuple(heads) if isinstance(heads, (list, tuple)) else (heads,),
        transformer_layers=_single(layout, "transformer_layers_per_block", 1),
        groups=layout.get("norm_num_groups", 32),
        linear_projection=layout.get("use_linear_projection", False),
        scale_shift=layout.get("resnet_time_scale_shift", "default") == "scale_shift",
        vector_dim=layout["projection_class_embeddings_input_dim"] if layout.get("class_embed_type") else None,
        concat_channels=layout.get("in_channels", 4) - x_channels,
    )
    return config, x_channels, out_channels, _single(layout, "cross_attention_dim", 1280)


def _check_unet(layout: Mapping[str, Any]) -> None:
    """Raise ConfigError naming the first key whose value we cannot express."""
    if layout.get("_class_name", THEIR_UNET) not in (OUR_UNET, THEIR_UNET):
        raise ConfigError(f"unet: a {layout['_class_name']} cannot be opened, only {THEIR_UNET} and {OUR_UNET}")
    needed = ["down_block_types", "up_block_types", "block_out_channels"]
    for key in needed + ["projection_class_embeddings_input_dim"] * (layout.get("class_embed_type") == "projection"):
        if not layout.get(key):
            raise ConfigError(f"unet: {key} is missing")
    for key, value in layout.items():
        if key.startswith("_") or key in _UNET_READ:
            continue
        neutral = value == _UNET_FIXED[key] if key in _UNET_FIXED else value in (None, False, 0, 0.0, "default", "positional")
        if not neutral:
            raise ConfigError(f"unet: {key} = {value!r} cannot be expressed here")
    down, up = layout["down_block_types"], layout["up_block_types"]
    for name in [*down, *up]:
        if name not in ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"):
            raise ConfigError(f"unet: block type {name} cannot be expressed here")
    if [name.replace("Up", "Down") for name in reversed(up)] != list(down) or len(down) != len(layout["block_out_channels"]):
        raise ConfigError(f"unet: up_block_types {list(up)} is not the mirror of down_block_types {list(down)}, one for each level")
    for key, choices in (("class_embed_type", (None, "projection")), ("resnet_time_scale_shift", ("default", "scale_shift"))):
        if layout.get(key, choices[0]) not in choices:
            raise ConfigError(f"unet: {key} {layout[key]!r} cannot be expressed here")


def _single(layout: Mapping[str, Any], key: str, default: Any) -> Any:
    """One value for all levels. Raises ConfigError where they differ."""
    value = layout.get(key, default)
    if not isinstance(value, (list, tuple)):
        return value
    if len(set(map(str, value))) > 1:
        raise ConfigError(f"unet: {key} {list(value)} differs between levels")
    return value[0]
