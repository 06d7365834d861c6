"""The variational bound on log p(x_0) in nats, step by step (docs/equations.md F4, L3).

    −log p(x_0) ≤ −E[log p(x_0|x_1)] + KL(q(x_T|x_0) ‖ N(0, I))
                  + Σ_{t≥2} E[KL(q(x_{t−1}|x_t, x_0) ‖ p_θ(x_{t−1}|x_t))]

with t = 1 … T as in the papers; in the code x_1 is t = 0 and the sum runs over t = 1 … T−1. Network
outputs keep their dtype; everything after them is float64, since the terms of small t are small
differences of large numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ldm.diffusion import gaussian
from ldm.diffusion.denoiser import Denoiser, Prediction
from ldm.diffusion.process import learned_log_variance, posterior_mean
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.targets import blind

# posterior, beta or learned (P5), or variance(prediction, s, t): the log variance of p(x_s | x_t), of the shape of x
Variance = str | Callable[[Prediction, Tensor, Tensor], Tensor]
Noise = Callable[[int], Tensor]  # noise(i): the i-th standard normal array, as for samplers

ENDS = {"posterior": -1.0, "beta": 1.0}  # the fixed variances are the ends of the learned range (P5)


def prior_kl(schedule: Schedule, x0: Float[Tensor, "b *d"]) -> Float[Tensor, "b *d"]:
    """KL(q(x_T | x_0) ‖ N(0, I)) of each dimension, ½(ᾱ_T(x_0² − 1) − log(1 − ᾱ_T)) (F4)."""
    last, x0 = torch.tensor(schedule.num_steps - 1, device=x0.device), x0.double()
    zero = x0.new_zeros(())
    return gaussian.kl(schedule.alpha(last) * x0, 2 * torch.log(schedule.sigma(last)), zero, zero)


def reverse_log_variance(pred: Prediction, variance: Variance) -> Float[Tensor, "b *d"]:
    """The log variance of p(x_{t−1} | x_t) (P5).

    At t = 0, where β̃ is 0, ``posterior`` is that of t = 1.
    """
    s = pred.t - 1
    if callable(variance):
        return variance(pred, s, pred.t)
    if variance == "learned":
        return pred.log_variance(s).double()
    if variance not in ENDS:
        raise ValueError(f"variance must be one of {', '.join(ENDS)}, learned, or a function, got {variance!r}")
    return learned_log_variance(
        pred.denoiser.schedule, torch.full_like(pred.x_t, ENDS[variance], dtype=torch.float64), s, pred.t
    )


def denoising_kl(pred: Prediction, x0: Float[Tensor, "b *d"], variance: Variance) -> Float[Tensor, "b *d"]:
    """KL(q(x_{t−1} | x_t, x_0) ‖ p_θ(x_{t−1} | x_t)) of each dimension, at t ≥ 1."""
    schedule, t, x_t = pred.denoiser.schedule, pred.t, pred.x_t.double()
    mean, guess = (posterior_mean(schedule, x.double(), x_t, t - 1, t) for x in (x0, pred.x0))
    return gaussian.kl(mean, reverse_log_variance(pred, "posterior"), guess, reverse_log_variance(pred, variance))


def decoder_log_likelihood(
    pred: Prediction, x0: Float[Tensor, "b *d"], variance: Variance, pixels: bool
) -> Float[Tensor, "b *d"]:
    """log p(x_0 | x_t) of each dimension, for a prediction at t = 0 (L5).

    A density, or for ``pixels`` the mass of an 8-bit pixel's bin.
    """
    score = gaussian.discretised_log_probability if pixels else gaussian.log_density
    return score(x0.double(), pred.x0.double(), reverse_log_variance(pred, variance))


@dataclass(frozen=True)
class Steps:
    """The t of 1 … T−1 that are evaluated for each sample, and their weights.

    Σ_k weight_k · L(t_k) estimates Σ_t L(t).
    """

    t: Int[Tensor, "b k"]
    weight: Float[Tensor, "b k"]


def all_steps(schedule: Schedule, batch: int) -> Steps:
    """Every step once."""
    t = torch.arange(1, schedule.num_steps, device=schedule.betas.device).expand(batch, -1)
    return Steps(t, torch.ones_like(t, dtype=torch.float64))


def step_probabilities(schedule: Schedule) -> Float[Tensor, " steps"]:
    """Probabilities with which ``drawn_steps`` draws each of t = 1 … T−1.

    Half of it is uniform, half in proportion to ᾱ_t (λ_{t−1} − λ_t), the bits of step t for data
    N(0, I): small t are drawn most, and no weight exceeds 2 (T−1)/k. All of it is uniform where no
    step holds any signal (T = 2, the last step without signal).
    """
    expected = schedule.alphas_cumprod[1:] * -schedule.half_log_snr_table.diff()
    expected = torch.where(expected.sum() > 0, expected, 1.0)
    return 0.5 / len(expected) + 0.5 * expected / expected.sum()


def drawn_steps(schedule: Schedule, uniform: Float[Tensor, "b k"]) -> Steps:
    """k steps for each sample, one in each k-th part of ``step_probabilities``, from draws in [0, 1).

    Stratified and unbiased.
    """
    k, probability = uniform.shape[1], step_probabilities(schedule)
    place = (torch.arange(k, device=uniform.device) + uniform.double()) / k
    index = torch.searchsorted(probability.cumsum(0), place, right=True).clamp(max=len(probability) - 1)
    return Steps(index + 1, 1 / (k * probability[index]))


@dataclass(frozen=True)
class Bound:
    """An upper bound of −log p(x_0) for each sample, in nats summed over its dimensions (L3).

    Attributes:
        reconstruction: −log p(x_0 | x_t) at t = 0.
        prior: KL at t = T−1.
        steps: which KLs between them were evaluated.
        denoising: those KLs times their weights.
    """

    reconstruction: Float[Tensor, " b"]
    prior: Float[Tensor, " b"]
    steps: Steps
    denoising: Float[Tensor, "b k"]

    @property
    def total(self) -> Float[Tensor, " b"]:
        """The sum of the three parts."""
        return self.reconstruction + self.prior + self.denoising.sum(1)


def bounds(
    denoiser: Denoiser,
    x0: Float[Tensor, "b *d"],
    noise: Noise,
    steps: Steps,
    variances: Sequence[Variance],
    pixels: bool = False,
) -> list[Bound]:
    """The bound with each reverse variance, all from the same k + 1 network calls.

    ``noise(0)`` makes x_t at t = 0, ``noise(i)`` at the i-th of the steps. ``pixels``: x_0 is an
    8-bit image and its likelihood a probability; otherwise a density. Raises ValueError for an ε or
    score prediction where a step has no signal.
    """
    schedule = denoiser.schedule
    if blind(denoiser.target) and bool(schedule.alphas_cumprod[-1] == 0):
        raise ValueError(
            f"the bound needs x̂_0 at every step, which {denoiser.target} does not give where the SNR is 0: "
            "predict v or x0"
        )

    def pred(t: Shaped[Tensor, " b"], number: int) -> Prediction:
        return denoiser(schedule.add_noise(x0, noise(number), t), t)

    first = pred(torch.zeros(len(x0), dtype=torch.long, device=x0.device), 0)
    reconstruction = [-_summed(decoder_log_likelihood(first, x0, variance, pixels)) for variance in variances]
    denoising: list[list[Tensor]] = [[] for _ in variances]
    for i, (t, weight) in enumerate(zip(steps.t.unbind(1), steps.weight.unbind(1), strict=True)):
        prediction = pred(t, i + 1)
        for terms, variance in zip(denoising, variances, strict=True):
            terms.append(weight * _summed(denoising_kl(prediction, x0, variance)))
    prior = _summed(prior_kl(schedule, x0))
    return [Bound(r, prior, steps, torch.stack(d, 1)) for r, d in zip(reconstruction, denoising, strict=True)]


def two_stage_bound(
    log_p_image: Float[Tensor, "*b"], log_q_latent: Float[Tensor, "*b"], latent: Float[Tensor, "*b"]
) -> Float[Tensor, "*b"]:
    """An upper bound of −log p(x) of an autoencoder whose prior is a diffusion model (L6).

    In nats, summed over dimensions. −log p(x) ≤ E_{z∼q(z|x)} [−log p(x|z) + log q(z|x) + bound of
    −log p(z)], the arguments with their own signs.
    """
    return latent - log_p_image + log_q_latent


def bits_per_dimension(nats: Float[Tensor, "*b"], dimensions: int) -> Float[Tensor, "*b"]:
    """Bits per dimension of nats summed over an image (L6).

    ``dimensions``: C·H·W of the ORIGINAL image.
    """
    return nats / (dimensions * math.log(2))


def _summed(values: Float[Tensor, "b *d"]) -> Float[Tensor, " b"]:
    return values.flatten(1).sum(1)
