"""DDPM and DDIM, on the whole chain or any sub-sequence of it (docs/equations.md S1, S2)."""

from __future__ import annotations

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser, Prediction
from ldm.diffusion.guidance import Gradient
from ldm.diffusion.process import posterior_mean, posterior_variance, transition
from ldm.diffusion.samplers.nodes import Callback, Nodes, Noise, after_step, no_noise
from ldm.diffusion.schedule import Schedule, like

VARIANCES = ("posterior", "beta", "learned")


def ddpm(
    denoiser: Denoiser, x: Float[Tensor, "b *d"], grid: Float[Tensor, " nodes"], noise: Noise = no_noise, *,
    variance: str | None = None, mean_shift: Gradient | None = None, callback: Callback | None = None,
) -> Float[Tensor, "b *d"]:  # fmt: skip
    """Ancestral sampling (Ho et al. 2020, Algorithm 2; S1).

    No noise where the step ends at clean data.

    ``variance`` of p(x_s | x_t) (P5): ``posterior`` β̃, ``beta`` (the transition's V), or
    ``learned``; None: learned if the network has learned it, else posterior. The mean is shifted by
    ``mean_shift(x_t, t)`` times that variance (classifier guidance, G2).
    """
    schedule, variance = denoiser.schedule, variance or ("learned" if denoiser.learned_variance else "posterior")
    if variance not in VARIANCES:
        raise ValueError(f"variance must be one of {', '.join(VARIANCES)}, got {variance!r}")
    for i, (t, s) in enumerate(pairwise(Nodes.of(schedule, grid, x).t)):
        pred = denoiser(x, t)
        x0 = pred.x0
        x = posterior_mean(schedule, x0, x, s, t)
        if mean_shift is not None:
            x = x + _deviation(schedule, variance, pred, s, t).square() * mean_shift(pred.x_t, t.expand(len(x)))
        if s >= 0:
            x = x + _deviation(schedule, variance, pred, s, t) * noise(i)
        x = after_step(callback, i, x, x0)
    return x


def _deviation(schedule: Schedule, variance: str, pred: Prediction, s: Tensor, t: Tensor) -> Tensor:
    if variance == "learned":
        return (pred.log_variance(s) / 2).exp()
    value = posterior_variance(schedule, s, t) if variance == "posterior" else transition(schedule, s, t)[1]
    return like(value.sqrt(), pred.x_t)


def ddim(
    denoiser: Denoiser, x: Float[Tensor, "b *d"], grid: Float[Tensor, " nodes"], noise: Noise = no_noise, *,
    eta: float = 0.0, callback: Callback | None = None,
) -> Float[Tensor, "b *d"]:  # fmt: skip
    """x_s = a_s x̂_0 + √(s_s² − σ²) ε̂ + σ z, σ² = η² · posterior variance.

    Song et al. 2021, eq. 12; S2.

    η runs from 0 (deterministic) to 1 (ancestral); ValueError outside. Stable Diffusion's own DDIM
    ends at ᾱ[0] and not at clean data: that is a grid whose last entry is 0.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie between 0 and 1, got {eta}")
    schedule = denoiser.schedule
    for i, (t, s) in enumerate(pairwise(Nodes.of(schedule, grid, x).t)):
        pred = denoiser(x, t)
        x0 = pred.x0
        variance = eta**2 * posterior_variance(schedule, s, t)
        kept = (schedule.sigma(s).square() - variance).clamp(min=0).sqrt()
        x = like(schedule.alpha(s), x) * x0 + like(kept, x) * pred.eps
        if eta > 0 and s >= 0:
            x = x + like(variance.sqrt(), x) * noise(i)
        x = after_step(callback, i, x, x0)
    return x


def ddim_inversion(
    denoiser: Denoiser, x: Float[Tensor, "b *d"], grid: Float[Tensor, " nodes"], *, callback: Callback | None = None
) -> Float[Tensor, "b *d"]:
    """DDIM's steps upwards: the noise from which DDIM with η = 0 returns to ``x``, to first order.

    ``grid`` as for ``ddim``: falling, and ending at the noise level of ``x``. Each step calls the
    network at the noise level of the sample that it holds, or at t = 0 for clean data, on which no
    network is trained (Song et al. 2021, section 4.3; S2).
    """
    schedule = denoiser.schedule
    for i, (s, t) in enumerate(pairwise(Nodes.of(schedule, grid, x).t.flip(0))):
        if s < 0:  # the network's first level stands for clean data
            pred = denoiser(x, s + 1)
            eps, x0 = pred.eps, x
        else:
            pred = denoiser(x, s)
            eps, x0 = pred.eps, pred.x0
        x = after_step(callback, i, like(schedule.alpha(t), x) * x0 + like(schedule.sigma(t), x) * eps, x0)
    return x
