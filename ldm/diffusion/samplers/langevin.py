"""Langevin samplers: annealed, and as the corrector after a predictor (docs/equations.md S4).

A Langevin step at one noise level is x ← x + (δ/2) ∇log q(x_t) + √δ z, with δ = 4 r² s_t²: in
proportion to the variance, as in Song & Ermon 2019. The signal-to-noise ratio r is that of Song et
al. 2021 (Algorithm 4; their ε is δ/2), whose step is δ = 4 (r ‖z‖/‖∇log q‖)². Here the ratio of the
norms is s_t, its value for the kernel's score −ε/s_t. Their code averages the norms over the batch,
so that an image would depend on its neighbours; the norms of each sample alone would make the step
depend on x and z, which changes the stationary distribution. As steps double at one r, the error
that remains is that of the Langevin steps, of order r².
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser, Prediction
from ldm.diffusion.samplers.ancestral import ddim
from ldm.diffusion.samplers.nodes import Callback, Nodes, Noise, after_step, no_noise
from ldm.diffusion.schedule import like

PER_LEVEL = 5  # Langevin steps at each level of annealed dynamics
SNR = 0.16  # r of the corrector, as published for images

# predict(step, nodes, x) -> x at the next node, and the x̂_0 that it used, if any
Predict = Callable[[int, Nodes, Tensor], tuple[Tensor, Tensor | None]]


def annealed_langevin(
    denoiser: Denoiser, x: Float[Tensor, "b *d"], grid: Float[Tensor, " nodes"], noise: Noise = no_noise, *,
    corrections: int = PER_LEVEL, snr: float = 0.3, callback: Callback | None = None,
) -> Float[Tensor, "b *d"]:  # fmt: skip
    """Annealed Langevin dynamics: ``corrections`` steps at each noise level after the first.

    The original (Song & Ermon 2019, Algorithm 1; S4) keeps x from one level to the next, in a
    process that only adds noise. Its x is x_t/a_t here, so the sample is multiplied by a_s/a_t.
    Where the grid ends at clean data, the last step is x̂_0, one call (Song & Ermon 2020).
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
    """A DDIM step to each level (η = 1: ancestral), then ``corrections`` Langevin steps.

    Song et al. 2021, Algorithm 1; S4. No correction at clean data. The factor 1 − β of their
    Algorithm 5 is left out of δ: a sub-sequence has no β.
    """

    def predict(i: int, nodes: Nodes, x: Tensor) -> tuple[Tensor, Tensor | None]:
        used: list[Tensor] = []  # the x̂_0 of the step

        def keep(step: int, x: Tensor, x0: Tensor) -> None:
            used.append(x0)

        draw = i * (corrections + 1)
        x = ddim(denoiser, x, nodes.t[i : i + 2], lambda _: noise(draw), eta=eta, callback=keep)
        return x, used[0]

    return _corrected(denoiser, x, grid, noise, predict, corrections, snr, callback)


def langevin_step(pred: Prediction, z: Float[Tensor, "b *d"], snr: float) -> Float[Tensor, "b *d"]:
    """x + (δ/2) ŝ + √δ z, δ = 4 r² s_t², at the prediction's noise level.

    On Gaussian data of variance V at that level, repeated steps converge to variance
    V/(1 − δ/(4V)).
    """
    delta = like((2 * snr * pred.denoiser.schedule.sigma(pred.t)).square(), z)
    return pred.x_t + delta / 2 * pred.score + delta.sqrt() * z


def _corrected(
    denoiser: Denoiser, x: Tensor, grid: Tensor, noise: Noise, predict: Predict, corrections: int, snr: float,
    callback: Callback | None,
) -> Tensor:  # fmt: skip
    """Run ``predict`` and then the corrections at each step.

    ``predict`` draws noise number i·(corrections + 1), if any; the corrections draw those after it.
    """
    if corrections < 1 or snr <= 0:
        raise ValueError(f"corrections must be at least 1 and snr above 0, got {corrections} and {snr}")
    nodes = Nodes.of(denoiser.schedule, grid, x)
    for i in range(nodes.steps):
        x, x0 = predict(i, nodes, x)
        if nodes.sigma[i + 1] > 0:
            for j in range(corrections):
                pred = denoiser(x, nodes.t[i + 1])
                x, x0 = langevin_step(pred, noise(i * (corrections + 1) + 1 + j), snr), pred.x0
        assert x0 is not None
        x = after_step(callback, i, x, x0)
    return x
