"""DPM-Solver++: exponential integrators in λ for x̂_0 (docs/equations.md S3).

Each step solves x_s = (σ_s/σ_t) x_t + σ_s ∫ e^λ x̂_0(λ) dλ with a polynomial in place of x̂_0. The
deterministic solvers follow the probability flow; those named ``sde`` follow the reverse diffusion
with the same marginals.

``start``: exact samples at the grid's nodes 1, 2, …, taken in place of the solver's own, to measure
its order. ``lower_final``: with fewer than 15 steps the last step is of first order, and the one
before it of second at most. The rule is not in the paper but in the authors' code, for fewer than
10 steps there (15 at first, which diffusers kept, as do we).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.samplers.nodes import Callback, Nodes, Noise, after_step, check_start, no_noise
from ldm.diffusion.schedule import like

FEW_STEPS = 15  # below it the last orders are lowered, as in diffusers

# data(nodes, step, [x̂_0 now, x̂_0 of the call before, …]): the constant x̂_0 that makes the same step
Data = Callable[[Nodes, int, list[Tensor]], Tensor]


def dpmpp_2m(
    denoiser: Denoiser, x: Float[Tensor, "b *d"], grid: Float[Tensor, " nodes"], noise: Noise = no_noise, *,
    start: Sequence[Tensor] = (), lower_final: bool = True, callback: Callback | None = None,
) -> Float[Tensor, "b *d"]:  # fmt: skip
    """DPM-Solver++(2M): second order, multistep, one call a step (Lu et al. 2022, Algorithm 2).

    The first step, and a last one that ends at clean data, are of first order. Deterministic.
    """
    return _multistep(denoiser, x, grid, 2, _two, start, lower_final, callback)


def dpmpp_3m(
    denoiser: Denoiser, x: Float[Tensor, "b *d"], grid: Float[Tensor, " nodes"], noise: Noise = no_noise, *,
    start: Sequence[Tensor] = (), lower_final: bool = True, callback: Callback | None = None,
) -> Float[Tensor, "b *d"]:  # fmt: skip
    """DPM-Solver++(3M) with the full second derivative of x̂_0: third order.

    Lu et al. 2022, appendix; S5.
    """
    return _multistep(denoiser, x, grid, 3, _three, start, lower_final, callback)


def dpmpp_3m_published(
    denoiser: Denoiser, x: Float[Tensor, "b *d"], grid: Float[Tensor, " nodes"], noise: Noise = no_noise, *,
    start: Sequence[Tensor] = (), lower_final: bool = True, callback: Callback | None = None,
) -> Float[Tensor, "b *d"]:  # fmt: skip
    """DPM-Solver++(3M) as published and in diffusers: of second order.

    Its second derivative is half of what it should be.
    """
    return _multistep(denoiser, x, grid, 3, _three_published, start, lower_final, callback)


def dpmpp_2s(
    denoiser: Denoiser, x: Float[Tensor, "b *d"], grid: Float[Tensor, " nodes"], noise: Noise = no_noise, *,
    lower_final: bool = True, callback: Callback | None = None,
) -> Float[Tensor, "b *d"]:  # fmt: skip
    """DPM-Solver++(2S) on pairs of steps, with the node between them as the middle: second order.

    Lu et al. 2022, Algorithm 1. The first step of a pair is of first order; the second repeats the
    pair from its beginning, with x̂_0 at both nodes. With an odd number of steps the last step is
    of first order; with an even number too if ``lower_final`` is set or if it ends at clean data. A
    middle that the callback replaced begins a new pair. One call a step. Deterministic.
    """
    nodes = Nodes.of(denoiser.schedule, grid, x)
    middle, first, x0_first = False, x, x  # is x the middle of a pair, and how did the pair begin
    for i in range(nodes.steps):
        x0 = denoiser(x, nodes.t[i]).x0
        if middle and not (i == nodes.steps - 1 and (lower_final or nodes.sigma[i + 1] == 0)):
            r = (nodes.lam[i] - nodes.lam[i - 1]) / (nodes.lam[i + 1] - nodes.lam[i - 1])
            after = _solved(nodes, i - 1, i + 1, first, x0_first + like(1 / (2 * r), x) * (x0 - x0_first))
            begun = False
        else:
            first, x0_first, begun = x, x0, True
            after = _solved(nodes, i, i + 1, x, x0)
        x = after_step(callback, i, after, x0)
        middle = begun and x is after
    return x


def dpmpp_sde(
    denoiser: Denoiser,
    x: Float[Tensor, "b *d"],
    grid: Float[Tensor, " nodes"],
    noise: Noise = no_noise,
    *,
    callback: Callback | None = None,
) -> Float[Tensor, "b *d"]:
    """SDE-DPM-Solver++(1): first order in the weak sense (Lu et al. 2022, section 5).

    Equals DDIM with η = 1.
    """
    return _multistep_sde(denoiser, x, grid, noise, 1, True, callback)


def dpmpp_2m_sde(
    denoiser: Denoiser, x: Float[Tensor, "b *d"], grid: Float[Tensor, " nodes"], noise: Noise = no_noise, *,
    lower_final: bool = True, callback: Callback | None = None,
) -> Float[Tensor, "b *d"]:  # fmt: skip
    """SDE-DPM-Solver++(2M), midpoint form: second order in the weak sense.

    Lu et al. 2022, section 5.

    One call a step.
    """
    return _multistep_sde(denoiser, x, grid, noise, 2, lower_final, callback)


def _multistep(
    denoiser: Denoiser,
    x: Tensor,
    grid: Tensor,
    order: int,
    data: Data,
    start: Sequence[Tensor],
    lower_final: bool,
    callback: Callback | None,
) -> Tensor:
    nodes = Nodes.of(denoiser.schedule, grid, x)
    check_start(nodes, start)
    history: list[Tensor] = []  # x̂_0, the newest first
    for i in range(nodes.steps):
        history = [denoiser(x, nodes.t[i]).x0, *history[: order - 1]]
        known = history[: nodes.order(i, order, lower_final and nodes.steps < FEW_STEPS)]
        if i < len(start):
            after = start[i]
        else:
            after = _solved(nodes, i, i + 1, x, (data if len(known) == order else _two)(nodes, i, known))
        x = after_step(callback, i, after, history[0])
    return x


def _multistep_sde(
    denoiser: Denoiser, x: Tensor, grid: Tensor, noise: Noise, order: int, lower_final: bool, callback: Callback | None
) -> Tensor:
    """x_s = (σ_s/σ_t) e^{−h} x_t + α_s (1 − e^{−2h}) x̂_0 + σ_s √(1 − e^{−2h}) z.

    No noise where the step ends at clean data.
    """
    nodes = Nodes.of(denoiser.schedule, grid, x)
    history: list[Tensor] = []
    for i in range(nodes.steps):
        history = [denoiser(x, nodes.t[i]).x0, *history[: order - 1]]
        data = _two(nodes, i, history[: nodes.order(i, order, lower_final and nodes.steps < FEW_STEPS)])
        h = nodes.lam[i + 1] - nodes.lam[i]
        replaced = -torch.expm1(-2 * h)  # share of the variance that is drawn anew
        kept = nodes.sigma[i + 1] / nodes.sigma[i] * torch.exp(-h)
        x = like(kept, x) * x + like(nodes.alpha[i + 1] * replaced, x) * data
        if nodes.sigma[i + 1] > 0:
            x = x + like(nodes.sigma[i + 1] * replaced.sqrt(), x) * noise(i)
        x = after_step(callback, i, x, history[0])
    return x


def _solved(nodes: Nodes, i: int, j: int, x: Tensor, data: Tensor) -> Tensor:
    """The flow from node i to node j with x̂_0 constant: (σ_j/σ_i) x + α_j (1 − e^{−h}) x̂_0."""
    h = nodes.lam[j] - nodes.lam[i]
    return like(nodes.sigma[j] / nodes.sigma[i], x) * x - like(nodes.alpha[j] * torch.expm1(-h), x) * data


def _two(nodes: Nodes, i: int, history: list[Tensor]) -> Tensor:
    """x̂_0 at the middle of the step, on the line through the last two.

    The last x̂_0 itself if it is the only one.
    """
    if len(history) == 1:
        return history[0]
    r = (nodes.lam[i] - nodes.lam[i - 1]) / (nodes.lam[i + 1] - nodes.lam[i])
    return history[0] + like(1 / (2 * r), history[0]) * (history[0] - history[1])


def _three(nodes: Nodes, i: int, history: list[Tensor], curvature: float = 2.0) -> Tensor:
    """x̂_0 + (φ_2/φ_1) h x̂_0' + (φ_3/φ_1) h² x̂_0'', the constant x̂_0 of a third-order step.

    The derivatives are divided differences of the last three x̂_0. φ_k of −h: φ_1 = (1 − e^{−h})/h,
    φ_2 = (1 − φ_1)/h, φ_3 = (½ − φ_2)/h. ``curvature``: factor from the second divided difference
    to the second derivative.
    """
    h, before, earlier = (nodes.lam[i + 1 - k] - nodes.lam[i - k] for k in range(3))
    slope = (history[0] - history[1]) / like(before, history[0])
    bend = (slope - (history[1] - history[2]) / like(earlier, history[0])) / like(before + earlier, history[0])
    phi_1 = -torch.expm1(-h) / h
    phi_2 = (1 - phi_1) / h
    phi_3 = (0.5 - phi_2) / h
    slope = slope + like(before, bend) * bend  # at the node itself
    return history[0] + like(phi_2 / phi_1 * h, slope) * slope + like(curvature * phi_3 / phi_1 * h**2, bend) * bend


def _three_published(nodes: Nodes, i: int, history: list[Tensor]) -> Tensor:
    return _three(nodes, i, history, curvature=1.0)
