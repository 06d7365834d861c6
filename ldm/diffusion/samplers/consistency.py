"""Sampling from a consistency function in a few steps (docs/equations.md S6)."""

from __future__ import annotations

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.consistency import consistency
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.samplers.nodes import Callback, Nodes, Noise, after_step, no_noise
from ldm.diffusion.schedule import like


def lcm(
    denoiser: Denoiser, x: Float[Tensor, "b *d"], grid: Float[Tensor, " nodes"], noise: Noise = no_noise, *,
    callback: Callback | None = None,
) -> Float[Tensor, "b *d"]:  # fmt: skip
    """x_s = a_s f(x_t, t) + s_s z: to the end of the path, and back with fresh noise.

    Multistep consistency sampling, Song et al. 2023, Algorithm 1; Luo et al. 2023, Algorithm 3; S6.
    No noise where the step ends at clean data. For distilled networks alone: any other gives x̂_0, the
    mean of all images that x_t may come from.
    """
    nodes = Nodes.of(denoiser.schedule, grid, x)
    for i, (t, s) in enumerate(pairwise(nodes.t)):
        pred = denoiser(x, t)
        x = like(nodes.alpha[i + 1], x) * consistency(pred)
        if s >= 0:
            x = x + like(nodes.sigma[i + 1], x) * noise(i)
        x = after_step(callback, i, x, pred.x0)
    return x
