"""PNDM without its Runge–Kutta start: PLMS, Stable Diffusion's first sampler.

docs/equations.md S3.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.samplers.edm import slope, stepped
from ldm.diffusion.samplers.nodes import Callback, Nodes, Noise, after_step, no_noise
from ldm.diffusion.schedule import like

FEWEST = 2  # steps: the first has two calls, the second of them at the second node
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(
    denoiser: Denoiser,
    x: Float[Tensor, "b *d"],
    grid: Float[Tensor, " nodes"],
    noise: Noise = no_noise,
    *,
    callback: Callback | None = None,
) -> Float[Tensor, "b *d"]:
    """Adams–Bashforth on ε̂ with the weights of equal steps, then DDIM's step.

    The first step is Heun's.

    Liu et al. 2022, eq. 9 and 12. S + 1 calls for S steps, S at least 2. Second order: it would be
    of fourth if the steps were equal in σ/α. Deterministic.

    Raises:
        ValueError: fewer than 2 steps.
    """
    nodes = Nodes.of(denoiser.schedule, grid, x)
    if nodes.steps < FEWEST:
        raise ValueError(f"plms needs at least {FEWEST} steps, got {nodes.steps}")
    slopes: list[Tensor] = []  # ε̂, the newest first
    for i in range(nodes.steps):
        x0 = denoiser(x, nodes.t[i]).x0
        slopes = [slope(nodes, i, x, x0), *slopes[:3]]
        if i == 0:
            ahead = stepped(nodes, 0, x0, slopes[0])
            combined = (slopes[0] + slope(nodes, 1, ahead, denoiser(ahead, nodes.t[1]).x0)) / 2
        else:
            weights = ADAMS_BASHFORTH[len(slopes) - 1]
            combined = torch.stack([w * d for w, d in zip(weights, slopes, strict=True)]).sum(0)
        x = stepped(nodes, i, x0, slopes[0], like(nodes.level[i + 1] - nodes.level[i], x) * (combined - slopes[0]))
        x = after_step(callback, i, x, x0)
    return x
