"""Noise schedules (math.md F5) and the one description of the process in (α, σ, λ).

Time is the code's: t = 0 … T−1, and t = −1 is clean data (ᾱ = 1). Tables are float64; what leaves them is
float32, or float64 where the other operand is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ldm.config import ScheduleConfig


def linear_betas(num_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Float[Tensor, " T"]:
    """β equally spaced (Ho et al. 2020). Not rescaled by 1000/T, as in diffusers."""
    return torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64)


def scaled_linear_betas(num_steps: int, beta_start: float = 0.00085, beta_end: float = 0.012) -> Float[Tensor, " T"]:
    """√β equally spaced (Rombach et al. 2022: latent diffusion, Stable Diffusion)."""
    return torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_steps, dtype=torch.float64).square()


def cosine_betas(num_steps: int, offset: float = 0.008, max_beta: float = 0.999) -> Float[Tensor, " T"]:
    """β_t = min(1 − f(t)/f(t−1), 0.999), f(t) = cos²((t/T + o)/(1 + o) · π/2) (Nichol & Dhariwal 2021, eq. 17)."""
    t = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    f = torch.cos((t + offset) / (1 + offset) * math.pi / 2).square()
    return (1 - f[1:] / f[:-1]).clamp(max=max_beta)


SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "cosine": cosine_betas,
}


class Schedule:
    """A forward process: how much signal (α) and noise (σ) a sample holds at each t, with α² + σ² = 1.

    Args:
        betas: [T], the variance added at each step, in (0, 1).
    """

    def __init__(self, betas: Float[Tensor, " T"]) -> None:
        if betas.ndim != 1 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("betas must be one row of numbers strictly between 0 and 1")
        self.betas = betas.double()
        self.alphas_cumprod = torch.cumprod(1 - self.betas, 0)
        # index t + 1, so that t = −1 (clean data) is a row like the others; 1 − ᾱ summed without cancellation
        log_alphas_cumprod = torch.cumsum(torch.log1p(-self.betas), 0)
        zero = torch.zeros(1, dtype=torch.float64, device=betas.device)
        self._alpha = torch.cat([zero + 1, torch.exp(log_alphas_cumprod / 2)])
        self._sigma = torch.cat([zero, torch.sqrt(-torch.expm1(log_alphas_cumprod))])

    @classmethod
    def from_config(cls, config: ScheduleConfig) -> Schedule:
        """Build the schedule that ``config`` names."""
        given = {"beta_start": config.beta_start, "beta_end": config.beta_end}
        return cls(SCHEDULES[config.name](config.num_steps, **{k: v for k, v in given.items() if v is not None}))

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.betas)

    def to(self, device: torch.device | str) -> Schedule:
        """The same schedule with its tables on ``device``."""
        return Schedule(self.betas.to(device))

    def alpha(self, t: Int[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """a_t = √ᾱ_t, float64."""
        return self._alpha[t + 1]

    def sigma(self, t: Int[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """s_t = √(1 − ᾱ_t), float64."""
        return self._sigma[t + 1]

    def snr(self, t: Int[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Signal-to-noise ratio ᾱ/(1 − ᾱ), float64; infinite at t = −1."""
        return (self.alpha(t) / self.sigma(t)).square()

    def half_log_snr(self, t: Int[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """λ_t = ½ log SNR_t = log(a_t/s_t), float64; infinite at t = −1."""
        return torch.log(self.alpha(t)) - torch.log(self.sigma(t))

    def add_noise(self, x0: Float[Tensor, "b *d"], eps: Float[Tensor, "b *d"], t: Int[Tensor, " b"]) -> Float[Tensor, "b *d"]:
        """x_t = a_t x_0 + s_t ε, a draw from q(x_t | x_0) (math.md F2)."""
        return like(self.alpha(t), x0) * x0 + like(self.sigma(t), x0) * eps


def like(coefficient: Float[Tensor, "*b"], x: Float[Tensor, "*_"]) -> Float[Tensor, "*_"]:
    """A per-sample coefficient [b] (or a scalar) in the type and number of dimensions of ``x`` [b, …]."""
    return (
        coefficient.to(x.dtype).reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))
        if coefficient.ndim
        else coefficient.to(x.dtype)
    )
