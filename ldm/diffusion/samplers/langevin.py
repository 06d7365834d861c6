"""Langevin samplers: annealed, and as the corrector behind a predictor (docs/equations.md S4).

A Langevin step at one noise level is x ← x + (δ/2) ∇log q(x_t) + √δ z, with δ = 4 r² s_t², in proportion to the variance
as in Song & Ermon 2019. The signal-to-noise ratio r is that of Song et al. 2021 (Algorithm 4; their ε is δ/2), whose step is
δ = 4 (r ‖z‖/‖∇log q‖)²: here the ratio of the norms is s_t, which it is for the kernel's score −ε/s_t. Their code averages the
norms over the batch, so that an image would depend on those beside it; of each sample alone they would make the step depend on
x and z, which changes the stationary distribution. As steps double at one r, the error ends at the steps' own, of order r².
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser, Prediction
from ldm.diffusion.samplers.ancestral import ddim
from ldm.diffusion.samplers.path import Callback, Nodes, Noise, after_step, no_noise
from ldm.diffusion.schedule import like

PER_LEVEL = 5  # Langevin steps at each level of annealed dynamics
SNR = 0.16  # r of the corrector, as published for images


def annealed_langevin(
    denoiser: Denoiser, x: Float[Tensor, "b *d"], grid: Float[Tensor, " nodes"], noise: Noise = no_noise, *,
    corrections: int = PER_LEVEL, snr: float = 0.3, callback: Callback | None = None,
) -> Float[Tensor, "b *d"]:  # fmt: skip
    """Annealed Langevin dynamics (Song & Ermon 2019, Algorithm 1; S4): ``corrections`` Langevin steps at each level after the first.

    They keep x from one noise level to the next, in a process that only adds noise. Here that x is x_t/a_t, so the
    sample is multiplied by a_s/a_t. Where the grid ends at clean data, the last step is x̂_0, one call (Song & Ermon 2020).
    """

    def follow(i: int, nodes: Nodes, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if nodes.sigma[i + 1] == 0:
            return (x0 := denoiser(x, nodes.t[i]).x0), x0
        return like(nodes.alpha[i + 1] / nodes.alpha[i], x) * x, None

    return _corrected(denoiser, x, grid, noise, follow, corrections, snr, callback)


def predictor_corrector(
    denoiser: Denoiser, x: Float[Tensor, "b *d"], grid: Float[Tensor, " nodes"], noise: Noise = no_noise, *,
    eta: float = 0.0, corrections: int = 1, snr: float = SNR, callback: Callback | None = None,
) -> Float[Tensor, "b *d"]:  # fmt: skip
    """A DDIM step to each level (η = 1: ancestral), then ``corrections`` Langevin steps at it (Song et al. 2021, Algorithm 1; S4).

    No correction at clean data. Of their Algorithm 5 the factor 1 − β in δ is left out: a sub-sequence has no β.
    """

    def predict(i: int, nodes: Nodes, x: Tensor) -> tuple[Tensor, Tensor | None]:
        used: list[Tensor] = []
        draw = i * (corrections + 1)
        x = ddim(
            denoiser, x, nodes.t[i : i + 2], lambda _: noise(draw), eta=eta, callback=lambda _, __, x0: used.append(x0)
        )
        return x, used[0]

    return _corrected(denoiser, x, grid, noise, predict, corrections, snr, callback)


def langevin_step(said: Prediction, z: Float[Tensor, "b *d"], snr: float) -> Float[Tensor, "b *d"]:
    """x + (δ/2) ŝ + √δ z, δ = 4 r² s_t², at the prediction's noise level.

    On Gaussian data of variance V at that level, steps without end reach the variance V/(1 − δ/(4V)).
    """
    delta = like((2 * snr * said.denoiser.schedule.sigma(said.t)).square(), z)
    return said.x_t + delta / 2 * said.score + delta.sqrt() * z


def _corrected(
    denoiser: Denoiser, x: Tensor, grid: Tensor, noise: Noise, predict: Callable[[int, Nodes, Tensor], tuple[Tensor, Tensor | None]],
    corrections: int, snr: float, callback: Callback | None,
) -> Tensor:  # fmt: skip
    """Each step: ``predict``, which draws noise i·(corrections + 1) if any, then the corrections, which draw those after it."""
    if corrections < 1 or snr <= 0:
        raise ValueError(f"corrections must be at least 1 and snr above 0, got {corrections} and {snr}")
    nodes = Nodes.of(denoiser.schedule, grid, x)
    for i in range(nodes.steps):
        x, x0 = predict(i, nodes, x)
        if nodes.sigma[i + 1] > 0:
            for j in range(corrections):
                said = denoiser(x, nodes.t[i + 1])
                x, x0 = langevin_step(said, noise(i * (corrections + 1) + 1 + j), snr), said.x0
        assert x0 is not None
        x = after_step(callback, i, x, x0)
    return x
