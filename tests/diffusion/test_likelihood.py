"""The bound against closed forms, quadrature and Monte Carlo; `ldm evaluate --likelihood` against both."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy.stats import norm
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from autoencoder.config import AutoencoderConfig
from autoencoder.loss import vae_bound
from autoencoder.model import AutoencoderKL
from autoencoder.posterior import DiagonalGaussian
from ldm import config as configuration
from ldm.cli.main import main
from ldm.config import TARGETS, DataConfig, DiffusionTrainingConfig, SampleConfig, ScheduleConfig, UNetConfig
from ldm.data.sample import BadSample, Sample, Skipped
from ldm.data.sources import open_source
from ldm.diffusion import gaussian
from ldm.diffusion.denoiser import Denoiser, Prediction
from ldm.diffusion.likelihood import (
    Bound,
    Steps,
    Variance,
    all_steps,
    bits_per_dimension,
    bounds,
    drawn_steps,
    prior_kl,
    step_probabilities,
    two_stage_bound,
)
from ldm.diffusion.process import from_x0
from ldm.diffusion.reference import draw_chain, gap, kl_full, log_forward, log_reverse
from ldm.diffusion.schedule import Schedule
from ldm.distributed.processes import ALONE, Processes
from ldm.evaluation import decoder_noise
from ldm.evaluation.figures import plots
from ldm.evaluation.likelihood import likelihood, measure
from ldm.models.unet import UNet
from ldm.pipeline import Pipeline
from ldm.pipeline.codec import LatentCodec
from ldm.runs.records import report_metrics

pytestmark = pytest.mark.usefixtures("seed")

# ---------------------------------------------------------------- Gaussian data, with expectations taken exactly

MEANS = torch.tensor([0.0, 0.7, -1.2], dtype=torch.float64)  # of data with independent dimensions
VARIANCES = torch.tensor([1.0, 0.04, 2.5], dtype=torch.float64)
ENTROPY = 0.5 * torch.log(2 * math.pi * math.e * VARIANCES).sum()

# Gauss–Hermite nodes of two draws, of x_0 and of the noise: every term is quadratic in them, so three nodes are exact
_ROOT = math.sqrt(3.0)
_NODES = torch.tensor([-_ROOT, 0.0, _ROOT], dtype=torch.float64)
_WEIGHTS = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)
OF_X0, OF_NOISE = (grid.flatten() for grid in torch.meshgrid(_NODES, _NODES, indexing="ij"))
WEIGHTS = (_WEIGHTS[:, None] * _WEIGHTS).flatten()  # [9]


def expected(values: Tensor) -> Tensor:
    """E of what was computed at the nodes, [9, …]."""
    return (WEIGHTS.reshape(-1, *[1] * (values.ndim - 1)) * values).sum(0)


def data() -> Tensor:
    return MEANS + VARIANCES.sqrt() * OF_X0[:, None]


def exact(schedule: Schedule, target: str = "v") -> Denoiser:
    """E[x_0 | x_t] of the data, in the words of ``target``."""

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        a, s = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        x0 = MEANS + a * VARIANCES / (a**2 * VARIANCES + s**2) * (x_t - a * MEANS)
        return from_x0(schedule, target, x0, x_t, t)

    return Denoiser(schedule, target, predict)


def reverse_variance(schedule: Schedule, t: Tensor) -> Tensor:
    """Variance of x_{t−1} given x_t alone, by conditioning their joint Gaussian; [b, d]."""
    step = schedule.betas[t][:, None]
    before = schedule.alpha(t - 1)[:, None].square() * VARIANCES + schedule.sigma(t - 1)[:, None].square()
    return before - (1 - step) * before**2 / ((1 - step) * before + step)


def exact_variance(said: Prediction, s: Tensor, t: Tensor) -> Tensor:
    return torch.log(reverse_variance(said.denoiser.schedule, t))


def whole(denoiser: Denoiser, *variances: Variance, x0: Tensor | None = None) -> list[Bound]:
    """The bound at the nodes with every step, all steps in one batch: a row is a node at one step."""
    every = all_steps(denoiser.schedule, 9)
    n = every.t.shape[1]
    rows = Steps(every.t.T.reshape(-1, 1), every.weight.T.reshape(-1, 1))
    x0 = data() if x0 is None else x0
    found = bounds(
        denoiser, x0.repeat(n, 1), lambda _: OF_NOISE.repeat(n)[:, None].expand(-1, len(MEANS)), rows, variances
    )
    return [Bound(b.reconstruction[:9], b.prior[:9], every, b.denoising.reshape(n, 9).T) for b in found]


def marginal_gap(schedule: Schedule) -> Tensor:
    """KL(q(x_T) ‖ N(0, I)), what is left of the prior term when all else is exact."""
    a = schedule.alphas_cumprod[-1]
    ends = Normal(a.sqrt() * MEANS, (a * VARIANCES + 1 - a).sqrt())
    return kl_divergence(ends, Normal(torch.zeros(()).double(), torch.ones(()).double())).sum()


@pytest.mark.parametrize("name", ["linear", "cosine", "scaled_linear"])
def test_the_bound_of_gaussian_data_is_their_entropy(name: str) -> None:
    """Exact denoiser, exact reverse variance: nothing is lost but what the last step still knows of the data."""
    schedule = Schedule.from_config(ScheduleConfig(name))
    (bound,) = whole(exact(schedule), exact_variance)
    per_dimension = expected(bound.total) / len(MEANS)
    torch.testing.assert_close(per_dimension, (ENTROPY + marginal_gap(schedule)) / len(MEANS), rtol=0, atol=1e-8)
    if name != "scaled_linear":  # whose last SNR is 4.7e-3
        assert abs(per_dimension - ENTROPY / len(MEANS)) < 1e-3


@pytest.mark.parametrize("target", TARGETS)
def test_another_reverse_variance_misses_by_the_closed_form_gap(target: str) -> None:
    """Σ_t KL(N(m, τ_t²) ‖ N(m, σ_t²)), τ² the exact reverse variance and σ² = β or β̃, the decoder's step among them."""
    schedule = Schedule.from_config(ScheduleConfig("linear", 200, 5e-4, 0.1))
    t = torch.arange(200)
    beta = schedule.betas
    bar = schedule.alphas_cumprod
    posterior = torch.cat([beta[1:2] * (1 - bar[0]) / (1 - bar[1]), beta[1:] * (1 - bar[:-1]) / (1 - bar[1:])])
    for name, variance in (("beta", beta), ("posterior", posterior)):
        ratio = reverse_variance(schedule, t) / variance[:, None]
        missed = 0.5 * (ratio - 1 - ratio.log()).sum()
        (bound,) = whole(exact(schedule, target), name)
        torch.testing.assert_close(
            expected(bound.total), ENTROPY + marginal_gap(schedule) + missed, rtol=1e-9, atol=1e-8
        )
        assert missed > 0.01


def test_the_parts_are_the_closed_forms() -> None:
    """Each step of the bound on its own: ½(SNR_{t−1} − SNR_t) Var[x_0|x_t] for β̃, ends included."""
    schedule = Schedule.from_config(ScheduleConfig("cosine", 50))
    (bound,) = whole(exact(schedule), "posterior")
    snr = schedule.snr(torch.arange(50))
    left = VARIANCES / (1 + snr[1:, None] * VARIANCES)  # Var[x_0 | x_t]
    torch.testing.assert_close(expected(bound.denoising), (0.5 * (snr[:-1] - snr[1:])[:, None] * left).sum(1))
    torch.testing.assert_close(bound.total, bound.reconstruction + bound.prior + bound.denoising.sum(1))
    first = VARIANCES / (1 + snr[0] * VARIANCES)
    variance = schedule.betas[1] * (1 - schedule.alphas_cumprod[0]) / (1 - schedule.alphas_cumprod[1])
    torch.testing.assert_close(
        expected(bound.reconstruction), 0.5 * (torch.log(2 * math.pi * variance) + first / variance).sum()
    )


def test_the_prior_term_is_f4_and_torchs() -> None:
    schedule = Schedule.from_config(ScheduleConfig("scaled_linear"))
    x0 = torch.randn(4, 2, 3, dtype=torch.float64)
    bar = schedule.alphas_cumprod[-1]
    got = prior_kl(schedule, x0)
    torch.testing.assert_close(got, 0.5 * (bar * (x0**2 - 1) - torch.log(1 - bar)))
    normal = Normal(bar.sqrt() * x0, (1 - bar).sqrt().expand_as(x0))
    torch.testing.assert_close(got, kl_divergence(normal, Normal(torch.zeros_like(x0), torch.ones_like(x0))))
    zero = Schedule.from_config(ScheduleConfig("linear", zero_terminal_snr=True))
    assert bool((prior_kl(zero, x0) == 0).all())


def test_a_learned_variance_lies_between_its_ends() -> None:
    """Outputs ±1 in every channel are β and β̃; the exact variance as the network's output gives the entropy."""
    schedule = Schedule.from_config(ScheduleConfig("linear", 100, 1e-3, 0.2))
    plain = exact(schedule)

    def denoiser(output: Callable[[Tensor], Tensor]) -> Denoiser:
        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            return torch.cat([plain.predict(x_t, t), output(t).expand_as(x_t)], 1)

        return Denoiser(schedule, "v", predict, learned_variance=True)

    beta, posterior = whole(plain, "beta", "posterior")
    for end, bound in ((1.0, beta), (-1.0, posterior)):
        (learned,) = whole(denoiser(lambda t, end=end: torch.full((len(t), 1), end, dtype=torch.float64)), "learned")
        torch.testing.assert_close(learned.total, bound.total)

    def right(t: Tensor) -> Tensor:
        big = schedule.betas[t].log()[:, None]
        bar, before = schedule.alphas_cumprod[t.clamp(min=1)], schedule.alphas_cumprod[t.clamp(min=1) - 1]
        small = (schedule.betas[t.clamp(min=1)] * (1 - before) / (1 - bar)).log()[:, None]
        return 2 * (reverse_variance(schedule, t).log() - small) / (big - small) - 1

    (learned,) = whole(denoiser(right), "learned")
    torch.testing.assert_close(expected(learned.total), ENTROPY + marginal_gap(schedule), rtol=0, atol=1e-8)
    with pytest.raises(ValueError, match="has not learned"):
        whole(plain, "learned")
    with pytest.raises(ValueError, match="posterior, beta, learned, or a function, got 'exact'"):
        whole(plain, "exact")


def test_a_better_denoiser_has_a_smaller_bound_and_all_targets_the_same() -> None:
    schedule = Schedule.from_config(ScheduleConfig("linear", 60, 1e-3, 0.3))
    totals = [expected(whole(exact(schedule, target), exact_variance)[0].total) for target in TARGETS]
    torch.testing.assert_close(torch.stack(totals), totals[0].expand(len(TARGETS)))
    worse = Denoiser(schedule, "x0", lambda x_t, t: exact(schedule, "x0").predict(x_t, t) + 0.05)
    assert expected(whole(worse, exact_variance)[0].total) > totals[0] + 0.01


def test_no_signal_at_the_end() -> None:
    schedule = Schedule.from_config(ScheduleConfig("linear", 100, 1e-3, 0.2, zero_terminal_snr=True))
    (bound,) = whole(exact(schedule), exact_variance)
    torch.testing.assert_close(expected(bound.total), ENTROPY, rtol=0, atol=1e-8)
    with pytest.raises(ValueError, match="predict v or x0"):
        whole(exact(schedule, "eps"), "beta")


# ---------------------------------------------------------------- a part of the steps


def test_drawn_steps_are_unbiased(schedule: Schedule) -> None:
    """Over evenly spread draws the weighted sum of anything is its sum over t = 1 … T−1, for any number of steps."""
    probability = step_probabilities(schedule)
    torch.testing.assert_close(probability.sum(), torch.ones(()).double())
    draws = 20_000
    value = torch.cat([torch.zeros(1).double(), 1 / torch.arange(1, 1000).double() + torch.rand(999).double()])
    for k in (1, 4, 7):
        uniform = ((torch.arange(draws, dtype=torch.float64) + 0.5) / draws)[:, None].expand(-1, k)
        steps = drawn_steps(schedule, uniform)
        assert steps.t.min() >= 1 and steps.t.max() <= 999 and bool((steps.t.diff(dim=1) >= 0).all())
        assert steps.weight.max() <= 2 * 999 / k * (1 + 1e-9)
        estimate = (steps.weight * value[steps.t]).sum(1).mean()
        assert estimate.item() == pytest.approx(value.sum().item(), rel=0.02)
        times = torch.bincount(steps.t.flatten(), minlength=1000)[1:] / (draws * k)
        torch.testing.assert_close(times.double(), probability, rtol=0, atol=2 / draws)


@pytest.mark.parametrize("last", [0.6, 1.0])
def test_one_step_drawn_of_one_is_that_step(last: float) -> None:
    """T = 2, with signal at its last step and without: the same bound as all steps, finite."""
    denoiser, x0 = (
        exact(Schedule(torch.tensor([0.1, last])), "x0"),
        MEANS + VARIANCES.sqrt() * torch.randn(50, 3, dtype=torch.float64),
    )
    noise = torch.randn(2, 50, 3, dtype=torch.float64)
    for variance in ("posterior", "beta"):
        drawn, all_ = (
            bounds(denoiser, x0, lambda i: noise[i], steps, [variance])[0].total
            for steps in (drawn_steps(denoiser.schedule, torch.rand(50, 1)), all_steps(denoiser.schedule, 50))
        )
        torch.testing.assert_close(drawn, all_)
        assert bool(all_.isfinite().all())


def test_all_steps_are_each_taken_once() -> None:
    schedule = Schedule.from_config(ScheduleConfig("linear", 20))
    steps = all_steps(schedule, 2)
    assert steps.t.tolist() == [list(range(1, 20))] * 2 and bool((steps.weight == 1).all())


def test_the_estimate_lies_within_its_standard_error() -> None:
    """6 steps of 999 against all of them; the spread over repetitions is the error that is stated."""
    schedule = Schedule.from_config(ScheduleConfig("cosine"))
    denoiser = exact(schedule)
    truth = expected(whole(denoiser, "beta")[0].total)
    repetitions, n = 12, 300
    x0 = MEANS + VARIANCES.sqrt() * torch.randn(repetitions * n, 3, dtype=torch.float64)
    steps = drawn_steps(schedule, torch.rand(len(x0), 6, dtype=torch.float64))
    (bound,) = bounds(denoiser, x0, lambda _: torch.randn_like(x0), steps, ["beta"])
    total = bound.total.reshape(repetitions, n)
    z = (total.mean(1) - truth) / (total.std(1) / math.sqrt(n))
    assert abs(z.mean()) < 3.5 / math.sqrt(repetitions) and 0.4 < z.std() < 1.8


# ---------------------------------------------------------------- joints and gap

SHORT = Schedule(torch.tensor([0.05, 0.1, 0.3, 0.5, 0.8], dtype=torch.float64))
SLOPES = torch.tensor([0.9, 0.8, 0.6, 0.5, 0.2], dtype=torch.float64)  # of a denoiser that knows no better


def linear(x_t: Tensor, t: Tensor) -> Tensor:
    return SLOPES[t][:, None] * x_t + 0.1 * (t[:, None].double() + 1)


def bound_at(x0: float, variance: Variance) -> float:
    """L3 at one x_0 of one dimension, by quadrature over the noise."""
    nodes = bounds(
        Denoiser(SHORT, "x0", linear),
        torch.full((3, 1), x0, dtype=torch.float64),
        lambda _: _NODES[:, None],
        all_steps(SHORT, 3),
        [variance],
    )
    return float((_WEIGHTS * nodes[0].total).sum())


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_the_joints_have_the_bound_as_their_mean(variance: str) -> None:
    """Monte Carlo of E_q[log p(x_{0:T}) − log q(x_{1:T}|x_0)] (F7)."""
    n = 60_000
    denoiser = Denoiser(SHORT, "x0", linear)
    x0 = torch.full((n, 1), 0.8, dtype=torch.float64)
    chain = draw_chain(SHORT, x0, lambda _: torch.randn(n, 1, dtype=torch.float64))
    assert chain.shape == (6, n, 1)
    ratio = log_reverse(denoiser, chain, variance) - log_forward(SHORT, chain)
    error = ratio.std() / math.sqrt(n)
    assert abs(ratio.mean() + bound_at(0.8, variance)) < 4 * error and error < 0.05


def test_the_joints_are_multivariate_gaussians() -> None:
    """q(x_{1:T}|x_0) by its mean and covariance a_t x_0 and (a_t/a_s) s_s², at points that it would not draw."""
    chain = torch.randn(6, 7, 1, dtype=torch.float64)
    t = torch.arange(5)
    a, s = SHORT.alpha(t), SHORT.sigma(t)
    later, earlier = torch.maximum(t[:, None], t), torch.minimum(t[:, None], t)
    covariance = a[later] / a[earlier] * s[earlier] ** 2
    expected_ = MultivariateNormal(a * chain[0], covariance).log_prob(chain[1:, :, 0].T)
    torch.testing.assert_close(log_forward(SHORT, chain), expected_)
    mean, covariance = model_joint("beta")
    got = log_reverse(Denoiser(SHORT, "x0", linear), chain, "beta")
    torch.testing.assert_close(got, MultivariateNormal(mean, covariance).log_prob(chain[:, :, 0].T))


def model_joint(variance: str) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the model's (x_0, …, x_T): a linear map of independent normals, built from T down."""
    before = torch.cat([torch.ones(1).double(), SHORT.alphas_cumprod[:-1]])
    bar, beta = SHORT.alphas_cumprod, SHORT.betas
    small = beta * (1 - before) / (1 - bar)
    small[0] = small[1]
    variances = beta if variance == "beta" else small
    rows, means = torch.zeros(6, 6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    rows[5, 5] = 1
    for t in range(4, -1, -1):
        of_x0 = before[t].sqrt() * beta[t] / (1 - bar[t])  # P1 as printed
        of_xt = (1 - beta[t]).sqrt() * (1 - before[t]) / (1 - bar[t])
        slope, shift = of_x0 * SLOPES[t] + of_xt, of_x0 * 0.1 * (t + 1)
        rows[t], means[t] = slope * rows[t + 1], slope * means[t + 1] + shift
        rows[t, t] = variances[t].sqrt()
    return means, rows @ rows.T


@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize("x0", [-1.5, 0.0, 0.8])
def test_the_gap_is_the_kl_of_the_joints(variance: str, x0: float) -> None:
    """log p(x_0) − L3 = KL(q(x_{1:T}|x_0) ‖ p(x_{1:T}|x_0)) ≥ 0 at every single x_0 (L9), by conditioning the joint."""
    mean, covariance = model_joint(variance)
    log_p = Normal(mean[0], covariance[0, 0].sqrt()).log_prob(torch.tensor(x0, dtype=torch.float64))
    gain = covariance[1:, 0] / covariance[0, 0]
    theirs = mean[1:] + gain * (x0 - mean[0]), covariance[1:, 1:] - gain[:, None] * covariance[0, 1:]
    t = torch.arange(5)
    a, s = SHORT.alpha(t), SHORT.sigma(t)
    later, earlier = torch.maximum(t[:, None], t), torch.minimum(t[:, None], t)
    ours = a * x0, a[later] / a[earlier] * s[earlier] ** 2
    kl = kl_full(*ours, *theirs)
    assert kl > 0.01
    assert log_p.item() + bound_at(x0, variance) == pytest.approx(kl.item(), rel=1e-8)
    n = 20_000
    chain = draw_chain(
        SHORT, torch.full((n, 1), x0, dtype=torch.float64), lambda _: torch.randn(n, 1, dtype=torch.float64)
    )
    drawn = gap(Denoiser(SHORT, "x0", linear), chain, log_p.expand(n), variance)
    assert abs(drawn.mean() - kl) < 4 * drawn.std() / math.sqrt(n)


# ---------------------------------------------------------------- pixels, and the autoencoder's bound


def test_pixels_are_given_probabilities() -> None:
    """Independent 8-bit pixels that take 4 levels, with the exact denoiser: 2 bits, and those of the last step."""
    schedule = Schedule.from_config(ScheduleConfig("linear"))
    levels = 2 * torch.tensor([0, 90, 180, 255]).double() / 255 - 1

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        a, s = schedule.alpha(t)[:, None, None], schedule.sigma(t)[:, None, None]
        weight = torch.softmax(-((x_t[..., None] - a * levels) ** 2) / (2 * s**2), -1)
        return (weight * levels).sum(-1)

    n = 2000
    x0 = levels[torch.randint(4, (n, 16))]
    steps = drawn_steps(schedule, torch.rand(n, 12, dtype=torch.float64))
    (bound,) = bounds(
        Denoiser(schedule, "x0", predict), x0, lambda _: torch.randn_like(x0), steps, ["posterior"], pixels=True
    )
    known = (bound.prior + bound.denoising.sum(1)) / (16 * math.log(2))  # what x_t at t = 0 says of x_0: all of it
    error = known.std() / math.sqrt(n)
    assert error < 0.03 and 2 - 4 * error < known.mean() < 2.1 + 4 * error
    # and the last step, certain of the level, pays for its own width: the mass of half a bin to one or both sides
    bar, beta = schedule.alphas_cumprod, schedule.betas
    inside = torch.special.ndtr(1 / 255 / (beta[1] * (1 - bar[0]) / (1 - bar[1])).sqrt())
    mass = torch.where(x0.abs() == 1, inside, 2 * inside - 1)
    torch.testing.assert_close(bound.reconstruction, -mass.log().sum(1), rtol=1e-6, atol=0)


def test_the_autoencoders_bound_is_tight_for_its_own_posterior() -> None:
    """x = W z + noise with z ~ N(0, 1): with the exact posterior the bound is log p(x), with another it is lower."""
    w, std, x = 1.7, 0.6, 0.9
    exact_variance_ = 1 / (1 + w**2 / std**2)
    mean = exact_variance_ * w * x / std**2
    log_p = Normal(0.0, math.sqrt(w**2 + std**2)).log_prob(torch.tensor(x)).item()
    nodes = math.sqrt(3) * torch.tensor([-1.0, 0.0, 1.0])
    for shift, scale in ((0.0, 1.0), (0.3, 1.0), (0.0, 2.0)):
        logvar = math.log(exact_variance_ * scale)
        posterior = DiagonalGaussian(torch.full((3, 1, 1, 1), mean + shift), torch.full((3, 1, 1, 1), logvar))
        z = posterior.sample(nodes.reshape(3, 1, 1, 1)).flatten()
        bound = vae_bound(Normal(w * z, std).log_prob(torch.tensor(x)), posterior)
        value = float((_WEIGHTS * bound).sum())
        if (shift, scale) == (0.0, 1.0):
            assert value == pytest.approx(log_p, abs=1e-5)
        else:
            q, p = (
                Normal(m, math.sqrt(v)) for m, v in ((mean + shift, exact_variance_ * scale), (mean, exact_variance_))
            )
            assert value == pytest.approx(log_p - kl_divergence(q, p).item(), abs=1e-5)


def test_two_stages_are_bounded_by_their_parts() -> None:
    """x = w z + noise, z Gaussian under its exact diffusion model.

    With the exact posterior the bound is −log p(x), with another
    it is larger by KL(q ‖ posterior)."""
    schedule, w, std = Schedule.from_config(ScheduleConfig("linear")), 1.7, 0.6
    x = torch.tensor([0.9, -0.4, 2.0], dtype=torch.float64)
    precise = 1 / VARIANCES + w**2 / std**2
    mean = (MEANS / VARIANCES + w * x / std**2) / precise
    log_p = Normal(w * MEANS, (w**2 * VARIANCES + std**2).sqrt()).log_prob(x).sum()
    exact_posterior = Normal(mean, precise.rsqrt())
    for q in (exact_posterior, Normal(mean + 0.1, 1.3 * precise.rsqrt())):
        z = q.mean + q.stddev * OF_X0[:, None]
        (latent,) = whole(exact(schedule), exact_variance, x0=z)
        log_q = -gaussian.entropy(2 * q.stddev.log()).sum().expand(9)
        bound = expected(two_stage_bound(Normal(w * z, std).log_prob(x).sum(1), log_q, latent.total))
        expected_bound = -log_p + kl_divergence(q, exact_posterior).sum()
        torch.testing.assert_close(bound, expected_bound, rtol=0, atol=1e-3)
    assert bits_per_dimension(torch.tensor(3 * 4 * 4 * 5 * math.log(2)), 3 * 4 * 4) == pytest.approx(5)


# ---------------------------------------------------------------- the deviation of the decoder


def test_the_fitted_deviation_is_the_likeliest() -> None:
    """Against a scan of σ, on pixels drawn from the discretised model: many at 0 and 255, where an RMS misleads."""
    true = torch.tensor([0.004, 0.05, 0.6], dtype=torch.float64)
    mean = 1.3 * (2 * torch.rand(6_000, 3) - 1)
    continuous = mean.double() + true * torch.randn(6_000, 3, dtype=torch.float64)
    image = (((continuous.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1).float()
    got = decoder_noise.fit(image, mean)
    torch.testing.assert_close(got, true, rtol=0.06, atol=0)
    rms = (image - mean).double().square().mean(0).sqrt()
    assert bool(((rms / true - 1).abs() > 0.05).all())

    def cost(std: Tensor) -> Tensor:
        return -gaussian.discretised_log_probability(image.double(), mean.double(), 2 * std.log()).mean(0)

    scan = torch.stack([cost(got * factor) for factor in (0.5, 0.8, 0.9, 0.97, 1.03, 1.1, 1.3, 2.0)])
    assert bool((cost(got) <= scan + 1e-9).all())


def test_a_perfect_decoder_has_the_smallest_deviation() -> None:
    image = (torch.arange(256).float() / 127.5 - 1)[:, None]
    assert decoder_noise.SMALLEST <= decoder_noise.fit(image, image).item() < 3 * decoder_noise.SMALLEST + 1e-9


# ---------------------------------------------------------------- the whole two-stage model, in closed form

SIDE, CHANNELS = 8, 2  # of images, and channels of the latent, 4×4


class Halved(AutoencoderKL):
    """Posterior: means of 2×2 pixels, one deviation. Decoder: pixels repeated. No weights are used."""

    def encode(self, image: Tensor) -> DiagonalGaussian:
        mean = torch.nn.functional.avg_pool2d(image, 2)
        return DiagonalGaussian(mean, torch.full_like(mean, -3.0))

    def decode(self, latent: Tensor) -> Tensor:
        return torch.zeros(len(latent), CHANNELS, SIDE, SIDE)


@dataclasses.dataclass
class OneImage:
    """The same image at every index, so that an average is over draws alone."""

    image: np.ndarray
    length: int | None = None
    fingerprint: str = ""
    skipped: tuple[Skipped, ...] = ()

    def __getitem__(self, index: int) -> Sample:
        if index % 50 == 49:
            raise BadSample(str(index), "torn")
        return Sample(self.image, "")

    def text(self, index: int) -> str:
        return ""

    def columns(self, index: int) -> dict[str, int]:
        return {}

    def captions(self, limit: int) -> list[str] | None:
        return [""]


class ExactPipeline(Pipeline):
    """Its model of the normalised latent is exactly N(MEAN, VARIANCE), reverse variance included."""

    MEAN, VARIANCE = 0.2, 0.3  # of the encoder's own latent

    def denoiser(self, captions: list[str], settings: SampleConfig) -> Denoiser:
        assert self.codec is not None and settings.guidance_scale == 1.0
        schedule, mean = self.schedule, (self.MEAN - self.codec.shift) * self.codec.scale
        variance = self.VARIANCE * self.codec.scale**2

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            a, s = (value.reshape(-1, 1, 1, 1) for value in (schedule.alpha(t), schedule.sigma(t)))
            x0 = mean + a * variance / (a**2 * variance + s**2) * (x_t - a * mean)
            beta = schedule.betas[t].reshape(-1, 1, 1, 1)
            before = schedule.alpha(t - 1).square().reshape(-1, 1, 1, 1) * (variance - 1) + 1
            exact_ = before - (1 - beta) * before**2 / ((1 - beta) * before + beta)
            later = t.clamp(min=1)
            bar = schedule.alphas_cumprod
            small = (schedule.betas[later] * (1 - bar[later - 1]) / (1 - bar[later])).log().reshape(-1, 1, 1, 1)
            output = 2 * (exact_.log() - small) / (beta.log() - small) - 1
            return torch.cat([x0, output.expand_as(x0)], 1)

        return Denoiser(schedule, "x0", predict, learned_variance=True)


def tiny_unet(channels: int) -> UNet:
    unet = UNet(UNetConfig((8,), 1, (), (1,), groups=4), channels, channels, None)
    for parameter in unet.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return unet.eval().requires_grad_(False)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.25, 0.4), (-3.0, 0.1)])
def test_the_whole_bound_is_a_closed_form(scale: float, shift: float) -> None:
    """−log p(x|z) + E log q(z|x) − E log p(z), whatever the units of the latent: scale and shift cancel (L6)."""
    codec = LatentCodec(Halved(AutoencoderConfig(CHANNELS, CHANNELS, (4, 4), 1, 4)), scale, shift)
    pipe = ExactPipeline(tiny_unet(CHANNELS), ScheduleConfig("linear"), "x0", codec, None, SIDE)
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, CHANNELS), dtype=np.uint8)
    data_ = DataConfig(source="textures", image_size=SIDE, image_channels=CHANNELS)
    n, std = 250, [0.5, 0.8]
    found = list(measure(pipe, OneImage(image), data_, range(n), 6, ["learned"], std, 3).values())
    assert len(found) == n - n // 50
    edges = image.astype(np.float64)[..., None] + [-0.5, 0.5]
    edges[edges == -0.5], edges[edges == 255.5] = -np.inf, np.inf
    mass = np.diff(norm.cdf(edges / 127.5 - 1, 0, np.array(std)[:, None]))
    mu = image.astype(np.float64).reshape(4, 2, 4, 2, CHANNELS).mean((1, 3)) / 127.5 - 1
    own = math.exp(-3)
    log_q = -0.5 * mu.size * (1 + math.log(2 * math.pi * own))
    model = ExactPipeline.VARIANCE
    log_p = -0.5 * (math.log(2 * math.pi * model) + (own + (mu - ExactPipeline.MEAN) ** 2) / model).sum()
    totals = torch.tensor([sum(row.terms("learned").values()) for row in found], dtype=torch.float64)
    error = totals.std() / math.sqrt(len(found))
    assert abs(totals.mean() - (-np.log(mass).sum() + log_q - log_p)) < 4 * error and error < 1.5
    for row in found[:3]:
        assert row.image == pytest.approx(-np.log(mass).sum(), rel=1e-6)
        assert row.posterior == pytest.approx(log_q - mu.size * math.log(abs(scale)), rel=1e-5)
        standard = 0.5 * (scale**2 * (own + (mu - shift) ** 2) - 1 - math.log(own * scale**2)).sum()
        assert row.standard == pytest.approx(standard, rel=1e-5)


# ---------------------------------------------------------------- the command

STEPS = 12


class Shared(Processes):
    """Two processes' shares, one after the other."""

    def over(self, n: int, work: Callable[[range], list[Any]]) -> list[Any]:
        shares = [work(range(rank, n, 2)) for rank in (0, 1)]
        return [shares[i % 2][i // 2] for i in range(n)]


@pytest.fixture(scope="module", params=["latents", "pixels"])
def untrained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    run, latents = tmp_path_factory.mktemp("runs") / "run", request.param == "latents"
    codec = (
        LatentCodec(AutoencoderKL(AutoencoderConfig(3, 2, (4, 4), 1, 4)).eval().requires_grad_(False), 0.7, 0.1)
        if latents
        else None
    )
    Pipeline(
        tiny_unet(2 if latents else 3), ScheduleConfig("linear", STEPS, 1e-3, 0.5), "v", codec, None, 16
    ).save_pretrained(run / "model")
    tree = {
        "run": str(run), "autoencoder": str(run) if latents else "none",
        "data": {"source": "textures", "image_size": 16, "size": 20},
        "text": "none", "schedule": {"name": "linear", "num_steps": STEPS, "beta_start": 1e-3, "beta_end": 0.5},
    }  # fmt: skip
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    return run


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No picture, which takes longer than the figures in it."""
    monkeypatch.setattr(plots, "likelihood", lambda *_: None)


def measured(
    run: Path, images: int = 5, timesteps: int = 4, batch: int = 5, processes: Processes = ALONE, **options: Any
) -> dict[str, Any]:
    settings = {"variance": None, "seed": 1, **options}
    said = lambda *_: None  # noqa: E731
    return likelihood(run, images, timesteps, settings["variance"], batch, settings["seed"], said, said, processes)


def flat(report: dict[str, Any]) -> list[float]:
    return [
        v
        for k, v in report_metrics({**report, "seconds": 0, "by_t": [list(b.values()) for b in report["by_t"]]})
        if isinstance(v, float)
    ]


def test_the_command_merges_its_figures_into_the_report(untrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (untrained / "report.json").write_text('{"judge": {"kept": 1}, "likelihood": "old"}')
    assert (
        main(["evaluate", str(untrained), "--likelihood", "--images", "5", "--timesteps", "4", "--batch-size", "2"])
        == 0
    )
    report = json.loads((untrained / "report.json").read_text())
    found = report["likelihood"]
    assert report["judge"] == {"kept": 1} and found["images"] == 5 and found["timesteps"] == 4
    assert found["variance"] == ("beta" if "terms" in found else "posterior")
    assert f"{found['bits_per_dim']:.3f} ± {found['error']:.3f}" in capsys.readouterr().out
    assert Image.open(untrained / "likelihood.png").size[0] > 600
    assert sum(found["parts"].values()) == pytest.approx(found["bits_per_dim"], rel=1e-9)
    assert sum(b["bits_per_dim"] for b in found["by_t"]) == pytest.approx(found["parts"]["denoising"], rel=1e-9)
    assert [b["from"] for b in found["by_t"]] == list(range(1, STEPS)) and found["by_variance"][
        found["variance"]
    ] == found["bits_per_dim"]
    if "terms" in found:
        terms = found["terms"]
        assert sum(terms.values()) == pytest.approx(found["bits_per_dim"], rel=1e-9)
        latent = terms["latent_reconstruction"] + terms["latent_prior"] + terms["latent_denoising"]
        assert found["latent"]["dimensions"] == 2 * 8 * 8 and found["latent"]["bits_per_dim"] == pytest.approx(
            latent * 3 * 256 / 128
        )
        assert (
            terms["latent_prior"] == found["parts"]["prior"]
            and terms["latent_denoising"] == found["parts"]["denoising"]
        )


@pytest.mark.usefixtures("undrawn")
def test_neither_batches_nor_processes_matter(untrained: Path) -> None:
    whole_ = measured(untrained)
    for other in (measured(untrained, batch=2), measured(untrained, processes=Shared(0, 1, lambda value: [value]))):
        assert flat(other) == pytest.approx(flat(whole_), rel=1e-4, abs=1e-6)
    assert flat(measured(untrained, seed=2)) != pytest.approx(flat(whole_), rel=1e-3)
    assert measured(untrained, variance="posterior")["bits_per_dim"] == pytest.approx(
        whole_["by_variance"]["posterior"]
    )
    assert measured(untrained, variance="beta")["bits_per_dim"] == pytest.approx(whole_["by_variance"]["beta"])


@pytest.mark.usefixtures("undrawn")
def test_figures_are_nats_over_the_images_dimensions(untrained: Path) -> None:
    """The mean over images, each divided by 3·16·16·ln 2, and its error, from the rows themselves; all T here."""
    config = configuration.load(DiffusionTrainingConfig, untrained / "config.yaml")
    pipe, found = Pipeline.from_pretrained(untrained, "cpu"), measured(untrained, timesteps=0, variance="beta")
    assert found["timesteps"] == STEPS - 1
    rows = measure(
        pipe, open_source(config.data, "validation"), config.data, range(5), 0, ["beta"], found.get("decoder_std"), 1
    )
    bits = np.array([sum(row.parts("beta").values()) for row in rows.values()]) / (768 * math.log(2))
    assert found["bits_per_dim"] == pytest.approx(bits.mean(), rel=1e-6)
    assert found["error"] == pytest.approx(bits.std(ddof=1) / math.sqrt(5), rel=1e-4)
    assert measured(untrained, images=1, timesteps=None)["error"] is None


@pytest.mark.usefixtures("undrawn")
def test_the_deviation_is_kept_with_the_model(untrained: Path) -> None:
    file = untrained / "model" / decoder_noise.FILE
    found = measured(untrained)
    if "decoder_std" not in found:
        assert not file.exists()
        return
    kept = json.loads(file.read_text())
    assert kept["decoder_std"] == found["decoder_std"]
    file.write_text(json.dumps({**kept, "decoder_std": [9.0, 9.0, 9.0]}))
    assert measured(untrained)["decoder_std"] == [9.0, 9.0, 9.0]
    for key in ("autoencoder", "data"):  # of other weights, or other images
        file.write_text(json.dumps({**kept, "decoder_std": [9.0, 9.0, 9.0], key: "other"}))
        assert measured(untrained)["decoder_std"] == pytest.approx(found["decoder_std"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--timesteps", "12"], "timesteps must lie between 1 and 11, or be 0 for all of them, got 12"),
        (["--timesteps", "-1"], "timesteps must be at least 0, got -1"),
        (["--variance", "learned"], "variance must be one of posterior, beta for this model, got learned"),
        (["--images", "0"], "images must be at least 1"),
    ],
)
def test_what_does_not_fit_is_named(
    untrained: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(untrained), "--likelihood", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
