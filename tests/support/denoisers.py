"""What tests of samplers denoise with: closed-form networks, and diffusers' schedulers with our tables."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.diffusion.schedule import Schedule
from ldm.interop.diffusers.schedulers import scheduler_to_diffusers


def network(schedule: Schedule, name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A smooth nonlinear denoiser that answers in the words of ``name``."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        x, dtype, t = x.double(), x.dtype, t.reshape(-1)
        a, s = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        x0 = a * x / (a**2 + 0.5 * s**2) * 0.7 + 0.3 * torch.tanh(x + 0.2)
        eps = (x - a * x0) / s
        return {"x0": x0, "eps": eps, "v": a * eps - s * x0, "score": -eps / s, "flow": eps - x0}[name].to(dtype)

    return denoise


def their_scheduler(cls: Any, schedule: Schedule, config: ScheduleConfig, name: str, **extra: object) -> Any:
    """diffusers' scheduler of that class, process and prediction."""
    layout = {k: v for k, v in scheduler_to_diffusers(config, name).items() if not k.startswith("_")}
    theirs = cls.from_config({**layout, **extra})
    theirs.alphas_cumprod = schedule.alphas_cumprod.clone()  # the table apart, so that float64 compares the algorithm
    return theirs


def gaussian_denoiser(schedule: Schedule, mean: float, std: float, name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """E[x_0 | x_t] for data N(mean, std²), exactly, in the words of ``name``."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        a, s = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        x0 = mean + a * std**2 / (a**2 * std**2 + s**2) * (x - a * mean)
        eps = (x - a * x0) / s
        return {"x0": x0, "eps": eps, "v": (a * x - x0) / s, "score": -eps / s, "flow": eps - x0}[name]

    return denoise
