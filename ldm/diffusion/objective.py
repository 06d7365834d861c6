"""Weightings, learned variance and the training loss (docs/equations.md T1, L1, L2, L4, L10).

A weighting is stated once, as a weight on the squared error of x_0, and converted to the target by
the SNR (``targets.error_ratio``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from ldm.config import ObjectiveConfig
from ldm.diffusion.condition import NO_CONDITION, Condition
from ldm.diffusion.denoiser import Denoiser, Prediction
from ldm.diffusion.guidance import Classifier, Model
from ldm.diffusion.likelihood import decoder_log_likelihood, denoising_kl
from ldm.diffusion.process import posterior_variance, transition
from ldm.diffusion.schedule import Schedule, like
from ldm.diffusion.targets import blind, combine, error_ratio


def target(
    schedule: Schedule, name: str, x0: Float[Tensor, "b *d"], eps: Float[Tensor, "b *d"], t: Int[Tensor, " b"]
) -> Float[Tensor, "b *d"]:
    """The training target: what a network that knows x_0 and ε would predict."""
    return combine(name, x0, eps, like(schedule.alpha(t), x0), like(schedule.sigma(t), x0))


# Weights on ‖Δx_0‖² for t = 0 … T−1, float64 [T].


def simple(schedule: Schedule, config: ObjectiveConfig) -> Float[Tensor, " T"]:
    """Weight 1 on the squared error of the target itself (Ho et al. 2020, L_simple)."""
    return error_ratio(config.target, _snr(schedule))


def min_snr(schedule: Schedule, config: ObjectiveConfig) -> Float[Tensor, " T"]:
    """min(SNR, γ) on x_0 (Hang et al. 2023, section 3.4)."""
    return _snr(schedule).clamp(max=config.min_snr_gamma)


def p2(schedule: Schedule, config: ObjectiveConfig) -> Float[Tensor, " T"]:
    """1/(1 + SNR)^γ on ε, which favours content over detail.

    Choi et al. 2022, eq. 8 with k = 1.
    """
    snr = _snr(schedule)
    return snr / (1 + snr) ** config.p2_gamma


def variational_beta(schedule: Schedule, config: ObjectiveConfig) -> Float[Tensor, " T"]:
    """The terms of the variational bound with reverse variance β_t, in nats, up to a constant.

    β_t/(2 α_t (1 − ᾱ_t)) on ε (Ho et al. 2020, eq. 12). At t = 1 it is the Gaussian density of x_0
    with variance β_1 (L5).
    """
    s, t = _neighbours(schedule)
    return _variational(schedule, transition(schedule, s, t)[1])


def variational_posterior(schedule: Schedule, config: ObjectiveConfig) -> Float[Tensor, " T"]:
    """The same with reverse variance β̃_t: ½(SNR_{t−1} − SNR_t) on x_0.

    As for P5, β̃_1 = 0 is replaced by β̃_2.
    """
    variance = posterior_variance(schedule, *_neighbours(schedule))
    return _variational(schedule, torch.cat([variance[1:2], variance[1:]]))


def score_matching(schedule: Schedule, config: ObjectiveConfig) -> Float[Tensor, " T"]:
    """s_t² on the score, which is L1 on ε.

    L10; denoising score matching, Song & Ermon 2019, eq. 5, 6.
    """
    snr = _snr(schedule)
    return schedule.sigma(_neighbours(schedule)[1]).square() * error_ratio("score", snr)


WEIGHTINGS: dict[str, Callable[[Schedule, ObjectiveConfig], Tensor]] = {
    "simple": simple,
    "min_snr": min_snr,
    "p2": p2,
    "variational_beta": variational_beta,
    "variational_posterior": variational_posterior,
    "score_matching": score_matching,
}


def _neighbours(schedule: Schedule) -> tuple[Tensor, Tensor]:
    """(t − 1, t) for every t."""
    t = torch.arange(schedule.num_steps, device=schedule.betas.device)
    return t - 1, t


def _snr(schedule: Schedule) -> Tensor:
    return schedule.snr(_neighbours(schedule)[1])


def _variational(schedule: Schedule, variance: Tensor) -> Tensor:
    """The weight on x_0 of the KL of two Gaussians of one variance σ², ‖Δmean‖²/(2σ²).

    The posterior's mean moves by (a_s V/s_t²) Δx_0 (P2).
    """
    s, t = _neighbours(schedule)
    shift = schedule.alpha(s) * transition(schedule, s, t)[1] / schedule.sigma(t).square()
    return shift.square() / (2 * variance)


class Terms(NamedTuple):
    """The loss of each sample, and its parts.

    Attributes:
        total: the loss to minimise.
        error: mean‖target − prediction‖² over the elements, unweighted.
        vlb: with a learned variance, the bound as this t estimates it: T · L_t in bits per
            dimension. Else None.
    """

    total: Float[Tensor, " b"]
    error: Float[Tensor, " b"]
    vlb: Float[Tensor, " b"] | None


class Objective:
    """The denoising loss of one configuration. Weights for all T steps are tabulated once.

    Raises ValueError for an ε or score target if the last step holds no signal: there it says
    nothing of x_0.

    Args:
        config: the objective's settings, or its target alone: ``Objective("v", schedule)``.
        pixels: x_0 is an image of 256 levels in [−1, 1]; the bound of a learned variance then takes
            discretised Gaussians at t = 1.
    """

    def __init__(self, config: ObjectiveConfig | str, schedule: Schedule, pixels: bool = False) -> None:
        config = ObjectiveConfig(target=config) if isinstance(config, str) else config
        self.config, self.schedule, self.pixels = config, schedule, pixels
        snr = _snr(schedule)
        if blind(config.target) and bool((snr == 0).any()):
            raise ValueError(f"{config.target} targets are undefined where the SNR is 0: predict v or x0")
        self.weights = WEIGHTINGS[config.weighting](schedule, config) / error_ratio(config.target, snr)

    def loss(
        self,
        model: Model,
        x0: Float[Tensor, "b *d"],
        eps: Float[Tensor, "b *d"],
        t: Int[Tensor, " b"],
        cond: Condition = NO_CONDITION,
    ) -> Float[Tensor, " b"]:
        """The loss of each sample of the batch (means over its elements)."""
        return self.terms(model, x0, eps, t, cond).total

    def terms(
        self,
        model: Model,
        x0: Float[Tensor, "b *d"],
        eps: Float[Tensor, "b *d"],
        t: Int[Tensor, " b"],
        cond: Condition = NO_CONDITION,
    ) -> Terms:
        """w_t · mean‖target − model(x_t, t, c)‖², plus ``vlb_weight`` times the bound (L4).

        The bound is there with a learned variance alone.
        """
        denoiser = Denoiser(
            self.schedule, self.config.target, lambda x_t, t: model(x_t, t, cond), self.config.learned_variance
        )
        pred = denoiser(self.schedule.add_noise(x0, eps, t), t)
        error = (pred.raw - target(self.schedule, self.config.target, x0, eps, t)).square().flatten(1).mean(1)
        weighted = like(self.weights[t], error) * error
        if not self.config.learned_variance:
            return Terms(weighted, error, None)
        # The term of one t is T · L_t, whose mean over uniform t is L_vlb = Σ_t L_t. So the 0.001 L_vlb of Nichol &
        # Dhariwal (2021, eq. 16) is (T/1000) · L_t, with factor 1 at T = 1000; 0.001 · L_t would be T times too weak.
        vlb = self.schedule.num_steps * self._step_bits(pred, x0)
        return Terms(weighted + self.config.vlb_weight * vlb, error, vlb)

    def _step_bits(self, pred: Prediction, x0: Tensor) -> Tensor:
        """L_t in bits, mean over dimensions: a KL, or at t = 0 the decoder's term.

        Its gradient reaches the variance and never the mean.
        """
        pred = replace(pred, raw=pred.raw.detach())
        first = (pred.t == 0).view(-1, *[1] * (x0.ndim - 1))
        decoder = -decoder_log_likelihood(pred, x0, "learned", self.pixels)
        nats = torch.where(first, decoder, denoising_kl(pred, x0, "learned"))
        return nats.flatten(1).mean(1).to(x0.dtype) / math.log(2)


def classifier_loss(
    schedule: Schedule,
    classifier: Classifier,
    x0: Float[Tensor, "b *d"],
    eps: Float[Tensor, "b *d"],
    t: Int[Tensor, " b"],
    label: Int[Tensor, " b"],
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b classes"]]:
    """Cross-entropy −log p(label | x_t, t) of a classifier of noisy samples, and its logits.

    L11; Dhariwal & Nichol 2021.
    """
    logits = classifier(schedule.add_noise(x0, eps, t), t).float()
    return cross_entropy(logits, label, reduction="none"), logits
