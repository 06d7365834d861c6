"""Checks of settings against a model, before anything slow; every fault is a ConfigError."""

from __future__ import annotations

from os import PathLike
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from autoencoder.config import shown
from ldm.config import ConfigError, SampleConfig, ScheduleConfig
from ldm.config.values import typed
from ldm.diffusion.samplers.grids import CLEAN, check_steps, make_grid
from ldm.diffusion.samplers.registry import SAMPLERS
from ldm.diffusion.schedule import Schedule
from ldm.models.unet import NetworkSpec
from ldm.pipeline.prompts import check_text

LARGEST = 2**14  # pixels a side: the noise of one larger image would not fit into memory
LONG_STEP = 100.0  # factor of σ/α in a first step beyond which samplers that look ahead fail (docs/samplers.md)


def grid_of(schedule: Schedule, settings: SampleConfig) -> Tensor:
    """The sampler's grid for these settings; of strength 0 its end alone.

    Raises ConfigError where the schedule cannot have it.
    """
    try:
        strength = 1.0 if settings.strength is None else settings.strength
        if settings.strength_by == "steps":
            grid = make_grid(settings.grid, schedule, settings.steps, settings.grid_offset, settings.end_clean)
            return grid[settings.steps - int(settings.steps * strength) :]
        if strength == 0.0:
            return torch.full((1,), CLEAN, dtype=torch.float64, device=schedule.betas.device)
        if strength < 1.0:
            schedule = schedule.first(_levels(schedule, strength, settings.steps))
        return make_grid(settings.grid, schedule, settings.steps, settings.grid_offset, settings.end_clean)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _levels(schedule: Schedule, strength: float, steps: int) -> int:
    """Noise levels of the schedule that are drawn anew. Raises ConfigError where they are too few for the steps."""
    levels, fewest = round(strength * schedule.num_steps), max(2, steps)
    if levels < fewest:
        raise ConfigError(
            f"strength {strength:g} is {levels} of {schedule.num_steps} noise levels, too few for {steps} steps:"
            f" take at least {fewest / schedule.num_steps:g}, or fewer steps"
        )
    return levels


def sides_of(size: Any, default: int) -> tuple[int, int]:
    """Height and width of a ``size``: one number or both; left out, a square of the default. Raises ConfigError."""
    if isinstance(size, (tuple, list)):
        return typed(tuple[int, int], size, "size")
    side = default if size is None else typed(int, size, "size")
    return side, side


def first_step(schedule: Schedule, grid: Tensor) -> float:
    """Factor by which the first step of a grid lowers σ/α; 1 where it is the only one, which ends at clean data."""
    level = schedule.sigma(grid[:2]) / schedule.alpha(grid[:2])
    return float(level[0] / level[-1]) if level[-1] > 0 else 1.0


def check_sampling(settings: SampleConfig, sides: tuple[int, int], num_steps: int, factor: int) -> None:
    """Raise ConfigError unless the settings fit a model of T = ``num_steps`` and this autoencoder factor.

    ``sides``: height and width of a picture in pixels.
    """
    try:
        check_steps(num_steps, settings.steps)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if settings.steps < (fewest := SAMPLERS[settings.sampler].fewest):
        raise ConfigError(f"steps must be at least {fewest} for the {settings.sampler} sampler, got {settings.steps}")
    for name in ("eta", "variance"):
        readers = [sampler for sampler, entry in SAMPLERS.items() if name in entry.options]
        if settings.sampler not in readers and getattr(settings, name) != getattr(SampleConfig, name):
            raise ConfigError(
                f"{name} is for {' and '.join(readers)}, and {settings.sampler} does not read it: leave it out"
            )
    check_text(settings.negative_prompt, "negative_prompt")
    check_text(settings.source_prompt, "source_prompt")
    pixels = [(name, getattr(settings, name) or 0) for name in ("window", "window_stride")]
    for name, number in [*pixels, *(("extend", side) for side in settings.extend or ())]:
        if number % factor:
            raise ConfigError(f"{name} must be a multiple of {factor} (the autoencoder's factor), got {number}")
    for size in (*sides, *settings.canvas(sides)):
        if size > LARGEST:
            raise ConfigError(f"size must be at most {LARGEST} pixels, got {size}")
        if size < factor or size % factor:
            raise ConfigError(f"size must be a positive multiple of {factor} (the autoencoder's factor), got {size}")
    if settings.window is not None and settings.classifier is not None:
        raise ConfigError("window: a classifier sees pictures of its own size only: leave one of them out")


def check_start(schedule: ScheduleConfig, target: str, settings: SampleConfig) -> None:
    """Raise ConfigError where the prediction of the first step determines no image."""
    if not schedule.blind_at_the_end(target):
        return
    if grid_of(Schedule.from_config(schedule), settings)[0] == schedule.num_steps - 1:
        raise ConfigError(
            f"this model predicts {target}, which says nothing of the image where its schedule leaves no signal,"
            f" and grid {settings.grid} starts there: take grid leading and fewer than {schedule.num_steps} steps"
        )


def check_opening(path: Any, device: Any, dtype: Any, **names: Any) -> torch.device:
    """The device of the networks: ``device``, or a GPU where there is one.

    ``names``: text, a path or None. Raises ConfigError naming the argument that is of another type.
    """
    if not isinstance(path, (str, PathLike)):
        raise ConfigError(f"path must be that of a model, got {shown(path)}")
    for name, value in names.items():
        if not isinstance(value, (str, PathLike, NoneType)):
            raise ConfigError(f"{name} must be text, got {shown(value)}")
    check_dtype(dtype)
    return check_device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")


def check_dtype(dtype: Any) -> torch.dtype:
    """The type itself. Raises ConfigError unless it is a floating-point type of torch."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"dtype must be a floating-point type of torch, such as torch.bfloat16, got {shown(dtype)}")
    return dtype


def check_device(device: Any) -> torch.device:
    """The device by its name. Raises ConfigError unless torch has it and computes on it."""
    try:
        place = torch.device(device)
        torch.zeros(1, device=place).cpu()  # `meta` has no numbers
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError, OverflowError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"device must be one that torch has here, such as cpu or cuda, got {shown(device)}: {reason}"
        ) from None
    return place


def check_drawable(spec: NetworkSpec, conditioned: bool = False) -> None:
    """Raise ConfigError for a U-Net that needs more than captions, masked images and, if ``conditioned``, values."""
    unet = spec.config
    if unet.concat_channels and not spec.fills:
        raise ConfigError(
            f"this model takes {unet.concat_channels} further channels, which are no mask and masked image:"
            " it cannot draw from a caption alone"
        )
    if unet.class_embedded and not conditioned:
        raise ConfigError("this model takes a class label or vector too: it cannot draw from a caption alone")


def check_guidance(settings: SampleConfig, latents: bool) -> None:
    """Raise ConfigError for guidance that is not possible, or whose settings would be ignored."""
    if settings.dynamic_threshold is not None and latents:
        raise ConfigError(
            "dynamic_threshold is for models of pixels, whose x̂_0 lies in [−1, 1]: latents do not, leave it out"
        )
    if settings.strips is not None and not latents:
        raise ConfigError("strips is for an autoencoder, and this model draws pixels: leave it out")
    if settings.classifier is not None and settings.classifier_form == "mean" and settings.sampler != "ddpm":
        raise ConfigError(
            "classifier_form mean moves the mean of ancestral sampling:"
            f" take sampler ddpm, not {settings.sampler}, or form score"
        )
    owners = {"classifier_scale": "classifier", "classifier_form": "classifier", "autoguidance_scale": "autoguidance"}
    for name, owner in owners.items():
        if getattr(settings, owner) is None and getattr(settings, name) != getattr(SampleConfig, name):
            raise ConfigError(f"{name} is for {owner}: name one, or leave it out")
