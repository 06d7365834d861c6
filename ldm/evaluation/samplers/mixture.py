"""Gaussian mixtures, with closed forms of q(x_t), its score and E[x_0 | x_t] (docs/equations.md F6).

A noised mixture is a mixture: x_t = α x_0 + σ ε has the means α μ_k and the covariances α² Σ_k + σ² I.
A finite set of points is a mixture of zero variance, one Gaussian a mixture of one. All in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ldm.diffusion.condition import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import Model
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.targets import TABLE, absent


@dataclass(frozen=True)
class GaussianMixture:
    """Σ_k w_k N(μ_k, Σ_k), with Σ_k given by its axes and the variances along them; see ``of`` and ``points``.

    Noise levels are ``alpha`` and ``sigma``, one number or one per sample; 1 and 0 are clean data.

    Attributes:
        weights: [k], positive, summing to 1.
        means: [k, d].
        variances: [k, d], along the axes.
        axes: [k, d, d], orthogonal, one axis per column; None for those of the coordinates.
    """

    weights: Float[Tensor, " k"]
    means: Float[Tensor, "k d"]
    variances: Float[Tensor, "k d"]
    axes: Float[Tensor, "k d d"] | None = None

    def __post_init__(self) -> None:
        if not bool((self.weights > 0).all()) or abs(float(self.weights.sum()) - 1) > 1e-6:
            raise ValueError(f"weights must be positive and sum to 1, got {self.weights.tolist()}")
        if not bool((self.variances >= 0).all()):
            raise ValueError("variances must not be negative: a covariance has no negative eigenvalue")

    @classmethod
    def of(
        cls, weights: Float[Tensor, " k"], means: Float[Tensor, "k d"], covariances: Float[Tensor, "k *dd"]
    ) -> GaussianMixture:
        """From covariances [k] (isotropic: one variance each) or [k, d, d] (full). Raises ValueError for others."""
        weights, means, covariances = weights.double(), means.double(), covariances.double()
        if covariances.ndim == 1:
            return cls(weights, means, covariances[:, None].expand_as(means))
        if covariances.ndim != 3 or not torch.allclose(covariances, covariances.mT):
            raise ValueError(f"covariances must be [k] or symmetric [k, d, d], got the shape {list(covariances.shape)}")
        variances, axes = torch.linalg.eigh(covariances)
        return cls(weights, means, variances, axes)

    @classmethod
    def points(cls, points: Float[Tensor, "k d"]) -> GaussianMixture:
        """A finite set of equally likely points."""
        return cls.of(torch.full((len(points),), 1 / len(points)), points, torch.zeros(len(points)))

    def component(self, k: int) -> GaussianMixture:
        """q(x_0 | class k): one Gaussian."""
        axes = None if self.axes is None else self.axes[k : k + 1]
        return GaussianMixture(
            torch.ones(1, dtype=torch.float64), self.means[k : k + 1], self.variances[k : k + 1], axes
        )

    def moments(self) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
        """Mean and covariance of x_0."""
        mean = self.weights @ self.means
        away = self.means - mean
        within = torch.diag_embed(self.variances)
        if self.axes is not None:
            within = self.axes @ within @ self.axes.mT
        return mean, torch.einsum("k,kde->de", self.weights, within + away[:, :, None] * away[:, None])

    def log_density(
        self,
        x: Float[Tensor, "b d"],
        alpha: Float[Tensor, "*n"],
        sigma: Float[Tensor, "*n"],
        prior: Float[Tensor, "b k"] | None = None,
    ) -> Float[Tensor, " b"]:
        """log q(x_t) in nats. ``prior``: weights of the components for each sample; one-hot for a class."""
        return torch.logsumexp(self._log_joint(x, alpha, sigma, prior), 1)

    def log_posterior(
        self, x: Float[Tensor, "b d"], alpha: Float[Tensor, "*n"], sigma: Float[Tensor, "*n"]
    ) -> Float[Tensor, "b k"]:
        """log q(class | x_t): the exact classifier, differentiable in x."""
        return torch.log_softmax(self._log_joint(x, alpha, sigma, None), 1)

    def score(
        self,
        x: Float[Tensor, "b d"],
        alpha: Float[Tensor, "*n"],
        sigma: Float[Tensor, "*n"],
        prior: Float[Tensor, "b k"] | None = None,
    ) -> Float[Tensor, "b d"]:
        """∇ log q(x_t)."""
        away, variances = self._away(x, alpha, sigma)
        return self._mixed(self._log_joint(x, alpha, sigma, prior), self._turned_back(-away / variances))

    def denoised(
        self,
        x: Float[Tensor, "b d"],
        alpha: Float[Tensor, "*n"],
        sigma: Float[Tensor, "*n"],
        prior: Float[Tensor, "b k"] | None = None,
    ) -> Float[Tensor, "b d"]:
        """E[x_0 | x_t]."""
        away, variances = self._away(x, alpha, sigma)
        gain = _column(alpha) * self.variances / variances
        return self._mixed(self._log_joint(x, alpha, sigma, prior), self.means + self._turned_back(gain * away))

    def draw(
        self, n: int, generator: torch.Generator | None = None, alpha: float = 1.0, sigma: float = 0.0
    ) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]:
        """Draw n samples of x_t; returns them and their components."""
        of = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], dtype=torch.float64, generator=generator)
        z = (alpha**2 * self.variances[of] + sigma**2).sqrt() * z
        return alpha * self.means[of] + (z if self.axes is None else torch.einsum("nde,ne->nd", self.axes[of], z)), of

    def denoiser(self, schedule: Schedule, target: str) -> Denoiser:
        """The perfectly trained denoiser of this data, for the given ``target``."""
        model = self.model(schedule, target)
        return Denoiser(schedule, target, lambda x_t, t: model(x_t, t, Condition()))

    def model(self, schedule: Schedule, target: str) -> Model:
        """The same with conditions, for guidance: ``vector`` [b, k] is a one-hot class.

        Its entries multiply the weights of the mixture, so all ones, or no vector, is q(x_t) without a class.
        """

        def predict(x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
            x, a, s = x_t.double().flatten(1), schedule.alpha(t), schedule.sigma(t)
            prior = None if cond.vector is None else cond.vector.double() * self.weights
            row, terms = TABLE[target](_row(a), _row(s)), []
            if not absent(row.p):  # ε is −s times the score
                terms.append(-_row(s) * row.p / row.r * self.score(x, a, s, prior))
            if not absent(row.q):
                terms.append(row.q / row.r * self.denoised(x, a, s, prior))
            return reduce(torch.add, terms).to(x_t.dtype).reshape(x_t.shape)

        return predict

    def _away(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """x − α μ_k [b, k, d] and the variances α² Σ_k + σ² I, both in the frames of the axes."""
        away = x.double()[:, None] - _column(alpha) * self.means
        if self.axes is not None:
            away = torch.einsum("bkd,kde->bke", away, self.axes)
        return away, _column(alpha) ** 2 * self.variances + _column(sigma) ** 2

    def _turned_back(self, along: Tensor) -> Tensor:
        """From the frames of the axes to coordinates, [b, k, d]."""
        return along if self.axes is None else torch.einsum("bke,kde->bkd", along, self.axes)

    def _log_joint(self, x: Tensor, alpha: Tensor, sigma: Tensor, prior: Tensor | None) -> Tensor:
        """log w_k + log q(x_t | class k), [b, k]."""
        away, variances = self._away(x, alpha, sigma)
        if bool((variances == 0).any()):
            raise ValueError("a point without noise has no density: sigma or the variance must be above 0")
        weights = self.weights if prior is None else prior / prior.sum(1, keepdim=True)
        return torch.log(weights) - (away.square() / variances + torch.log(2 * math.pi * variances)).sum(2) / 2

    @staticmethod
    def _mixed(log_joint: Tensor, parts: Tensor) -> Tensor:
        return (torch.softmax(log_joint, 1)[:, :, None] * parts).sum(1)


def _row(level: Tensor) -> Tensor:
    return level.reshape(-1, 1)


def _column(level: Tensor) -> Tensor:
    """Reshape one number or one per sample to broadcast against [b, k, d]."""
    return level.double().reshape(-1, 1, 1)
