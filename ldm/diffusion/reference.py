"""Reference forms: formulas that no command calls.

docs/equations.md cites them, and tests compare the rest of the package with them: a single forward
step (F1), the reverse mean from ε (P3), Gaussians with full covariances (B1), and the joint
distributions of a chain with the gap of the variational bound (F7, L9).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ldm.diffusion import gaussian
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.likelihood import Noise, Variance, decoder_log_likelihood, reverse_log_variance
from ldm.diffusion.process import posterior_mean, transition
from ldm.diffusion.schedule import Schedule, like

# ---------------------------------------------------------------- Steps


def forward_step(
    schedule: Schedule, x: Float[Tensor, "b *d"], z: Float[Tensor, "b *d"], t: Shaped[Tensor, "*k"]
) -> Float[Tensor, "b *d"]:
    """√(1−β_t) x_{t−1} + √β_t z, a draw from q(x_t | x_{t−1}) (F1; z standard normal)."""
    beta = schedule.betas[t]
    return like((1 - beta).sqrt(), x) * x + like(beta.sqrt(), x) * z


def reverse_mean(
    schedule: Schedule,
    eps: Float[Tensor, "b *d"],
    x_t: Float[Tensor, "b *d"],
    s: Shaped[Tensor, "*k"],
    t: Shaped[Tensor, "*k"],
) -> Float[Tensor, "b *d"]:
    """(a_s/a_t)(x_t − (V/s_t) ε) for s < t (P3): the posterior's mean with x̂_0 of ε.

    Needs a_t > 0.
    """
    ratio, v = transition(schedule, s, t)
    return (x_t - like(v / schedule.sigma(t), x_t) * eps) / like(ratio, x_t)


# ---------------------------------------------------------------- Gaussians with full covariances


def log_density_full(
    x: Float[Tensor, "*b d"], mean: Float[Tensor, "... d"], covariance: Float[Tensor, "... d d"]
) -> Float[Tensor, "*b"]:
    """log N(x; mean, Σ). Raises ValueError for a Σ that is not positive definite."""
    factor = _cholesky(covariance)
    return -0.5 * (_mahalanobis(factor, x - mean) + _log_det(factor) + x.shape[-1] * math.log(2 * math.pi))


def entropy_full(covariance: Float[Tensor, "*b d d"]) -> Float[Tensor, "*b"]:
    """½(d + d log 2π + log|Σ|). Raises ValueError for a Σ that is not positive definite."""
    return 0.5 * (covariance.shape[-1] * (1 + math.log(2 * math.pi)) + _log_det(_cholesky(covariance)))


def kl_full(
    mean: Float[Tensor, "*b d"],
    covariance: Float[Tensor, "*b d d"],
    other_mean: Float[Tensor, "*b d"],
    other_covariance: Float[Tensor, "*b d d"],
) -> Float[Tensor, "*b"]:
    """½[log|Σ₂|/|Σ₁| − d + tr(Σ₂⁻¹Σ₁) + Δμᵀ Σ₂⁻¹ Δμ].

    Raises ValueError for a Σ that is not positive definite.
    """
    one, two = _cholesky(covariance), _cholesky(other_covariance)
    trace = torch.linalg.solve_triangular(two, one, upper=False).square().sum((-2, -1))
    return 0.5 * (_log_det(two) - _log_det(one) - mean.shape[-1] + trace + _mahalanobis(two, mean - other_mean))


def _cholesky(covariance: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if bool(failed.any()) or not torch.allclose(covariance, covariance.mT):
        raise ValueError("a covariance must be symmetric and positive definite")
    return factor


def _log_det(factor: Tensor) -> Tensor:
    return 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _mahalanobis(factor: Tensor, difference: Tensor) -> Tensor:
    """|L⁻¹Δ|² for the Cholesky factor L."""
    return torch.linalg.solve_triangular(factor, difference[..., None], upper=False).square().sum((-2, -1))


# ---------------------------------------------------------------- Joint distributions of a chain x_{0:T}


def draw_chain(schedule: Schedule, x0: Float[Tensor, "b *d"], noise: Noise) -> Float[Tensor, "nodes b *d"]:
    """A draw from q(x_{1:T} | x_0) after x_0 itself: T + 1 nodes, node i + 1 at t = i."""
    chain = [x0]
    for t in range(schedule.num_steps):
        chain.append(forward_step(schedule, chain[-1], noise(t), torch.tensor(t)))
    return torch.stack(chain)


def log_forward(schedule: Schedule, chain: Float[Tensor, "nodes b *d"]) -> Float[Tensor, " b"]:
    """log q(x_{1:T} | x_0) of a chain (F7)."""
    log_beta = torch.log(schedule.betas)
    decay = torch.sqrt(1 - schedule.betas)
    terms = [
        gaussian.log_density(chain[t + 1].double(), decay[t] * chain[t].double(), log_beta[t])
        for t in range(schedule.num_steps)
    ]
    return torch.stack([_summed(term) for term in terms]).sum(0)


def log_reverse(
    denoiser: Denoiser, chain: Float[Tensor, "nodes b *d"], variance: Variance, pixels: bool = False
) -> Float[Tensor, " b"]:
    """log p(x_{0:T}) of a chain: the prior, the reverse steps and the decoder (F7)."""
    zero = torch.zeros((), dtype=torch.float64, device=chain.device)
    total = _summed(gaussian.log_density(chain[-1].double(), zero, zero))
    for t in range(denoiser.schedule.num_steps - 1, 0, -1):
        pred = denoiser(chain[t + 1], torch.tensor(t, device=chain.device))
        mean = posterior_mean(denoiser.schedule, pred.x0.double(), pred.x_t.double(), pred.t - 1, pred.t)
        total = total + _summed(gaussian.log_density(chain[t].double(), mean, reverse_log_variance(pred, variance)))
    pred = denoiser(chain[1], torch.tensor(0, device=chain.device))
    return total + _summed(decoder_log_likelihood(pred, chain[0], variance, pixels))


def gap(
    denoiser: Denoiser,
    chain: Float[Tensor, "nodes b *d"],
    log_p: Float[Tensor, " b"],
    variance: Variance,
    pixels: bool = False,
) -> Float[Tensor, " b"]:
    """log q(x_{1:T}|x_0) − log p(x_{1:T}|x_0) of a chain, given log p(x_0) of the model (L9).

    Its mean over chains is the KL of the joints, by which the bound misses −log p(x_0).
    """
    return log_forward(denoiser.schedule, chain) - log_reverse(denoiser, chain, variance, pixels) + log_p


def _summed(values: Float[Tensor, "b *d"]) -> Float[Tensor, " b"]:
    return values.flatten(1).sum(1)
