"""From noise to samples: any network with the U-Net's signature, without a model folder around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ldm.config import ConfigError
from ldm.data import rng
from ldm.diffusion.condition import NO_CONDITION, Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.samplers.grids import make_grid
from ldm.diffusion.samplers.nodes import Callback
from ldm.diffusion.samplers.registry import SAMPLERS
from ldm.diffusion.schedule import Schedule


def draw_noise(
    seed: int, name: str, numbers: Sequence[int], shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> Float[Tensor, "b *d"]:
    """Standard normal arrays, one for each image number: a function of (seed, name, number), whatever batch an image is in."""
    return torch.from_numpy(np.stack([rng.normal(seed, f"sample/{name}", n, shape) for n in numbers])).to(device)


@torch.no_grad()
def sample(
    model: Callable[..., Tensor],
    schedule: Schedule,
    target: str,
    shape: Sequence[int],
    *,
    sampler: str = "dpmpp_2m",
    steps: int = 20,
    grid: str = "trailing",
    seed: int = 0,
    cond: Condition = NO_CONDITION,
    null_cond: Condition | None = None,
    guidance_scale: float = 1.0,
    learned_variance: bool = False,
    callback: Callback | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> Float[Tensor, "b *d"]:
    """Draw a batch of samples of the given shape, [b, c, h, w] as diffused. No gradient is kept.

    Args:
        model: ``model(x_t, t, cond)``, such as a UNet.
        schedule, target: the process, and what the model predicts of it: eps, x0, v or score.
        sampler, steps, grid: names of ldm.config.SAMPLERS and GRIDS.
        seed: sample i of a seed starts from the same noise in every batch, and as in Pipeline.
        cond, null_cond, guidance_scale: classifier-free guidance between both conditions; 1 is the condition alone.
        learned_variance: the model returns twice the channels, the second half for the reverse variance.
        callback: ``callback(step, x, x0)`` after each step; what it returns, unless None, replaces the sample.
        device: left out, that of the model's parameters.
        options: of the sampler: ``eta``, ``variance``.

    Raises:
        ConfigError: a name that is not known; guidance without a null condition.
        ValueError: steps out of range for the schedule.
    """
    if sampler not in SAMPLERS:
        raise ConfigError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if guidance_scale != 1.0 and null_cond is None:
        raise ConfigError(f"guidance_scale {guidance_scale:g} needs null_cond, the condition to guide away from")
    if device is None:
        device = next(model.parameters()).device if isinstance(model, nn.Module) else "cpu"
    schedule = schedule.to(device)
    guided = Guidance(
        model, cond, cond if null_cond is None else null_cond, schedule, target, learned_variance, scale=guidance_scale
    )
    numbers, item = range(shape[0]), tuple(shape[1:])
    return SAMPLERS[sampler].function(
        Denoiser(schedule, target, guided, learned_variance), draw_noise(seed, "x_T", numbers, item, device),
        make_grid(grid, schedule, steps), lambda step: draw_noise(seed, f"step {step}", numbers, item, device),
        callback=callback, **options,
    )  # fmt: skip
