"""Gaussians: log density, entropy, KL, and the discretised Gaussian of 8-bit pixels, in nats.

docs/equations.md B1 and L5. The diagonal forms work element by element; the caller sums over the
dimensions of a sample. They take log variances: networks learn those, and they stay exact where a
variance is 1e-9.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

HALF_BIN = 1 / 255  # half the distance of two 8-bit levels x = 2k/255 − 1


def log_density(
    x: Float[Tensor, "*d"], mean: Float[Tensor, "..."], log_variance: Float[Tensor, "..."]
) -> Float[Tensor, "*d"]:
    """log N(x; mean, exp(log_variance)) of each element."""
    return -0.5 * (math.log(2 * math.pi) + log_variance + (x - mean).square() * torch.exp(-log_variance))


def entropy(log_variance: Float[Tensor, "*d"]) -> Float[Tensor, "*d"]:
    """½(1 + log 2π + log σ²) of each element."""
    return 0.5 * (1 + math.log(2 * math.pi) + log_variance)


def kl(
    mean: Float[Tensor, "*d"],
    log_variance: Float[Tensor, "..."],
    other_mean: Float[Tensor, "..."],
    other_log_variance: Float[Tensor, "..."],
) -> Float[Tensor, "*d"]:
    """KL(N(mean, exp(log_variance)) ‖ N(other_mean, exp(other_log_variance))) of each element."""
    ratio = log_variance - other_log_variance
    return 0.5 * (torch.expm1(ratio) - ratio + (mean - other_mean).square() * torch.exp(-other_log_variance))


def discretised_log_probability(
    x: Float[Tensor, "*d"], mean: Float[Tensor, "..."], log_variance: Float[Tensor, "..."]
) -> Float[Tensor, "*d"]:
    """log of the mass that N(mean, exp(log_variance)) gives to the bin of each 8-bit pixel.

    Ho et al. 2020, eq. 13; L5. ``x`` holds levels 2k/255 − 1; a bin reaches 1/255 to either side,
    the first and the last to infinity, so the 256 masses sum to 1. Computed in float64 with the
    exact normal CDF and returned in the dtype of ``x``: finite, with finite gradients, however far
    x lies from the mean.
    """
    exact, std = x.double(), torch.exp(0.5 * log_variance.double())
    lower, upper = ((exact + edge - mean.double()) / std for edge in (-HALF_BIN, HALF_BIN))
    # Φ(upper) − Φ(lower) = Φ(−lower) − Φ(−upper): on the side where Φ is small, the logarithms keep all their digits
    right = lower + upper > 0
    low, high = torch.where(right, -upper, lower), torch.where(right, -lower, upper)
    log_high = torch.special.log_ndtr(high)
    inner = log_high + torch.log(-torch.expm1(torch.special.log_ndtr(low) - log_high))
    outer = torch.where(exact < 0, torch.special.log_ndtr(upper), torch.special.log_ndtr(-lower))
    return torch.where(exact.abs() > 1 - HALF_BIN, outer, inner).to(x.dtype)


def check_pixels(x: Float[Tensor, "*d"]) -> None:
    """Raise ValueError unless every value is an 8-bit level 2k/255 − 1, k = 0 … 255."""
    level = (x.double() + 1) * 127.5
    wrong = ~(((level - level.round()).abs() < 1e-3) & (level > -0.5) & (level < 255.5))
    if bool(wrong.any()):
        raise ValueError(f"pixels must be 8-bit levels 2k/255 − 1 with k = 0 … 255, got {x[wrong][0].item():g}")
