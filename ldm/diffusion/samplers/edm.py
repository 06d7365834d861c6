"""Solvers in the noise level σ/α, as Karras et al. (2022) write the probability flow.

docs/equations.md S3.

y = x/α obeys dy/d(σ/α) = (y − x̂_0)/(σ/α) = ε̂. A step from level σ̃ to σ̃_n with any slope d' is
y_n = x̂_0 + σ̃_n d + (σ̃_n − σ̃)(d' − d), where d is the slope at its beginning. In this form
nothing cancels where σ̃ is large.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.samplers.nodes import Callback, Nodes, Noise, after_step, check_start, no_noise
from ldm.diffusion.schedule import like

LMS_ORDER = 4


def slope(nodes: Nodes, i: int, x: Float[Tensor, "b *d"], x0: Float[Tensor, "b *d"]) -> Float[Tensor, "b *d"]:
    """dy/d(σ/α) at node i, which is ε̂.

    From the nodes' α and σ, neither of which is 0 where there is noise.
    """
    return (x - like(nodes.alpha[i], x) * x0) / like(nodes.sigma[i], x)


def stepped(
    nodes: Nodes,
    i: int,
    x0: Float[Tensor, "b *d"],
    d: Float[Tensor, "b *d"],
    correction: Float[Tensor, "b *d"] | None = None,
) -> Float[Tensor, "b *d"]:
    """x at node i + 1 along the slope d; ``correction`` is added to y."""
    x = like(nodes.alpha[i + 1], d) * x0 + like(nodes.sigma[i + 1], d) * d
    return x if correction is None else x + like(nodes.alpha[i + 1], d) * correction


def euler(
    denoiser: Denoiser,
    x: Float[Tensor, "b *d"],
    grid: Float[Tensor, " nodes"],
    noise: Noise = no_noise,
    *,
    callback: Callback | None = None,
) -> Float[Tensor, "b *d"]:
    """Euler's method: first order, one call a step (Karras et al. 2022). Equals DDIM with η = 0."""
    nodes = Nodes.of(denoiser.schedule, grid, x)
    for i in range(nodes.steps):
        x0 = denoiser(x, nodes.t[i]).x0
        x = after_step(callback, i, stepped(nodes, i, x0, slope(nodes, i, x, x0)), x0)
    return x


def euler_ancestral(
    denoiser: Denoiser,
    x: Float[Tensor, "b *d"],
    grid: Float[Tensor, " nodes"],
    noise: Noise = no_noise,
    *,
    callback: Callback | None = None,
) -> Float[Tensor, "b *d"]:
    """Euler's method to below the next level, then noise up to it: σ̃_n² = σ̃_down² + σ̃_up².

    First order in the weak sense, one call a step. Equals DDIM with η = 1. No noise where the step
    ends at clean data.
    """
    nodes = Nodes.of(denoiser.schedule, grid, x)
    for i in range(nodes.steps):
        x0 = denoiser(x, nodes.t[i]).x0
        level, after = nodes.level[i], nodes.level[i + 1]
        up = after * (1 - (after / level).square()).sqrt()
        down = after * after / level
        y = x0 + like(down, x) * slope(nodes, i, x, x0)
        if after > 0:
            y = y + like(up, x) * noise(i)
        x = after_step(callback, i, like(nodes.alpha[i + 1], x) * y, x0)
    return x


def heun(
    denoiser: Denoiser,
    x: Float[Tensor, "b *d"],
    grid: Float[Tensor, " nodes"],
    noise: Noise = no_noise,
    *,
    callback: Callback | None = None,
) -> Float[Tensor, "b *d"]:
    """Heun's method, the mean of the slopes at both ends (Karras et al. 2022, Algorithm 1).

    Second order, two calls a step. A last step that ends at clean data is Euler's, one call.
    Deterministic.
    """
    nodes = Nodes.of(denoiser.schedule, grid, x)
    for i in range(nodes.steps):
        x0 = denoiser(x, nodes.t[i]).x0
        d = slope(nodes, i, x, x0)
        x = stepped(nodes, i, x0, d)
        if nodes.sigma[i + 1] > 0:
            end = slope(nodes, i + 1, x, denoiser(x, nodes.t[i + 1]).x0)
            x = stepped(nodes, i, x0, d, like((nodes.level[i + 1] - nodes.level[i]) / 2, x) * (end - d))
        x = after_step(callback, i, x, x0)
    return x


def dpm2(
    denoiser: Denoiser,
    x: Float[Tensor, "b *d"],
    grid: Float[Tensor, " nodes"],
    noise: Noise = no_noise,
    *,
    callback: Callback | None = None,
) -> Float[Tensor, "b *d"]:
    """The slope at the geometric mean of both levels (Lu et al. 2022a; k-diffusion's DPM2).

    Second order, two calls a step. The middle lies between nodes: its t is fractional. A last step
    that ends at clean data is Euler's, one call. Deterministic.
    """
    schedule = denoiser.schedule
    nodes = Nodes.of(schedule, grid, x)
    for i in range(nodes.steps):
        x0 = denoiser(x, nodes.t[i]).x0
        d = slope(nodes, i, x, x0)
        after = stepped(nodes, i, x0, d)
        if nodes.sigma[i + 1] > 0:
            t_half = schedule.time((nodes.lam[i] + nodes.lam[i + 1]) / 2)
            half = Nodes.of(schedule, torch.stack([nodes.t[i], t_half]), x)
            middle = stepped(half, 0, x0, d)
            change = slope(half, 1, middle, denoiser(middle, half.t[1]).x0) - d
            after = stepped(nodes, i, x0, d, like(nodes.level[i + 1] - nodes.level[i], x) * change)
        x = after_step(callback, i, after, x0)
    return x


def lms(
    denoiser: Denoiser, x: Float[Tensor, "b *d"], grid: Float[Tensor, " nodes"], noise: Noise = no_noise, *,
    start: Sequence[Tensor] = (), callback: Callback | None = None,
) -> Float[Tensor, "b *d"]:  # fmt: skip
    """Linear multistep: the exact integral of the polynomial through the last four slopes.

    One call a step (k-diffusion's LMS). Fourth order with exact samples at the nodes 1, 2, 3
    (``start``); without them the first steps have one, two and three slopes. Deterministic.
    """
    nodes = Nodes.of(denoiser.schedule, grid, x)
    check_start(nodes, start)
    slopes: list[Tensor] = []  # the newest first
    for i in range(nodes.steps):
        x0 = denoiser(x, nodes.t[i]).x0
        slopes = [slope(nodes, i, x, x0), *slopes[: LMS_ORDER - 1]]
        weights = adams_weights(nodes.level[: i + 2].flip(0)[: len(slopes) + 1])
        changes = (like(w, x) * (d - slopes[0]) for w, d in zip(weights[1:], slopes[1:], strict=True))
        correction = sum(changes, torch.zeros_like(x))
        x = after_step(callback, i, start[i] if i < len(start) else stepped(nodes, i, x0, slopes[0], correction), x0)
    return x


def adams_weights(levels: Float[Tensor, " nodes"]) -> Float[Tensor, " slopes"]:
    """Integrals from levels[1] to levels[0] of the Lagrange polynomials through levels[1], ….

    Gauss–Legendre quadrature with two points, exact up to degree 3, the highest here.
    """
    end, nodes = levels[0], levels[1:]
    half = (end - nodes[0]) / 2
    points = (end + nodes[0]) / 2 + half * torch.tensor([-1.0, 1.0], dtype=levels.dtype, device=levels.device) / 3**0.5
    weights = []
    for j, node in enumerate(nodes):
        others = torch.cat([nodes[:j], nodes[j + 1 :]])
        weights.append(half * ((points[:, None] - others) / (node - others)).prod(1).sum())
    return torch.stack(weights)
