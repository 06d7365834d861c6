"""Objectives against Gaussian KLs, autograd and enumeration; learned variance, timestep sampling, whole runs."""

import json
import math
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support.interrupts import PowerCut
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import ldm.config
from ldm.cli.main import main
from ldm.config import (
    TARGETS,
    ConfigError,
    DiffusionTrainingConfig,
    ObjectiveConfig,
    SampleConfig,
    ScheduleConfig,
    UNetConfig,
)
from ldm.data.dataset import Stream, collate
from ldm.diffusion.condition import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.objective import WEIGHTINGS, Objective, target
from ldm.diffusion.process import from_x0, learned_log_variance
from ldm.diffusion.samplers.registry import SAMPLERS
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.targets import error_ratio
from ldm.diffusion.timesteps import HISTORY, LossHistory, Timesteps, uniform_timesteps
from ldm.interop.diffusers.unet import unet_from_diffusers, unet_to_diffusers
from ldm.models.unet import NetworkSpec, UNet
from ldm.pipeline import Pipeline
from ldm.runs.records import read_metrics
from ldm.training.stages.diffusion import DiffusionTask

pytestmark = pytest.mark.usefixtures("seed")

OF_X0 = sorted(set(WEIGHTINGS) - {"simple"})  # simple is another objective for each target


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def errors(schedule: Schedule, config: ObjectiveConfig, x0: Tensor, eps: Tensor, t: Tensor, wrong_x0: Tensor) -> Tensor:
    """Loss of a network that believes in ``wrong_x0``, told in the words of the configured target."""
    x_t = schedule.add_noise(x0, eps, t)
    prediction = from_x0(schedule, config.target, wrong_x0, x_t, t)
    return Objective(config, schedule).loss(lambda *_: prediction, x0, eps, t, Condition())


# ---------------------------------------------------------------- targets and weights


def test_the_score_target_is_the_gradient_of_the_kernel(schedule: Schedule) -> None:
    t = torch.arange(1000)
    x0, eps = randn(1000, 4), randn(1000, 4)
    x_t = schedule.add_noise(x0, eps, t).requires_grad_()
    bar = schedule.alphas_cumprod[:, None]
    (gradient,) = torch.autograd.grad(Normal(bar.sqrt() * x0, (1 - bar).sqrt()).log_prob(x_t).sum(), x_t)
    torch.testing.assert_close(target(schedule, "score", x0, eps, t), gradient, rtol=1e-6, atol=1e-9)
    said = Denoiser(schedule, "score", lambda *_: gradient)(x_t.detach(), t)
    torch.testing.assert_close(said.score, gradient)
    torch.testing.assert_close(said.x0, x0, rtol=1e-6, atol=1e-6)


def test_losses_of_the_targets_differ_by_the_snr(schedule: Schedule) -> None:
    """‖Δε‖² = SNR ‖Δx_0‖², ‖Δv‖² = (SNR + 1) ‖Δx_0‖², ‖Δscore‖² = ‖Δε‖²/s² (docs/equations.md L2)."""
    t = torch.arange(1000)
    x0, eps, wrong = randn(1000, 4), randn(1000, 4), randn(1000, 4)
    plain = errors(schedule, ObjectiveConfig("x0"), x0, eps, t, wrong)
    torch.testing.assert_close(plain, (x0 - wrong).square().mean(1))
    snr, noise = schedule.snr(t), schedule.sigma(t).square()
    for name, factor in (("eps", snr), ("v", snr + 1), ("score", snr / noise)):
        torch.testing.assert_close(
            errors(schedule, ObjectiveConfig(name), x0, eps, t, wrong), factor * plain, rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("weighting", OF_X0)
def test_a_weighting_is_one_objective_for_all_targets(schedule: Schedule, weighting: str) -> None:
    t = torch.arange(1000)
    x0, eps, wrong = randn(1000, 4), randn(1000, 4), randn(1000, 4)
    config = ObjectiveConfig("x0", weighting, 3.0, 0.7)
    expected = errors(schedule, config, x0, eps, t, wrong)
    assert (expected > 0).all()
    for name in TARGETS:
        torch.testing.assert_close(
            errors(schedule, replace(config, target=name), x0, eps, t, wrong), expected, rtol=1e-6, atol=0
        )


def test_weights_as_published(schedule: Schedule) -> None:
    """Hang et al. 2023 (3.4), Choi et al. 2022 (eq. 8), Ho et al. 2020 (eq. 12), Kingma et al. 2021 (½ ΔSNR on x_0)."""
    snr, bar, beta = schedule.snr(torch.arange(1000)), schedule.alphas_cumprod, schedule.betas
    before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    drop = 0.5 * (before[1:] / (1 - before[1:]) - bar[1:] / (1 - bar[1:]))
    posterior = beta * (1 - before) / (1 - bar)
    general = lambda variance: beta**2 / (2 * variance * (1 - beta) * (1 - bar))  # noqa: E731  # on ε
    published = {
        ("simple", "eps"): torch.ones_like(snr),
        ("min_snr", "x0"): snr.clamp(max=5),
        ("min_snr", "eps"): (5 / snr).clamp(max=1),
        ("min_snr", "v"): snr.clamp(max=5) / (snr + 1),
        ("p2", "eps"): 1 / (1 + snr) ** 0.5,
        ("variational_beta", "eps"): general(beta),
        ("variational_posterior", "eps"): general(torch.cat([posterior[1:2], posterior[1:]])),
        ("variational_posterior", "x0"): torch.cat([1 / (2 * posterior[1:2]), drop]),
        ("score_matching", "score"): 1 - bar,
        ("score_matching", "eps"): torch.ones_like(snr),
    }
    for (weighting, name), expected in published.items():
        found = Objective(ObjectiveConfig(name, weighting, p2_gamma=0.5), schedule).weights
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert {weighting for weighting, _ in published} == set(WEIGHTINGS)


@pytest.mark.parametrize("name", TARGETS)
def test_variational_weights_are_the_terms_of_the_bound(schedule: Schedule, name: str) -> None:
    """The network's part of KL(q(x_{t−1}|x_t,x_0) ‖ p), and of −log p(x_0|x_1) at t = 0, by torch's Gaussians."""
    t = torch.arange(1000)
    x0, eps, wrong = randn(1000, 3), randn(1000, 3), randn(1000, 3)
    x_t = schedule.add_noise(x0, eps, t)
    bar, beta = schedule.alphas_cumprod[:, None], schedule.betas[:, None]
    before = torch.cat([torch.ones(1, 1, dtype=torch.float64), bar[:-1]])
    mean = lambda x: before.sqrt() * beta / (1 - bar) * x + (1 - beta).sqrt() * (1 - before) / (1 - bar) * x_t  # noqa: E731
    true = beta * (1 - before) / (1 - bar)
    true = torch.cat([true[1:2], true[1:]])  # log β̃ of the first step
    for weighting, variance in (("variational_beta", beta), ("variational_posterior", true)):
        kl = lambda x: kl_divergence(Normal(mean(x0), true.sqrt()), Normal(mean(x), variance.sqrt())).mean(1)  # noqa: B023, E731
        loss = errors(schedule, ObjectiveConfig(name, weighting), x0, eps, t, wrong)
        torch.testing.assert_close(loss, kl(wrong) - kl(x0), rtol=1e-6, atol=1e-9)
        decoder = -Normal(wrong, variance[0].sqrt()).log_prob(x0)[0] + Normal(x0, variance[0].sqrt()).log_prob(x0)[0]
        torch.testing.assert_close(loss[0], decoder.mean(), rtol=1e-6, atol=0)


def test_score_matching_with_the_noise_variance_is_l1(schedule: Schedule) -> None:
    """s_t² ‖s_θ − ∇log q(x_t|x_0)‖² = ‖ε − ε_θ‖² with s_θ = −ε_θ/s_t (L10)."""
    t = torch.arange(1000)
    x0, eps, said = randn(1000, 4), randn(1000, 4), randn(1000, 4)
    x_t = schedule.add_noise(x0, eps, t).requires_grad_()
    kernel = Normal(schedule.alpha(t)[:, None] * x0, schedule.sigma(t)[:, None])
    (gradient,) = torch.autograd.grad(kernel.log_prob(x_t).sum(), x_t)
    explicit = schedule.sigma(t).square() * (-said / schedule.sigma(t)[:, None] - gradient).square().mean(1)
    matching = Objective(ObjectiveConfig("score", "score_matching"), schedule)
    loss = matching.loss(lambda *_: -said / schedule.sigma(t)[:, None], x0, eps, t, Condition())
    simple = Objective(ObjectiveConfig("eps"), schedule).loss(lambda *_: said, x0, eps, t, Condition())
    torch.testing.assert_close(loss, explicit, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss, simple, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_are_finite_without_signal_and_almost_without_noise(weighting: str) -> None:
    betas = torch.tensor([1e-12, 0.1, 0.9, 1.0], dtype=torch.float64)  # SNR 1e12 … 0
    for name in ("x0", "v"):
        weights = Objective(ObjectiveConfig(name, weighting), Schedule(betas)).weights
        assert weights.isfinite().all() and (weights >= 0).all()
    for name in ("eps", "score"):
        with pytest.raises(ValueError, match="predict v or x0"):
            Objective(ObjectiveConfig(name, weighting), Schedule(betas))
        assert Objective(ObjectiveConfig(name, weighting), Schedule(betas[:-1])).weights.isfinite().all()


def test_error_ratio_holds_for_every_target() -> None:
    assert error_ratio("score", torch.tensor([2.0])) == 6
    with pytest.raises(KeyError):
        error_ratio("noise", torch.tensor([2.0]))


def test_the_network_sees_the_noisy_sample_and_its_condition() -> None:
    schedule, cond, seen = Schedule.from_config(ScheduleConfig("linear")), Condition(vector=torch.ones(2, 3)), []
    x0, eps, t = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5), torch.tensor([10, 900])
    scale = torch.tensor(0.5, requires_grad=True)

    def model(x_t: Tensor, at: Tensor, c: Condition) -> Tensor:
        seen.append((x_t, at, c))
        return scale * x_t

    loss = Objective(ObjectiveConfig("eps"), schedule).loss(model, x0, eps, t, cond)
    x_t, at, c = seen[0]
    bar = schedule.alphas_cumprod[t].float()[:, None, None, None]
    torch.testing.assert_close(x_t, bar.sqrt() * x0 + (1 - bar).sqrt() * eps, rtol=1e-4, atol=1e-5)
    assert torch.equal(at, t) and c is cond and len(seen) == 1
    torch.testing.assert_close(loss, (0.5 * x_t - eps).square().mean((1, 2, 3)))
    assert torch.autograd.grad(loss.sum(), scale)[0] != 0


# ---------------------------------------------------------------- the learned variance


def twice(x: Tensor, mean: Tensor, output: Tensor) -> Callable[..., Tensor]:
    return lambda *_: torch.cat([mean.expand_as(x), output.expand_as(x)], dim=1)


@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize("steps", [10, 1000])
def test_the_hybrid_is_l1_and_a_thousandth_of_the_bound(steps: int, pixels: bool) -> None:
    """At T = 1000 a sampled t adds L_t itself, in bits per dimension; at T = 10 a hundredth of it (L4)."""
    schedule = Schedule.from_config(ScheduleConfig("linear", steps, 1e-3, 0.05))
    t = torch.tensor([0, 1, steps // 2, steps - 1])
    x0 = (torch.randint(0, 256, (4, 2, 3)) / 127.5 - 1).double()
    eps, mean, output = randn(4, 2, 3), randn(4, 2, 3), randn(4, 2, 3)
    terms = Objective(ObjectiveConfig("x0", learned_variance=True), schedule, pixels).terms(
        twice(x0, mean, output), x0, eps, t, Condition()
    )
    x_t = schedule.add_noise(x0, eps, t)
    bits = []
    for i, k in enumerate(t.tolist()):
        bar, beta = schedule.alphas_cumprod[k], schedule.betas[k]
        before = schedule.alphas_cumprod[k - 1] if k else torch.tensor(1.0, dtype=torch.float64)
        small = (
            schedule.betas[max(k, 1)]
            * (1 - schedule.alphas_cumprod[max(k, 1) - 1])
            / (1 - schedule.alphas_cumprod[max(k, 1)])
        )
        nu = (output[i] + 1) / 2
        p_std = (nu * beta.log() + (1 - nu) * small.log()).exp().sqrt()
        if k:
            of_x0, of_x_t = before.sqrt() * beta / (1 - bar), (1 - beta).sqrt() * (1 - before) / (1 - bar)
            posterior, reverse = (of_x0 * x + of_x_t * x_t[i] for x in (x0[i], mean[i]))
            nats = kl_divergence(Normal(posterior, small.sqrt()), Normal(reverse, p_std))
        elif pixels:
            low, high = ((x0[i] + edge - mean[i]) / p_std for edge in (-1 / 255, 1 / 255))
            low, high = low.where(x0[i] > -0.999, -math.inf), high.where(x0[i] < 0.999, math.inf)
            flip = low > 0
            low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
            nats = -(
                torch.special.log_ndtr(high)
                + torch.log1p(-(torch.special.log_ndtr(low) - torch.special.log_ndtr(high)).exp())
            )
        else:
            nats = -Normal(mean[i], p_std).log_prob(x0[i])
        bits.append(nats.mean() / math.log(2))
    assert terms.vlb is not None
    torch.testing.assert_close(terms.vlb, steps * torch.stack(bits), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(terms.error, (mean - x0).square().mean((1, 2)))
    torch.testing.assert_close(terms.total, terms.error + steps / 1000 * torch.stack(bits), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", TARGETS)
def test_l1_teaches_the_mean_and_the_bound_the_variance(name: str) -> None:
    schedule = Schedule.from_config(ScheduleConfig("cosine", 20))
    x0, eps, t = randn(20, 2, 3), randn(20, 2, 3), torch.arange(20)
    mean, output = randn(20, 2, 3).requires_grad_(), randn(20, 2, 3).requires_grad_()
    plain = Objective(ObjectiveConfig(name, "min_snr"), schedule).loss(lambda *_: mean, x0, eps, t, Condition())
    hybrid = Objective(ObjectiveConfig(name, "min_snr", learned_variance=True, vlb_weight=0.7), schedule)
    terms = hybrid.terms(twice(x0, mean, output), x0, eps, t, Condition())
    assert terms.vlb is not None
    of_mean, of_output = torch.autograd.grad(terms.total.sum(), (mean, output), retain_graph=True)
    torch.testing.assert_close(of_mean, *torch.autograd.grad(plain.sum(), mean))
    assert not torch.autograd.grad(terms.vlb.sum(), mean, retain_graph=True)[0].any()
    torch.testing.assert_close(of_output, 0.7 * torch.autograd.grad(terms.vlb.sum(), output)[0])
    assert (of_output != 0).all()


def test_on_gaussian_data_the_exact_reverse_variance_is_learned() -> None:
    """x_0 ~ N(0, 0.3): p(x_{t−1}|x_t) has variance β_t m_{t−1}/m_t, m_t = 0.3 ᾱ_t + 1 − ᾱ_t. By quadrature."""
    steps, power = 6, 0.3
    schedule = Schedule.from_config(ScheduleConfig("linear", steps, 0.02, 0.6))
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(4))  # exact to the seventh power
    t, i, j = (
        a.flatten() for a in torch.meshgrid(torch.arange(steps), torch.arange(4), torch.arange(4), indexing="ij")
    )
    x0, eps, weight = power**0.5 * nodes[i, None], nodes[j, None], weights[i] * weights[j] / weights.sum() ** 2
    scale, output = (torch.zeros(steps, 1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    objective = Objective(ObjectiveConfig("x0", learned_variance=True, vlb_weight=0.1), schedule)
    for parameter in (scale, output):  # the mean does not wait for the variance
        optimizer = torch.optim.LBFGS([parameter], max_iter=40, tolerance_change=0.0)

        def gradient(optimizer: torch.optim.Optimizer = optimizer) -> float:
            optimizer.zero_grad()
            loss = objective.loss(
                lambda x_t, t, _: torch.cat([scale[t] * x_t, output[t]], dim=1), x0, eps, t, Condition()
            )
            (weight * loss).sum().backward()
            return float((weight * loss).sum().detach())

        optimizer.step(gradient)
    bar = schedule.alphas_cumprod
    marginal = torch.cat([torch.tensor([power], dtype=torch.float64), power * bar + 1 - bar])
    exact = schedule.betas * marginal[:-1] / marginal[1:]
    at = torch.arange(steps)
    learned = learned_log_variance(schedule, output.detach(), at - 1, at).exp()[:, 0]
    torch.testing.assert_close(learned, exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(scale.detach()[:, 0], power * bar.sqrt() / marginal[1:], rtol=1e-5, atol=0)
    assert ((learned / schedule.betas).log().abs() > 0.02).all()  # not where it began, nor at β


# ---------------------------------------------------------------- timesteps


def test_uniform_timesteps_cover_all_evenly() -> None:
    for steps in (2, 7, 1000):
        draws = (torch.arange(steps * 3, dtype=torch.float64) + 0.5) / (steps * 3)
        assert torch.bincount(uniform_timesteps(draws, steps), minlength=steps).tolist() == [3] * steps
        ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
        assert uniform_timesteps(ends, steps).tolist() == [0, steps - 1]
    assert uniform_timesteps(torch.tensor([1.0]), 10).tolist() == [9]  # float32 rounds the largest draws up to 1


def test_strata_are_of_the_place_in_the_update() -> None:
    timesteps = Timesteps("stratified", 1000, 8)
    position = torch.arange(16, 24)[torch.randperm(8)]
    t, weight = timesteps.draw(torch.rand(8, dtype=torch.float64), position)
    assert (t // 125).tolist() == (position - 16).tolist() and (weight == 1).all()
    alone = [timesteps.draw(torch.tensor([0.25]), torch.tensor([p]))[0].item() for p in range(8)]
    assert alone == [int((i + 0.25) / 8 * 1000) for i in range(8)]  # of nobody else in the batch


def losses_at(steps: int) -> Tensor:
    """Losses of a bound: large at small t."""
    return 5 / (1 + torch.arange(steps, dtype=torch.float64)) + 0.01


def filled(steps: int) -> LossHistory:
    history = LossHistory(steps)
    for factor in torch.linspace(0.5, 1.5, HISTORY, dtype=torch.float64):
        history.update(torch.arange(steps), factor * losses_at(steps))
    return history


def test_importance_is_unbiased_and_varies_less() -> None:
    steps, history = 20, filled(20)
    p, losses = history.probabilities, losses_at(20)
    size = losses * torch.linspace(0.5, 1.5, HISTORY, dtype=torch.float64).square().mean().sqrt()
    torch.testing.assert_close(p, 0.999 * size / size.sum() + 0.001 / steps)
    uniform = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    t, weight = history.draw(uniform)
    frequency = torch.bincount(t, minlength=steps) / len(t)
    torch.testing.assert_close(frequency.double(), p, rtol=0, atol=3e-6)
    torch.testing.assert_close(weight, 1 / (steps * p[t]))
    torch.testing.assert_close((p * losses / (steps * p)).sum(), losses.mean())  # by enumeration
    assert (weight * losses[t]).mean().item() == pytest.approx(losses.mean().item(), rel=1e-4)
    assert (weight * losses[t]).var() < 0.01 * losses[uniform_timesteps(uniform, steps)].var()


def test_the_history_is_that_of_a_plain_loop() -> None:
    steps, history = 5, LossHistory(5)
    plain: list[deque[float]] = [deque(maxlen=HISTORY) for _ in range(steps)]
    generator = torch.Generator().manual_seed(3)
    for k in range(30):
        full = all(len(row) == HISTORY for row in plain)
        assert bool((history.probabilities == 1 / steps).all()) == (not full)
        n = 25 if k == 20 else 4  # more of one t than are remembered
        t = torch.zeros(n, dtype=torch.long) if k == 20 else torch.randint(0, steps, (n,), generator=generator)
        losses = torch.rand(n, generator=generator, dtype=torch.float64)
        losses[1] = math.nan if k % 5 == 0 else losses[1]
        history.update(t, losses)
        for at, loss in zip(t.tolist(), losses.tolist(), strict=True):
            if math.isfinite(loss):
                plain[at].append(loss)
        again = LossHistory(steps)
        again.load_state(json.loads(json.dumps(history.state(), allow_nan=False)))
        assert torch.equal(again.probabilities, history.probabilities) and again.state() == history.state()
    assert [sorted(row) for row in history.state()["losses"]] == [sorted(row) for row in plain]
    size = torch.tensor([math.sqrt(sum(x * x for x in row) / HISTORY) for row in plain], dtype=torch.float64)
    torch.testing.assert_close(history.probabilities, 0.999 * size / size.sum() + 0.001 / steps)
    with pytest.raises(ValueError, match="of 5 timesteps, not of 6"):
        LossHistory(6).load_state(history.state())


@pytest.mark.parametrize("name", ["uniform", "stratified", "importance"])
def test_the_step_is_unbiased(name: str) -> None:
    """Algorithm 1: over all draws of t, the mean gradient is that of the sum over t divided by T (T1)."""
    steps, batch = 8, 4
    schedule = Schedule.from_config(ScheduleConfig("linear", steps, 0.02, 0.5))
    objective, timesteps = Objective(ObjectiveConfig("v", "variational_beta"), schedule), Timesteps(name, steps, batch)
    if timesteps.history is not None:
        timesteps.history = filled(steps)
    parameter, (x0, eps) = (
        torch.linspace(-1, 1, steps, dtype=torch.float64, requires_grad=True),
        (randn(1, 3), randn(1, 3)),
    )
    model = lambda x_t, t, _: torch.tanh(parameter[t, None] * x_t) + parameter.sum()  # noqa: E731

    def loss(t: Tensor) -> Tensor:
        return objective.loss(model, x0.expand(len(t), -1), eps.expand(len(t), -1), t, Condition())

    count = 40_000  # draws of each place in the update, evenly over [0, 1)
    uniform, position = (torch.arange(count, dtype=torch.float64) + 0.5) / count, torch.arange(batch)
    t, weight = timesteps.draw(uniform.repeat_interleave(batch), position.repeat(count))
    share = torch.zeros(steps, dtype=torch.float64).index_add_(0, t, weight) / len(t)  # of each t in the expected step
    torch.testing.assert_close(share, torch.full_like(share, 1 / steps), rtol=1e-3, atol=0)
    (found,) = torch.autograd.grad((share * loss(torch.arange(steps))).sum(), parameter)
    every = torch.stack([loss(torch.tensor([t])).squeeze() for t in range(steps)])
    (expected,) = torch.autograd.grad(every.sum() / steps, parameter)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-3 * expected.abs().max().item())


def test_logit_normal_timesteps_are_a_sigmoid_of_the_normal() -> None:
    """The share of every tenth of T, against the distribution function Φ(logit t/T); its losses are not reweighted."""
    uniform = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    t, weight = Timesteps("logit_normal", 1000, 4).draw(uniform, torch.zeros(100_000, dtype=torch.int64))
    below = [torch.distributions.Normal(0, 1).cdf(torch.logit(torch.tensor(i / 10))).item() for i in range(1, 10)]
    assert [round((t < 100 * i).double().mean().item(), 3) for i in range(1, 10)] == [round(b, 3) for b in below]
    assert bool((weight == 1).all())
    t, _ = Timesteps("logit_normal", 1000, 4).draw(torch.tensor([0.0, 1 - 2**-24]), torch.zeros(2, dtype=torch.int64))
    assert t[0] == 0 and 990 <= t[1] < 1000


# ---------------------------------------------------------------- models and their folders


def model(target: str = "v", learned: bool = True) -> Pipeline:
    """A tiny unconditional model of pixels."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig((16, 16), 1, (), (2,), groups=4), 3, 6 if learned else 3, None)
    for parameter in unet.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return Pipeline(
        unet.requires_grad_(False).eval(), ScheduleConfig("linear", 20), target, None, None, 8, SampleConfig("ddpm", 4)
    )


@pytest.mark.parametrize(("target", "learned"), [("v", True), ("score", True), ("score", False), ("flow", False)])
def test_such_a_model_carries_our_names_and_opens_again(target: str, learned: bool, tmp_path: Path) -> None:
    written = model(target, learned)
    with pytest.raises(ConfigError, match="cannot be expressed as a diffusers StableDiffusionPipeline"):
        written.save_pretrained(tmp_path / "refused", for_diffusers=True)
    written.save_pretrained(tmp_path / "model")
    names = {
        name: json.loads((tmp_path / "model" / name).read_text())["_class_name"]
        for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
    }
    assert list(names.values()) == [
        "LatentDiffusionPipeline",
        "LatentDiffusionUNet" if learned else "UNet2DConditionModel",
        "LatentDiffusionScheduler" if target in ("score", "flow") else "DDIMScheduler",
    ]
    again = Pipeline.from_pretrained(tmp_path / "model", "cpu")
    assert (again.target, again.learned_variance, again.unet.in_channels, again.unet.out_channels) == (
        target,
        learned,
        3,
        6 if learned else 3,
    )
    settings = again.defaults
    torch.testing.assert_close(*(next(p.sample([""], settings)) for p in (again, written)), rtol=1e-4, atol=1e-5)


def test_diffusers_names_what_it_cannot_open() -> None:
    """A complete latent model but for the variance or the target: the reason is named."""
    from ldm.interop.bundle import TEXT, UNET, VAE, Bundle, Part
    from ldm.interop.diffusers.index import ours_alone
    from ldm.interop.diffusers.schedulers import scheduler_to_diffusers

    def bundle(learned: bool, target: str) -> Bundle:
        unet = unet_to_diffusers(NetworkSpec(UNetConfig(), 4, 8 if learned else 4, 768), 64)
        parts = {UNET: Part(unet, {}), VAE: Part({}, {}), TEXT: Part({}, {})}
        return Bundle(parts, scheduler_to_diffusers(ScheduleConfig(), target))

    assert ours_alone(bundle(False, "v")) is None
    assert ours_alone(bundle(True, "v")) == "with a learned variance"
    assert ours_alone(bundle(False, "score")) == "with a score target"
    assert ours_alone(bundle(False, "flow")) == "with a flow target"


@pytest.mark.parametrize("concat", [0, 5])
@pytest.mark.parametrize("learned", [False, True])
def test_channels_of_a_folder(concat: int, learned: bool) -> None:
    config = UNetConfig(concat_channels=concat)
    layout = unet_to_diffusers(NetworkSpec(config, 4, 8 if learned else 4, 768), 32)
    assert (layout["in_channels"], layout["out_channels"]) == (4 + concat, 8 if learned else 4)
    assert ("learned_variance" in layout) == learned == (layout["_class_name"] == "LatentDiffusionUNet")
    assert unet_from_diffusers(layout) == NetworkSpec(config, 4, 8 if learned else 4, 768)


def test_ddpm_takes_the_learned_variance_and_others_the_mean() -> None:
    pipe = model()
    drawn = {
        v: next(pipe.sample(["", ""], SampleConfig("ddpm", 4, variance=v))) for v in (None, "learned", "posterior")
    }
    assert torch.equal(drawn[None], drawn["learned"]) and not torch.equal(drawn["learned"], drawn["posterior"])
    means = model(learned=True)
    means.unet = HalfOnly(means.unet)  # type: ignore[assignment]
    for sampler in sorted(set(SAMPLERS) - {"ddpm"}):
        settings = SampleConfig(sampler, 4)
        assert torch.equal(next(means.sample([""], settings)), next(pipe.sample([""], settings)))
    assert torch.equal(next(means.sample([""] * 2, SampleConfig("ddpm", 4))), drawn["posterior"])
    with pytest.raises(ConfigError, match="has not learned the reverse variance"):
        next(means.sample([""], SampleConfig("ddpm", 4, variance="learned")))


class HalfOnly(nn.Module):
    """The U-Net without its variance output."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet, self.conv_in, self.config = unet, unet.conv_in, unet.config
        self.in_channels = self.out_channels = unet.in_channels
        self.spec = replace(unet.spec, out_channels=unet.in_channels)

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.unet(x_t, t, cond)[:, : self.in_channels]


# ---------------------------------------------------------------- whole runs

RUN = {
    "autoencoder": "none", "text": "none",
    "data": {"source": "textures", "image_size": 8, "size": 24},
    "unet": {"channels": [8, 8], "layers_per_level": 1, "attention_levels": [], "heads": [2], "groups": 4},
    "schedule": {"name": "linear", "num_steps": 3, "beta_start": 0.05, "beta_end": 0.5},
    "objective": {"learned_variance": True, "weighting": "variational_beta", "timesteps": "importance"},
    "train": {
        "steps": 10, "batch_size": 8, "lr": 1.0e-3, "ema_decay": 0.9, "log_every": 1, "validate_every": 10,
        "validation_size": 4, "sample_every": 10, "checkpoint_every": 7, "trackers": [],
    },
    "sample": {"sampler": "ddpm", "steps": 2, "guidance_scale": 1.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objective")
    (folder / "ldm.yaml").write_text(yaml.safe_dump({"run": f"{folder}/run", **RUN}))
    assert main(["train-ldm", str(folder / "ldm.yaml")]) == 0
    return folder


def task(folder: Path, *overrides: str) -> DiffusionTask:
    return DiffusionTask.from_config(
        ldm.config.load(DiffusionTrainingConfig, folder / "ldm.yaml", list(overrides)), lambda _: None
    )


def history(run: Path, step: int) -> dict[str, Any]:
    return json.loads((run / f"checkpoints/step-{step:08d}/state.json").read_text())["task"]["timesteps"]


def test_a_hybrid_run_trains_validates_and_draws(trained: Path) -> None:
    logged = read_metrics(trained / "run")
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["vlb"]) for line in logged) and len(logged) == 10
    assert sum(history(trained / "run", 10)["seen"]) == 10 * 8
    pipe = Pipeline.from_pretrained(trained / "run", "cpu")
    assert pipe.learned_variance and pipe(["", ""], seed=3)[0].size == (8, 8)


def test_validation_is_the_plain_loss_of_the_first_half(trained: Path) -> None:
    hybrid, plain = task(trained), task(trained, "objective.learned_variance=false", "objective.weighting=simple")
    half = HalfOnly(hybrid.trained.unet)
    plain.networks["unet"] = half
    with torch.no_grad():
        figures = [one.validate(0, lambda tensor: tensor, 0, 1) for one in (hybrid, plain)]
    assert repr(figures[0]) == repr(figures[1])


def test_a_run_cut_off_has_the_same_history_and_weights(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Stream.read

    def cut(self: Stream, position: int) -> Any:
        if position == 8 * 8 + 6 and not self.validation:
            raise PowerCut
        return read(self, position)

    command = ["train-ldm", str(trained / "ldm.yaml"), f"run={tmp_path}/run"]
    with monkeypatch.context() as patch:
        patch.setattr(Stream, "read", cut)
        with pytest.raises(PowerCut):
            main(command)
    assert main(command) == 0
    assert min(history(tmp_path / "run", 7)["seen"]) >= HISTORY  # importance was at work before the cut
    for name in ("state.json", "model_unet.safetensors", "ema.safetensors", "optimizer_unet.safetensors"):
        file = f"run/checkpoints/step-00000010/{name}"
        assert (tmp_path / file).read_bytes() == (trained / file).read_bytes()


def test_the_training_step_weighs_by_importance_and_remembers_without(trained: Path) -> None:
    one, passed = task(trained), []
    one.timesteps.history = filled(3)
    batch = collate([one.stream[p] for p in range(16, 24)])
    p = filled(3).probabilities
    t = (batch["t"][:, None] >= p.cumsum(0)).sum(1)
    logged = one.micro_step(one.networks, batch, 2, passed.append)
    losses = one.objective.loss(one.trained.unet, batch["image"], batch["eps"], t, Condition()).detach()
    expected = (losses / (3 * p[t])).mean()
    assert len(set(t.tolist())) > 1
    for found in (passed[0].detach(), logged["loss"]):
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=0)
    before = one.timesteps.history.probabilities
    one.after_update(2, lambda tensor: tensor, torch.tensor(True))
    plain = filled(3)
    plain.update(t, losses)
    torch.testing.assert_close(one.timesteps.history.probabilities, plain.probabilities, rtol=1e-5, atol=0)
    assert not torch.equal(before, plain.probabilities)


@pytest.mark.parametrize("processes", [2, 4])
def test_the_history_is_that_of_the_whole_batch_on_any_number_of_processes(trained: Path, processes: int) -> None:
    """Shares of an update on tasks of their own, and their tensors averaged as the processes' are."""

    def after(parts: list[list[list[int]]]) -> list[dict[str, Any]]:
        tasks = [task(trained) for _ in parts]
        for one, micro_batches in zip(tasks, parts, strict=True):
            one.timesteps.history = filled(3)
            for positions in micro_batches:
                one.micro_step(one.networks, collate([one.stream[p] for p in positions]), 1, lambda loss: None)
        mean = torch.stack([one.timesteps._update for one in tasks]).mean(0)
        for one in tasks:
            one.after_update(1, lambda _: mean, torch.tensor(True))
            assert not one.timesteps._update.any()
        return [one.state()["timesteps"] for one in tasks]

    (whole,) = after([[list(range(8, 16))]])
    share = 8 // processes
    for found in after([[list(range(8 + r * share, 8 + (r + 1) * share))] for r in range(processes)]):
        assert found["seen"] == whole["seen"]
        torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(whole["losses"]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.target=eps", "schedule.zero_terminal_snr=true"], "objective.target eps .* predict v or x0"),
        (
            [
                "objective.target=score",
                "schedule={name: given, num_steps: 2, betas: [0.5, 1.0], beta_start: null, beta_end: null}",
            ],
            "objective.target score .* predict v or x0",
        ),
        (
            ["objective.learned_variance=false", "sample.variance=learned"],
            "sample.variance learned needs objective.learned_variance: true",
        ),
        (
            ["objective.learned_variance=false", "objective.vlb_weight=0.1"],
            "objective.vlb_weight is for learned_variance: true",
        ),
        (["objective.vlb_weight=0"], "objective.vlb_weight"),
        (["objective.timesteps=random"], "objective.timesteps"),
        (["objective.p2_gamma=0"], "objective.p2_gamma"),
    ],
)
def test_what_does_not_fit_is_refused(trained: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ldm.config.load(DiffusionTrainingConfig, trained / "ldm.yaml", overrides)
