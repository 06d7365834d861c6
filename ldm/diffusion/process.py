"""Transition, posterior and learned variance of any two steps, and equivalent predictions.

Formulas F3, P1, P2, P4 and P5 of docs/equations.md.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ldm.diffusion import targets
from ldm.diffusion.schedule import Schedule, like


def transition(
    schedule: Schedule, s: Shaped[Tensor, "*b"], t: Shaped[Tensor, "*b"]
) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    """q(x_t | x_s) = N(ratio · x_s, V I) for s < t (F3): returns (a_t/a_s, V), float64."""
    ratio = schedule.alpha(t) / schedule.alpha(s)
    return ratio, schedule.sigma(t).square() - (ratio * schedule.sigma(s)).square()


def posterior_variance(schedule: Schedule, s: Shaped[Tensor, "*b"], t: Shaped[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """Variance V s_s²/s_t² of q(x_s | x_t, x_0) for s < t (P2), float64.

    It is β̃_t for neighbours, and 0 at s = −1.
    """
    _, v = transition(schedule, s, t)
    return v * (schedule.sigma(s) / schedule.sigma(t)).square()


def posterior_mean(
    schedule: Schedule,
    x0: Float[Tensor, "b *d"],
    x_t: Float[Tensor, "b *d"],
    s: Shaped[Tensor, "*k"],
    t: Shaped[Tensor, "*k"],
) -> Float[Tensor, "b *d"]:
    """Mean (a_s V/s_t²) x_0 + (a_t s_s²/(a_s s_t²)) x_t of q(x_s | x_t, x_0) for s < t (P1, P2)."""
    ratio, v = transition(schedule, s, t)
    var_t = schedule.sigma(t).square()
    return like(schedule.alpha(s) * v / var_t, x0) * x0 + like(ratio * schedule.sigma(s).square() / var_t, x_t) * x_t


def learned_log_variance(
    schedule: Schedule, output: Float[Tensor, "b *d"], s: Shaped[Tensor, "*k"], t: Shaped[Tensor, "*k"]
) -> Float[Tensor, "b *d"]:
    """ν log V + (1−ν) log β̃ with ν = (output + 1)/2, not clamped.

    P5; Nichol & Dhariwal 2021, eq. 15.

    Where s is clean data the posterior's variance is 0, and that of the pair (0, 1) takes its
    place.
    """
    _, v = transition(schedule, s, t)
    small = torch.where(
        s < 0, posterior_variance(schedule, s.clamp(min=0), t.clamp(min=1)), posterior_variance(schedule, s, t)
    )
    nu = (output + 1) / 2
    return nu * like(torch.log(v), output) + (1 - nu) * like(torch.log(small), output)


def _levels(schedule: Schedule, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(a_t, s_t) as coefficients of ``x``."""
    return like(schedule.alpha(t), x), like(schedule.sigma(t), x)


def to_x0(
    schedule: Schedule,
    target: str,
    prediction: Float[Tensor, "b *d"],
    x_t: Float[Tensor, "b *d"],
    t: Shaped[Tensor, "*k"],
) -> Float[Tensor, "b *d"]:
    """x̂_0 from a prediction of ``target`` (P4). Predictions of ε and of the score need a_t > 0."""
    return targets.to_x0(target, prediction, x_t, *_levels(schedule, x_t, t))


def to_eps(
    schedule: Schedule,
    target: str,
    prediction: Float[Tensor, "b *d"],
    x_t: Float[Tensor, "b *d"],
    t: Shaped[Tensor, "*k"],
) -> Float[Tensor, "b *d"]:
    """ε̂ from a prediction of ``target`` (P4). An x_0 prediction needs s_t > 0."""
    return targets.to_eps(target, prediction, x_t, *_levels(schedule, x_t, t))


def from_x0(
    schedule: Schedule, target: str, x0: Float[Tensor, "b *d"], x_t: Float[Tensor, "b *d"], t: Shaped[Tensor, "*k"]
) -> Float[Tensor, "b *d"]:
    """The prediction of ``target`` that amounts to x̂_0 (P4). For all but x_0 it needs s_t > 0."""
    return targets.from_x0(target, x0, x_t, *_levels(schedule, x_t, t))


def score(
    schedule: Schedule,
    target: str,
    prediction: Float[Tensor, "b *d"],
    x_t: Float[Tensor, "b *d"],
    t: Shaped[Tensor, "*k"],
) -> Float[Tensor, "b *d"]:
    """∇ log q(x_t) as the prediction estimates it: −ε̂/s_t (P4). Needs s_t > 0."""
    return -to_eps(schedule, target, prediction, x_t, t) / like(schedule.sigma(t), x_t)
