"""DPM-Solver++: exponential integrators in λ for x̂_0 (math.md S3)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.samplers.path import Callback, Noise, Path, told
from ldm.diffusion.schedule import like


def dpmpp_2m(
    denoiser: Denoiser, x: Float[Tensor, "b *d"], grid: Float[Tensor, " nodes"], noise: Noise, *, callback: Callback | None = None
) -> Float[Tensor, "b *d"]:
    """DPM-Solver++(2M): second order, multistep, one call a step (Lu et al. 2022, Algorithm 2).

    The first step, and a last one that ends at clean data, are of first order. Deterministic.
    """
    path = Path.of(denoiser.schedule, grid, x)
    before: Tensor | None = None  # x̂_0 of the last call
    for i in range(path.steps):
        x0 = denoiser(x, path.t[i]).x0
        h = path.lam[i + 1] - path.lam[i]
        data = x0
        if before is not None and path.sigma[i + 1] > 0:
            r = (path.lam[i] - path.lam[i - 1]) / h
            data = x0 + like(1 / (2 * r), x) * (x0 - before)
        x = like(path.sigma[i + 1] / path.sigma[i], x) * x - like(path.alpha[i + 1] * torch.expm1(-h), x) * data
        before = x0
        x = told(callback, i, x, x0)
    return x
