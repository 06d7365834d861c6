"""Noise schedules (docs/equations.md F4, F5) and the process in (α, σ, λ).

Time runs over t = 0 … T−1, and t = −1 is clean data (ᾱ = 1). Between two steps t may be any number,
by interpolation in λ = log(α/σ). Tables and coefficients are float64, and cast to the dtype of the
sample that they multiply (``like``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ldm.config import LEARNED, ScheduleConfig

SMALLEST_SIGNAL = 2.0**-24  # ᾱ that stands for 0 where λ must be finite (as in diffusers' solvers)


def linear_betas(num_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Float[Tensor, " T"]:
    """β equally spaced (Ho et al. 2020). Not rescaled by 1000/T, as in diffusers."""
    return torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64)


def linear_rescaled_betas(num_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Float[Tensor, " T"]:
    """β equally spaced, with ends multiplied by 1000/T (improved-diffusion).

    The last SNR then hardly depends on T.
    """
    return linear_betas(num_steps, beta_start * 1000 / num_steps, beta_end * 1000 / num_steps)


def scaled_linear_betas(num_steps: int, beta_start: float = 0.00085, beta_end: float = 0.012) -> Float[Tensor, " T"]:
    """√β equally spaced (Rombach et al. 2022: latent diffusion, Stable Diffusion)."""
    return torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_steps, dtype=torch.float64).square()


def cosine_betas(num_steps: int, offset: float = 0.008, max_beta: float = 0.999) -> Float[Tensor, " T"]:
    """β_t = min(1 − f(t)/f(t−1), 0.999), f(t) = cos²((t/T + o)/(1 + o) · π/2).

    Nichol & Dhariwal 2021, eq. 17.
    """
    t = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    f = torch.cos((t + offset) / (1 + offset) * math.pi / 2).square()
    return (1 - f[1:] / f[:-1]).clamp(max=max_beta)


def sigmoid_betas(num_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Float[Tensor, " T"]:
    """β through a sigmoid on [−6, 6] (GeoDiff, Xu et al. 2022; diffusers' `sigmoid`)."""
    rise = torch.sigmoid(torch.linspace(-6, 6, num_steps, dtype=torch.float64))
    return beta_start + (beta_end - beta_start) * rise


def sigmoid_signal_betas(
    num_steps: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0, max_beta: float = 0.999
) -> Float[Tensor, " T"]:
    """ᾱ through a sigmoid that falls from 1 to 0 (Jabri et al. 2022, algorithm 1).

    Its β are clipped at 0.999 as for cosine.
    """
    u = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    value = torch.sigmoid((start + u * (end - start)) / tau)
    bar = (value[-1] - value) / (value[-1] - value[0])
    return (1 - bar[1:] / bar[:-1]).clamp(max=max_beta)


def rectified_flow_betas(num_steps: int, max_beta: float = 0.999) -> Float[Tensor, " T"]:
    """ᾱ of the straight path (1 − τ) x_0 + τ ε, divided by √((1 − τ)² + τ²), with τ = t/T (Liu et al. 2023).

    With the target ``flow`` it trains a rectified flow whose network sees inputs of unit variance. The last β is
    clipped as for cosine.
    """
    tau = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    bar = (1 - tau).square() / ((1 - tau).square() + tau.square())
    return (1 - bar[1:] / bar[:-1]).clamp(max=max_beta)


SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "linear": linear_betas,
    "linear_rescaled": linear_rescaled_betas,
    "scaled_linear": scaled_linear_betas,
    "cosine": cosine_betas,
    "sigmoid": sigmoid_betas,
    "sigmoid_signal": sigmoid_signal_betas,
    "rectified_flow": rectified_flow_betas,
}


def zero_terminal(betas: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """β with ᾱ_T exactly 0 and the first value kept: √ᾱ' = (√ᾱ − √ᾱ_T)·√ᾱ_1/(√ᾱ_1 − √ᾱ_T).

    Lin et al. 2023, algorithm 1; F4.
    """
    signal = torch.cumprod(1 - betas.double(), 0).sqrt()
    signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    bar = signal.square()
    return 1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])


def shifted(betas: Float[Tensor, " T"], ratio: float) -> Float[Tensor, " T"]:
    """β of the process with λ' = λ − log(ratio), ratio = side / base side in diffused pixels.

    Hoogeboom et al. 2023, F5. A larger image averages noise away, so it gets more of it. A last β
    of 1 stays 1.
    """
    log_bar = torch.cumsum(torch.log1p(-betas.double()), 0)
    log_snr = log_bar - torch.log(-torch.expm1(log_bar)) - 2 * math.log(ratio)
    bar = torch.sigmoid(log_snr)
    return 1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])


class Schedule:
    """A forward process: the signal α and the noise σ of a sample at each t, with α² + σ² = 1.

    Args:
        betas: [T], T ≥ 2, the variance added at each step, in (0, 1); the last may be 1 (zero
            terminal SNR).
        check: check the values, which waits for the GPU.

    Raises ValueError for other betas. With T = 1 there is no variance β̃_2 for the first step (P5),
    and there are no steps to sample along.
    """

    def __init__(self, betas: Float[Tensor, " T"], check: bool = True) -> None:
        if betas.ndim != 1 or len(betas) < 2:
            raise ValueError(f"betas must be one row of at least 2 numbers, got {list(betas.shape)}")
        if check and (not bool(((betas > 0) & (betas <= 1)).all() & (betas[:-1] < 1).all())):
            raise ValueError("betas must be strictly between 0 and 1 (the last may be 1)")
        self.betas = betas.double()
        self.alphas_cumprod = torch.cumprod(1 - self.betas, 0)
        # index t + 1, so that t = −1 (clean data) is a row like the others; 1 − ᾱ summed without cancellation
        log_bar = torch.cumsum(torch.log1p(-self.betas), 0)
        zero = torch.zeros(1, dtype=torch.float64, device=betas.device)
        self._alpha = torch.cat([zero + 1, torch.exp(log_bar / 2)])
        self._sigma = torch.cat([zero, torch.sqrt(-torch.expm1(log_bar))])
        self.least_signal = SMALLEST_SIGNAL  # the ᾱ that stands for 0, below every other
        if self.betas[-1] == 1:
            self.least_signal = min(SMALLEST_SIGNAL, self.alphas_cumprod[-2].item() / 4)
        finite = torch.where(torch.isinf(log_bar), math.log(self.least_signal), log_bar)
        self.half_log_snr_table = (finite - torch.log(-torch.expm1(finite))) / 2  # λ of t = 0 … T−1, finite

    @classmethod
    def from_config(cls, config: ScheduleConfig) -> Schedule:
        """Build the schedule that ``config`` names. Raises ValueError for a learned one."""
        if config.name == LEARNED:
            raise ValueError("a learned schedule has its table in the model that learned it, not in its settings")
        given = {"beta_start": config.beta_start, "beta_end": config.beta_end}
        if config.betas is not None:
            betas = torch.tensor(config.betas, dtype=torch.float64)
        else:
            betas = SCHEDULES[config.name](config.num_steps, **{k: v for k, v in given.items() if v is not None})
        if config.shift != 1.0:
            betas = shifted(betas, config.shift)
        return cls(zero_terminal(betas) if config.zero_terminal_snr else betas)

    @classmethod
    def named(cls, name: str, num_steps: int = 1000, **settings: Any) -> Schedule:
        """The schedule of that name, such as cosine; ``settings`` as in ScheduleConfig.

        Raises ConfigError for an unknown name.
        """
        return cls.from_config(ScheduleConfig(name, num_steps, **settings))

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.betas)

    def first(self, levels: int) -> Schedule:
        """The process that ends after the first ``levels`` steps. Raises ValueError for fewer than 2."""
        return Schedule(self.betas[:levels])

    def to(self, device: torch.device | str) -> Schedule:
        """The same schedule with its tables on ``device``."""
        return Schedule(self.betas.to(device))

    def alpha(self, t: Shaped[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """a_t = √ᾱ_t, float64."""
        return self._at(t, self._alpha, 1)

    def sigma(self, t: Shaped[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """s_t = √(1 − ᾱ_t), float64."""
        return self._at(t, self._sigma, -1)

    def _at(self, t: Tensor, table: Tensor, sign: int) -> Tensor:
        """The table at whole t; between two entries √sigmoid(±2λ) with λ interpolated."""
        if not t.is_floating_point():
            return table[t + 1]
        whole = t.floor()
        if bool(((t > -1) & (t < 0)).any()):
            raise ValueError("t between −1 and 0 has no noise level: λ is infinite at t = −1")
        lower = whole.long().clamp(0, self.num_steps - 2)
        part = t.double() - lower
        lam = torch.lerp(self.half_log_snr_table[lower], self.half_log_snr_table[lower + 1], part)
        return torch.where(t == whole, table[whole.long() + 1], torch.sigmoid(sign * 2 * lam).sqrt())

    def snr(self, t: Shaped[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Signal-to-noise ratio ᾱ/(1 − ᾱ), float64; infinite at t = −1."""
        return (self.alpha(t) / self.sigma(t)).square()

    def half_log_snr(self, t: Shaped[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """λ_t = ½ log SNR_t = log(a_t/s_t), float64.

        Infinite at t = −1, and −∞ where no signal is left.
        """
        return torch.log(self.alpha(t)) - torch.log(self.sigma(t))

    def time(self, half_log_snr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """The t at which λ has the given value, fractional, float64.

        A λ beyond the table gives its nearer end, 0 or T−1.
        """
        rising = self.half_log_snr_table.flip(0)  # from T−1 to 0
        lam = half_log_snr.double().clamp(rising[0], rising[-1])
        upper = torch.searchsorted(rising, lam.contiguous()).clamp(1, self.num_steps - 1)
        part = (lam - rising[upper - 1]) / (rising[upper] - rising[upper - 1])
        return self.num_steps - 1 - (upper - 1 + part)

    def add_noise(
        self, x0: Float[Tensor, "b *d"], eps: Float[Tensor, "b *d"], t: Shaped[Tensor, " b"]
    ) -> Float[Tensor, "b *d"]:
        """x_t = a_t x_0 + s_t ε, a draw from q(x_t | x_0) (docs/equations.md F2)."""
        return like(self.alpha(t), x0) * x0 + like(self.sigma(t), x0) * eps


def like(coefficient: Float[Tensor, "*b"], x: Float[Tensor, "*_"]) -> Float[Tensor, "*_"]:
    """A coefficient [b] or a scalar, in the dtype and number of dimensions of ``x`` [b, …]."""
    coefficient = coefficient.to(x.dtype)
    return (
        coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim)) if coefficient.ndim else coefficient
    )
