"""Consistency functions and their distillation from a diffusion model (docs/equations.md S6, L13).

A consistency function f maps every point x_t of a path of the probability flow to its end x_0, so
that one call is a sample (Song et al. 2023). In latent space and with classifier-free guidance
inside: latent consistency models (Luo et al. 2023), whose parametrisation this is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ldm.config import DistillConfig
from ldm.diffusion.condition import NO_CONDITION, Condition
from ldm.diffusion.denoiser import Denoise, Denoiser, Prediction
from ldm.diffusion.guidance import Model
from ldm.diffusion.schedule import Schedule, like

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0


def scalings(t: Shaped[Tensor, "*b"]) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    """(c_skip, c_out) = (σ²/(τ² + σ²), τ/√(τ² + σ²)) with τ = 10 t and σ = 0.5, float64 (S6).

    They are 1 and 0 at t = 0 and at clean data, where f returns its input.
    """
    tau = TIMESTEP_SCALING * t.double().clamp(min=0)
    square = tau.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / square, tau / square.sqrt()


def consistency(pred: Prediction) -> Float[Tensor, "b *d"]:
    """f(x_t, t) = c_skip x_t + c_out x̂_0 (S6; Luo et al. 2023, eq. 9)."""
    skip, out = scalings(pred.t)
    return like(skip, pred.x_t) * pred.x_t + like(out, pred.x_t) * pred.x0


def pseudo_huber(difference: Float[Tensor, "b *d"], c: float) -> Float[Tensor, " b"]:
    """√(d² + c²) − c, mean over the elements: d²/2c near 0, |d| far from it."""
    return ((difference.square() + c**2).sqrt() - c).flatten(1).mean(1)


@dataclass(frozen=True)
class Distillation:
    """The loss of a student that learns the consistency function of a teacher's flow (L13).

    Attributes:
        config: number of intervals and c of the loss; guidance is the teacher's.
        schedule, target: of student and teacher.
    """

    config: DistillConfig
    schedule: Schedule
    target: str

    def earlier(self, t: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """The s < t to which the teacher steps: t − T/intervals, or clean data where that is 0 or less."""
        s = t - max(1, self.schedule.num_steps // self.config.intervals)
        return torch.where(s > 0, s, -1)

    def losses(
        self,
        student: Model,
        average: Model,
        teacher: Denoise,
        x0: Float[Tensor, "b *d"],
        eps: Float[Tensor, "b *d"],
        t: Int[Tensor, " b"],
        cond: Condition = NO_CONDITION,
    ) -> Float[Tensor, " b"]:
        """The pseudo-Huber distance of f(x_t, t) to f(x_s, s), x_s a DDIM step of the teacher.

        Luo et al. 2023, Algorithm 1. ``average``: the student with averaged weights, which gives
        f(x_s, s).
        """
        x_t, s = self.schedule.add_noise(x0, eps, t), self.earlier(t)
        with torch.no_grad():
            pred = Denoiser(self.schedule, self.target, teacher)(x_t, t)
            x_s = like(self.schedule.alpha(s), x_t) * pred.x0 + like(self.schedule.sigma(s), x_t) * pred.eps
            end = self._end(average, x_s, s, cond)
        return pseudo_huber(self._end(student, x_t, t, cond) - end, self.config.huber)

    def _end(self, model: Model, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """f(x, t) of a model."""
        return consistency(Denoiser(self.schedule, self.target, lambda x, t: model(x, t, cond))(x, t))
