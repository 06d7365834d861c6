"""The tables of the forward process that a CompVis single file holds besides its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.config import GIVEN, ScheduleConfig
from ldm.diffusion.process import posterior_mean, posterior_variance
from ldm.diffusion.schedule import Schedule
from ldm.errors import FolderError

SMALLEST_VARIANCE = 1e-20  # CompVis' code clips the posterior variance here before taking its logarithm
TRAINING_ONLY = {"logvar": "the log-variance of each timestep in its training loss: not part of the process"}
_ROUNDINGS = 4  # tolerance in units of the file's epsilon: a table is several roundings away from ours


def buffers(schedule: Schedule) -> dict[str, Float[Tensor, " T"]]:
    """The tables by their names in the file, float64.

    docs/equations.md F1 to F3 and P2; `register_schedule` in latent-diffusion.
    """
    t = torch.arange(schedule.num_steps)
    alpha, sigma, variance = schedule.alpha(t), schedule.sigma(t), posterior_variance(schedule, t - 1, t)
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    return {
        "betas": schedule.betas,
        "alphas_cumprod": alpha.square(),
        "alphas_cumprod_prev": schedule.alpha(t - 1).square(),
        "sqrt_alphas_cumprod": alpha,
        "sqrt_one_minus_alphas_cumprod": sigma,
        "log_one_minus_alphas_cumprod": 2 * sigma.log(),
        "sqrt_recip_alphas_cumprod": 1 / alpha,
        "sqrt_recipm1_alphas_cumprod": sigma / alpha,
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=SMALLEST_VARIANCE).log(),
        "posterior_mean_coef1": posterior_mean(schedule, one, zero, t - 1, t),
        "posterior_mean_coef2": posterior_mean(schedule, zero, one, t - 1, t),
    }


def bound_weights(schedule: Schedule, target: str) -> Float[Tensor, " T"]:
    """`lvlb_weights` of old files: the loss weights of the variational bound in CompVis' code."""
    t = torch.arange(schedule.num_steps)
    bar = schedule.alphas_cumprod
    if target == "eps":
        variance = posterior_variance(schedule, t - 1, t)
        weights = schedule.betas.square() / (2 * variance * (1 - schedule.betas) * (1 - bar))
    elif target == "x0":
        weights = 0.5 * bar.sqrt() / (2.0 - bar)
    else:
        weights = torch.ones_like(bar)
    return torch.cat([weights[1:2], weights[1:]])


def schedule_of(tensors: Mapping[str, Tensor]) -> ScheduleConfig:
    """The schedule of the betas in the file, or the published one if there are none.

    Raises FolderError.
    """
    published = ScheduleConfig()
    if "betas" not in tensors:
        return published
    betas = tensors["betas"]
    if not betas.is_floating_point() or betas.ndim != 1:
        raise FolderError(f"tensor betas should be a floating-point vector, it is {list(betas.shape)} of {betas.dtype}")
    known = Schedule.from_config(published).betas
    if betas.shape == known.shape and _close(betas, known, _ROUNDINGS * torch.finfo(betas.dtype).eps):
        return published
    if torch.finfo(betas.dtype).bits < 32:
        raise FolderError(
            f"tensor betas is in {betas.dtype}, too coarse to read a schedule from, and it is not the published one"
        )
    try:
        return ScheduleConfig(GIVEN, len(betas), betas=tuple(betas.double().tolist()))
    except ValueError as error:
        raise FolderError(f"tensor betas: {error}") from None


def check_buffers(tensors: Mapping[str, Tensor], schedule: Schedule, target: str) -> dict[str, str]:
    """Compare each table in the file with the schedule.

    Returns their names with the reason why they are unused. Raises FolderError naming the table
    that differs.
    """
    found = {}
    expected = buffers(schedule) | {"lvlb_weights": bound_weights(schedule, target)}
    for name, table in expected.items():
        if (given := tensors.get(name)) is None:
            continue
        if given.shape != table.shape or not given.is_floating_point():
            raise FolderError(
                f"tensor {name} is {list(given.shape)} of {given.dtype}, the schedule has {schedule.num_steps} steps"
            )
        # With betas in float32, 1 − β has a relative error of eps/(1 − β).
        if not _close(given, table, max(1e-4, _ROUNDINGS * torch.finfo(given.dtype).eps)):
            worst = int((given.double() - table).abs().nan_to_num(nan=math.inf).argmax())
            raise FolderError(
                f"tensor {name} does not fit the schedule: at step {worst} it is {float(given[worst]):.6g},"
                f" it should be {float(table[worst]):.6g}"
            )
        found[name] = "a table of the schedule: checked"
    for name, reason in TRAINING_ONLY.items():
        if name in tensors:
            found[name] = reason
    return found


def _close(given: Tensor, table: Tensor, relative: float) -> bool:
    """True if a table equals ours up to rounding in its dtype."""
    tiny = 1e-12 if torch.finfo(given.dtype).bits >= 32 else 1e-7  # the smallest float16 is 6e-8
    return torch.allclose(given.double(), table.double(), rtol=relative, atol=tiny)
