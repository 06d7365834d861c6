"""Posterior, transitions between any two steps, and the equivalent predictions (math.md F3, P1, P2, P4)."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from ldm.diffusion.schedule import Schedule, like


def transition(schedule: Schedule, s: Int[Tensor, "*b"], t: Int[Tensor, "*b"]) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    """q(x_t | x_s) = N(ratio · x_s, V I) for s < t (F3): returns (a_t/a_s, V), float64."""
    ratio = schedule.alpha(t) / schedule.alpha(s)
    return ratio, schedule.sigma(t).square() - (ratio * schedule.sigma(s)).square()


def posterior_variance(schedule: Schedule, s: Int[Tensor, "*b"], t: Int[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """Variance V s_s²/s_t² of q(x_s | x_t, x_0) for s < t (P2; β̃_t for neighbours, 0 at s = −1), float64."""
    _, v = transition(schedule, s, t)
    return v * (schedule.sigma(s) / schedule.sigma(t)).square()


def posterior_mean(
    schedule: Schedule, x0: Float[Tensor, "b *d"], x_t: Float[Tensor, "b *d"], s: Int[Tensor, "*k"], t: Int[Tensor, "*k"]
) -> Float[Tensor, "b *d"]:
    """Mean (a_s V/s_t²) x_0 + (a_t s_s²/(a_s s_t²)) x_t of q(x_s | x_t, x_0) for s < t (P1, P2)."""
    ratio, v = transition(schedule, s, t)
    var_t = schedule.sigma(t).square()
    return like(schedule.alpha(s) * v / var_t, x0) * x0 + like(ratio * schedule.sigma(s).square() / var_t, x_t) * x_t


def to_x0(
    schedule: Schedule, target: str, prediction: Float[Tensor, "b *d"], x_t: Float[Tensor, "b *d"], t: Int[Tensor, "*k"]
) -> Float[Tensor, "b *d"]:
    """x̂_0 from a prediction of ``target`` (P4). An ε prediction needs a_t > 0."""
    a, s = like(schedule.alpha(t), x_t), like(schedule.sigma(t), x_t)
    if target == "x0":
        return prediction
    return (x_t - s * prediction) / a if target == "eps" else a * x_t - s * prediction


def to_eps(
    schedule: Schedule, target: str, prediction: Float[Tensor, "b *d"], x_t: Float[Tensor, "b *d"], t: Int[Tensor, "*k"]
) -> Float[Tensor, "b *d"]:
    """ε̂ from a prediction of ``target`` (P4). An x_0 prediction needs s_t > 0."""
    a, s = like(schedule.alpha(t), x_t), like(schedule.sigma(t), x_t)
    if target == "eps":
        return prediction
    return (x_t - a * prediction) / s if target == "x0" else s * x_t + a * prediction
