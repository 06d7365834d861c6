"""Samplers: functions of (denoise, x_T, grid, noise) over one description of the process (math.md S1–S3).

A grid is the t of each network call, falling; the sampler ends at clean data (t = −1). ``denoise(x_t, t)`` returns
the prediction of ``target``. ``noise(i)`` is the fresh normal noise of step i: a function, so that an image's draws
do not depend on the batch around it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.guidance import Denoise
from ldm.diffusion.process import posterior_mean, posterior_variance, to_eps, to_x0
from ldm.diffusion.schedule import Schedule, like

Noise = Callable[[int], Tensor]
Callback = Callable[[int, Tensor], None]  # callback(step index, sample after the step)


def trailing(num_steps: int, steps: int) -> list[int]:
    """The grid T−1, …, one node at the end of each of ``steps`` equal parts of 1…T: 999, 949, …, 49 for 20.

    Distinct for every number of steps from 1 to T. Raises ValueError outside.
    """
    check_steps(num_steps, steps)
    return [round(num_steps - i * num_steps / steps) - 1 for i in range(steps)]


def leading(num_steps: int, steps: int, offset: int = 1) -> list[int]:
    """Stable Diffusion's grid i·(T//S) + offset, falling: 951, …, 1 for 20. The offset shrinks where it would leave 0…T−1."""
    check_steps(num_steps, steps)
    stride = num_steps // steps
    offset = min(offset, num_steps - 1 - (steps - 1) * stride)
    return [i * stride + offset for i in reversed(range(steps))]


def linspace(num_steps: int, steps: int) -> list[int]:
    """Equally spaced from T−1 to 0, both included: 999, …, 0."""
    check_steps(num_steps, steps)
    return [round((num_steps - 1) * (1 - i / max(steps - 1, 1))) for i in range(steps)]


GRIDS: dict[str, Callable[[int, int], list[int]]] = {"trailing": trailing, "leading": leading, "linspace": linspace}


def check_steps(num_steps: int, steps: int) -> None:
    """Raise ValueError unless 1 ≤ steps ≤ T."""
    if not 1 <= steps <= num_steps:
        raise ValueError(f"steps must lie between 1 and {num_steps}, got {steps}")


def ddpm(
    schedule: Schedule, target: str, denoise: Denoise, x: Float[Tensor, "b *d"], grid: list[int], noise: Noise, *,
    eta: float = 1.0, callback: Callback | None = None,
) -> Float[Tensor, "b *d"]:  # fmt: skip
    """Ancestral sampling on the whole chain or a sub-sequence, with the posterior's variance (Ho et al. 2020, Algorithm 2).

    ``eta`` is not used: it is 1 by definition.
    """
    for i, (t, s) in enumerate(pairwise(_nodes(grid, x))):
        prediction = denoise(x, t.expand(len(x)))
        x = posterior_mean(schedule, to_x0(schedule, target, prediction, x, t), x, s, t)
        if s >= 0:
            x = x + like(posterior_variance(schedule, s, t).sqrt(), x) * noise(i)
        if callback:
            callback(i, x)
    return x


def ddim(
    schedule: Schedule, target: str, denoise: Denoise, x: Float[Tensor, "b *d"], grid: list[int], noise: Noise, *,
    eta: float = 0.0, callback: Callback | None = None,
) -> Float[Tensor, "b *d"]:  # fmt: skip
    """x_s = a_s x̂_0 + √(s_s² − σ²) ε̂ + σ z, σ² = η² · posterior variance (Song et al. 2021, eq. 12)."""
    for i, (t, s) in enumerate(pairwise(_nodes(grid, x))):
        prediction = denoise(x, t.expand(len(x)))
        x0, eps = to_x0(schedule, target, prediction, x, t), to_eps(schedule, target, prediction, x, t)
        variance = eta**2 * posterior_variance(schedule, s, t)
        x = like(schedule.alpha(s), x) * x0 + like((schedule.sigma(s).square() - variance).clamp(min=0).sqrt(), x) * eps
        if eta > 0 and s >= 0:
            x = x + like(variance.sqrt(), x) * noise(i)
        if callback:
            callback(i, x)
    return x


def dpmpp_2m(
    schedule: Schedule, target: str, denoise: Denoise, x: Float[Tensor, "b *d"], grid: list[int], noise: Noise, *,
    eta: float = 0.0, callback: Callback | None = None,
) -> Float[Tensor, "b *d"]:  # fmt: skip
    """DPM-Solver++(2M): second order, multistep, one call a step (Lu et al. 2022, Algorithm 2).

    The first step and the last, which ends at σ = 0, are of first order. ``eta`` is not used: it is deterministic.
    """
    before: tuple[Tensor, Tensor] | None = None  # x̂_0 and λ of the last call
    for i, (t, s) in enumerate(pairwise(_nodes(grid, x))):
        x0 = to_x0(schedule, target, denoise(x, t.expand(len(x))), x, t)
        lam, lam_next = schedule.half_log_snr(t), schedule.half_log_snr(s)
        h = lam_next - lam
        data = x0
        if before is not None and s >= 0:
            r = (lam - before[1]) / h
            data = x0 + like(1 / (2 * r), x) * (x0 - before[0])
        x = like(schedule.sigma(s) / schedule.sigma(t), x) * x - like(schedule.alpha(s) * torch.expm1(-h), x) * data
        before = x0, lam
        if callback:
            callback(i, x)
    return x


Sampler = Callable[..., Tensor]
SAMPLERS: dict[str, Sampler] = {"ddpm": ddpm, "ddim": ddim, "dpmpp_2m": dpmpp_2m}


def _nodes(grid: list[int], x: Tensor) -> list[Tensor]:
    """The grid and the clean end as scalar tensors beside ``x``."""
    return list(torch.tensor([*grid, -1], device=x.device).unbind())
