"""Initial weights from another run or model folder, whose U-Net must match the configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.config import NONE, ConfigError, DiffusionTrainingConfig, ScheduleConfig, UNetConfig
from ldm.diffusion.conditioner import Conditioner
from ldm.diffusion.schedule import Schedule
from ldm.interop.bundle import VAE
from ldm.models.unet import NetworkSpec, UNet
from ldm.pipeline.codec import autoencoder_hash, files_hash
from ldm.pipeline.info import ModelInfo, load_unet

FIRST = "conv_in.weight"  # of a U-Net: the convolution that reads its input channels


def check_initial(config: DiffusionTrainingConfig, spec: NetworkSpec, text: Any) -> ModelInfo:
    """Open the folder of ``config.init`` and compare it with the configuration.

    A LoRA is used with all other parts of that folder, so all of them must be equal. A U-Net that is trained whole is
    exported with its own schedule and text encoder, so these may differ; a student's are those of its teacher.

    Args:
        spec: the U-Net that the configuration describes.
        text: the configuration's text encoder or None.

    Raises:
        ConfigError: names the first setting that differs.
        FolderError: the folder is not a model.
    """
    assert config.init is not None
    info = ModelInfo.read(config.init)
    if info.lora is not None:
        raise ConfigError(
            f"init {config.init} is a LoRA, which is not a U-Net: name the model that it changes, {info.lora.base}"
        )
    _check_conditions(config, info)
    whole = config.train.lora is None and config.distill is None
    _check_unet(config.init, info.unet, spec, may_grow=whole)
    if info.target != config.objective.target:
        _differ(config.init, "objective.target", info.target, config.objective.target)
    _check_latents(config, info)
    if not same_schedule(info.schedule, _unscaled(config.schedule) if whole else config.schedule):
        also = "; zero_terminal_snr and shift may differ" if whole else ""
        raise ConfigError(
            f"schedule: that of init {config.init} has other ᾱ_t than this configuration's: they must be equal{also}"
        )
    if info.has_text != (text is not None):
        _differ(
            config.init,
            "text",
            *(f"{'a' if held else 'no'} text encoder" for held in (info.has_text, text is not None)),
        )
    if not whole and text is not None:
        from ldm.interop.text import text_of  # transformers takes seconds to import

        if text_of(info.bundle, info.path).hash != text.hash:
            raise ConfigError(
                "text: a LoRA needs the text encoder of its base, and a student that of its teacher:"
                f" write text: {config.init}"
            )
    return info


def initial_conditioner(config: DiffusionTrainingConfig) -> Conditioner:
    """The conditioner of the model of ``config.init``: what a value meant there, it means here.

    Columns and dropout are the configuration's. Raises ConfigError where the model has other conditions.
    """
    assert config.init is not None
    info = ModelInfo.read(config.init)
    _check_conditions(config, info)
    assert info.conditioner is not None
    return dataclasses.replace(info.conditioner, configs=config.conditions, joint_dropout=config.joint_dropout)


def initial_unet(info: ModelInfo, mixed_precision: str) -> UNet:
    """Load the folder's U-Net as a frozen base: in the file's precision under autocast, else in float32."""
    unet = load_unet(info)
    return unet if mixed_precision != "no" else unet.float()


def grown(weights: Mapping[str, Tensor], unet: UNet) -> dict[str, Tensor]:
    """The weights with zeros for input channels that the U-Net has in addition, so that it computes the same."""
    first = weights[FIRST]
    more = unet.conv_in.weight.shape[1] - first.shape[1]
    zeros = first.new_zeros(first.shape[0], more, *first.shape[2:])
    return {**weights, FIRST: torch.cat([first, zeros], dim=1)}


def same_schedule(one: ScheduleConfig, other: ScheduleConfig) -> bool:
    """True if two schedules describe the same process, whatever their names."""
    a, b = (Schedule.from_config(config).alphas_cumprod for config in (one, other))
    return len(a) == len(b) and torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def _unscaled(schedule: ScheduleConfig) -> ScheduleConfig:
    """Remove what fine-tuning may add to a schedule (Lin et al. 2023, Hoogeboom et al. 2023)."""
    return dataclasses.replace(schedule, zero_terminal_snr=False, shift=1.0)


def _check_unet(init: str, base: NetworkSpec, wanted: NetworkSpec, may_grow: bool) -> None:
    """Raise ConfigError naming the first difference between the U-Net of ``init`` and the configuration's.

    ``may_grow``: the configuration's may have further input channels, where that of ``init`` has none.
    """
    if may_grow and not base.config.concat_channels:
        base = dataclasses.replace(
            base, config=dataclasses.replace(base.config, concat_channels=wanted.config.concat_channels)
        )
    for field in dataclasses.fields(UNetConfig):
        if field.name == "upcast_attention":  # only matters in half precision
            continue
        values = [_spread(config, field.name) for config in (base.config, wanted.config)]
        if values[0] != values[1]:
            _differ(init, f"unet.{field.name}", *values)
    for name, found, expected in (
        ("autoencoder: channels of the latent", base.in_channels, wanted.in_channels),
        ("objective.learned_variance: output channels", base.out_channels, wanted.out_channels),
        ("text: width of the context", base.context_dim, wanted.context_dim),
    ):
        if found != expected:
            _differ(init, name, found, expected)


def _check_conditions(config: DiffusionTrainingConfig, info: ModelInfo) -> None:
    """Raise ConfigError unless the model has the conditions of the configuration, in its order."""
    known = info.conditioner.configs if info.conditioner else ()
    theirs, mine = ([(c.name, c.kind) for c in configs] for configs in (known, config.conditions))
    if theirs != mine:
        named = (", ".join(f"{name} ({kind})" for name, kind in several) or "none" for several in (theirs, mine))
        _differ(config.init, "conditions", *named)


def _spread(config: UNetConfig, name: str) -> Any:
    """Normal form of a setting that can be written in several ways."""
    value = getattr(config, name)
    if name == "heads" and len(value) == 1:
        value = value * len(config.channels)
    return sorted(value) if name == "attention_levels" else list(value) if isinstance(value, tuple) else value


def _check_latents(config: DiffusionTrainingConfig, info: ModelInfo) -> None:
    pixels = config.autoencoder == NONE
    if pixels != (info.autoencoder is None):
        _differ(
            config.init,
            "autoencoder",
            *("none" if without else "an autoencoder" for without in (info.autoencoder is None, pixels)),
        )
    if not pixels and (theirs := files_hash(info.bundle.parts[VAE].files)) != (
        mine := autoencoder_hash(config.autoencoder)
    ):
        _differ(config.init, "autoencoder: sha256", theirs[:12], mine[:12])


def _differ(init: str | None, key: str, theirs: Any, mine: Any) -> None:
    raise ConfigError(f"{key}: {theirs} in init {init}, {mine} in this configuration: they must be equal")
