"""Schedule and process against closed forms, Bayes' rule on a grid, and diffusers' tables."""

import math

import diffusers
import numpy as np
import pytest
import torch

import ldm.config
import ldm.data.sources
import ldm.training.trackers
from ldm.config import TARGETS, ConfigError, ScheduleConfig
from ldm.diffusion.objective import WEIGHTINGS, target
from ldm.diffusion.process import (
    from_x0,
    learned_log_variance,
    posterior_mean,
    posterior_variance,
    score,
    to_eps,
    to_x0,
    transition,
)
from ldm.diffusion.reference import forward_step, reverse_mean
from ldm.diffusion.samplers.ancestral import VARIANCES
from ldm.diffusion.samplers.grids import GRIDS
from ldm.diffusion.samplers.registry import SAMPLERS
from ldm.diffusion.schedule import SCHEDULES, Schedule, shifted, zero_terminal
from ldm.errors import FolderError
from ldm.interop.compvis.schedule import schedule_of
from ldm.interop.diffusers.schedulers import scheduler_from_diffusers, scheduler_to_diffusers

NAMES = sorted(SCHEDULES)

pytestmark = [
    pytest.mark.usefixtures("seed"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # in diffusers
]


def test_every_choice_of_the_configuration_exists() -> None:
    assert set(SCHEDULES) == set(ldm.config.SCHEDULES)
    assert set(SAMPLERS) == set(ldm.config.SAMPLERS)
    assert set(GRIDS) == set(ldm.config.GRIDS)
    assert set(VARIANCES) == set(ldm.config.VARIANCES)
    assert set(WEIGHTINGS) == set(ldm.config.WEIGHTINGS)
    assert set(ldm.data.sources.OPENERS) == set(ldm.config.SOURCES)
    assert set(ldm.training.trackers.OPENERS) == set(ldm.config.TRACKERS)


# ---------------------------------------------------------------- schedule


@pytest.mark.parametrize("zero_terminal", [False, True])
@pytest.mark.parametrize("steps", [22, 100, 1000, 4000])
@pytest.mark.parametrize("name", NAMES)
def test_tables_are_those_of_diffusers(name: str, steps: int, zero_terminal: bool) -> None:
    config = ScheduleConfig(name, steps, zero_terminal_snr=zero_terminal)
    ours = Schedule.from_config(config)
    theirs = diffusers.DDIMScheduler.from_config(scheduler_to_diffusers(config, "eps"))
    t = torch.arange(steps)
    assert ours.num_steps == steps == len(theirs.alphas_cumprod)
    # theirs are float32 throughout, so the tolerances are theirs
    bar = theirs.alphas_cumprod.double()
    assert (ours.alphas_cumprod - bar).abs().max() < 9e-7 * max(1, steps / 1000) * (2 if zero_terminal else 1)
    rtol = (3e-5 + 6e-8 / (1 - bar[0].item())) * (2 if zero_terminal else 1)
    torch.testing.assert_close(ours.sigma(t).square(), 1 - bar, rtol=rtol, atol=1e-6 if zero_terminal else 0)
    torch.testing.assert_close(ours.alpha(t), ours.alphas_cumprod.sqrt(), rtol=1e-11, atol=0)
    torch.testing.assert_close(ours.alpha(t).square() + ours.sigma(t).square(), torch.ones(steps, dtype=torch.float64))


@pytest.mark.parametrize(("name", "expected"), [("linear", 4.036e-5), ("scaled_linear", 4.682e-3), ("cosine", 2.43e-9)])
def test_terminal_snr(name: str, expected: float) -> None:
    schedule = Schedule.from_config(ScheduleConfig(name))
    assert schedule.snr(torch.tensor(999)).item() == pytest.approx(expected, rel=2e-3)


def test_cosine_follows_its_formula_until_the_clip() -> None:
    """ᾱ_t = f(t)/f(0) wherever no β up to t was clipped (Nichol & Dhariwal 2021, eq. 17)."""
    schedule = Schedule.from_config(ScheduleConfig("cosine"))
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1000)]
    for t in (1, 250, 500, 900, 998):
        assert schedule.alphas_cumprod[t - 1].item() == pytest.approx(f[t] / f[0], rel=1e-9)
    assert schedule.betas[-1] == 0.999


def test_clean_data_is_step_minus_one(schedule: Schedule) -> None:
    clean = torch.tensor(-1)
    assert schedule.alpha(clean) == 1 and schedule.sigma(clean) == 0 and schedule.half_log_snr(clean) == math.inf
    t = torch.arange(1000)
    torch.testing.assert_close(schedule.half_log_snr(t), schedule.snr(t).log() / 2)
    assert (schedule.half_log_snr(t).diff() < 0).all()


def test_fractional_steps_lie_between_in_lambda(schedule: Schedule) -> None:
    """At whole t the table itself; between two, λ on the straight line, and back by ``time``."""
    whole = torch.arange(-1, 1000)
    assert torch.equal(schedule.alpha(whole.double()), schedule.alpha(whole)) and torch.equal(
        schedule.sigma(whole.double()), schedule.sigma(whole)
    )
    t = torch.tensor([0.0, 0.25, 3.5, 499.9, 998.125, 999.0], dtype=torch.float64)
    table = schedule.half_log_snr(torch.arange(1000))
    expected = torch.from_numpy(np.interp(t.numpy(), np.arange(1000), table.numpy()))
    torch.testing.assert_close(schedule.half_log_snr(t), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        schedule.alpha(t).square() + schedule.sigma(t).square(), torch.ones(6, dtype=torch.float64)
    )
    torch.testing.assert_close(schedule.time(schedule.half_log_snr(t)), t, rtol=0, atol=1e-8)
    assert schedule.time(torch.tensor([100.0, -100.0], dtype=torch.float64)).tolist() == [0, 999]
    with pytest.raises(ValueError, match="between −1 and 0"):
        schedule.alpha(torch.tensor(-0.5))


@pytest.mark.parametrize("name", NAMES)
def test_zero_terminal_snr_as_printed(name: str) -> None:
    """√ᾱ'_t = (√ᾱ_t − √ᾱ_T)·√ᾱ_1/(√ᾱ_1 − √ᾱ_T): first value kept, last exactly 0, β_T = 1 (docs/equations.md F4)."""
    plain, zero = (Schedule.from_config(ScheduleConfig(name, zero_terminal_snr=flag)) for flag in (False, True))
    signal, last = plain.alphas_cumprod.sqrt(), torch.tensor(999)
    expected = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    torch.testing.assert_close(zero.alpha(torch.arange(1000)), expected, rtol=1e-9, atol=1e-15)
    assert zero.alpha(last) == 0 and zero.sigma(last) == 1 and zero.snr(last) == 0 and zero.betas[-1] == 1
    assert zero.half_log_snr_table.isfinite().all() and (zero.half_log_snr_table.diff() < 0).all()
    x0, eps = torch.randn(1, 4, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
    assert torch.equal(zero.add_noise(x0, eps, last[None]), eps)
    for target_ in ("x0", "v"):  # the others say nothing of x_0 there
        torch.testing.assert_close(
            to_x0(zero, target_, target(zero, target_, x0, eps, last[None]), eps, last[None]), x0
        )


@pytest.mark.parametrize("ratio", [0.5, 2.0, 4.0])
def test_a_resolution_shift_moves_lambda(schedule: Schedule, ratio: float) -> None:
    """Averaging ratio² pixels with independent noise raises λ by log ratio, which undoes the shift."""
    moved = Schedule(shifted(schedule.betas, ratio))
    t = torch.arange(1000)
    torch.testing.assert_close(moved.half_log_snr(t), schedule.half_log_snr(t) - math.log(ratio), rtol=1e-7, atol=1e-7)
    noise = moved.sigma(t) / moved.alpha(t) / ratio  # deviation of the mean of ratio² pixels
    torch.testing.assert_close(noise, schedule.sigma(t) / schedule.alpha(t), rtol=1e-6, atol=0)
    assert torch.equal(
        Schedule.from_config(ScheduleConfig("cosine", shift=2.0)).betas, shifted(SCHEDULES["cosine"](1000), 2.0)
    )


def test_schedules_as_printed() -> None:
    """F5's other rows: β scaled by 1000/T, β or ᾱ through a sigmoid, a straight path, β as given."""
    torch.testing.assert_close(SCHEDULES["linear_rescaled"](250), 4 * SCHEDULES["linear"](250))
    expected = [1e-4 + (0.02 - 1e-4) / (1 + math.exp(6 - 12 * i / 99)) for i in range(100)]
    torch.testing.assert_close(SCHEDULES["sigmoid"](100), torch.tensor(expected, dtype=torch.float64))
    logistic = [1 / (1 + math.exp(3 - 6 * i / 100)) for i in range(101)]
    bar = [(logistic[-1] - value) / (logistic[-1] - logistic[0]) for value in logistic]
    table = Schedule.from_config(ScheduleConfig("sigmoid_signal", 100)).alphas_cumprod
    torch.testing.assert_close(table[:98], torch.tensor(bar[1:99], dtype=torch.float64))  # the last β is clipped
    flow, tau = Schedule.from_config(ScheduleConfig("rectified_flow", 100)), torch.arange(1, 99).double() / 100
    torch.testing.assert_close(flow.alpha(torch.arange(98)) / flow.sigma(torch.arange(98)), (1 - tau) / tau)
    given = ScheduleConfig("given", 3, betas=(0.1, 0.2, 1.0))
    assert Schedule.from_config(given).betas.tolist() == [0.1, 0.2, 1.0]


def test_given_betas_reach_the_table() -> None:
    betas = Schedule.from_config(ScheduleConfig("linear", 5, 0.1, 0.5)).betas
    torch.testing.assert_close(betas, torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64))
    roots = Schedule.from_config(ScheduleConfig("scaled_linear", 3, 0.01, 0.25)).betas
    torch.testing.assert_close(roots, torch.tensor([0.01, 0.09, 0.25], dtype=torch.float64))


@pytest.mark.parametrize("bad", [[0.0, 0.1], [1.0, 0.1], [0.1, 1.1], [0.1, math.nan], [0.1, -0.1]])
def test_impossible_betas_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        Schedule(torch.tensor(bad))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", [True, False])
def test_a_process_of_one_step_is_refused(name: str, check: bool) -> None:
    """One line wherever it comes from: betas, zero terminal SNR (0/0 there), settings, a scheduler, a single file."""
    for betas in (SCHEDULES[name](1).clamp(max=0.9), zero_terminal(SCHEDULES[name](1).clamp(max=0.9))):
        with pytest.raises(ValueError, match=r"betas must be one row of at least 2 numbers, got \[1\]"):
            Schedule(betas, check=check)
    for read in (
        lambda: ScheduleConfig(name, 1),
        lambda: scheduler_from_diffusers({"num_train_timesteps": 1}),
        lambda: scheduler_from_diffusers({"trained_betas": [0.5]}),
        lambda: schedule_of({"betas": torch.tensor([0.5])}),
    ):
        with pytest.raises((ConfigError, FolderError), match="must lie between 2 and "):
            read()


def test_noise_is_the_composition_of_single_steps(schedule: Schedule) -> None:
    """F1 applied t times: mean and variance follow m ← √(1−β) m, V ← (1−β) V + β."""
    mean, variance, means, variances = 1.0, 0.0, [], []
    for beta in schedule.betas.tolist():
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        means.append(mean)
        variances.append(variance)
    t, one, zero = (
        torch.arange(1000),
        torch.ones(1000, 2, 3, dtype=torch.float64),
        torch.zeros(1000, 2, 3, dtype=torch.float64),
    )
    expected = torch.tensor(means, dtype=torch.float64)[:, None, None].expand(-1, 2, 3)
    torch.testing.assert_close(schedule.add_noise(one, zero, t), expected, rtol=1e-10, atol=0)
    expected = torch.tensor(variances, dtype=torch.float64)[:, None, None].expand(-1, 2, 3)
    torch.testing.assert_close(schedule.add_noise(zero, one, t).square(), expected, rtol=1e-10, atol=0)


def test_noising_keeps_the_type_and_matches_diffusers() -> None:
    schedule = Schedule.from_config(ScheduleConfig("scaled_linear"))
    x0, eps, t = torch.randn(5, 4, 3, 3), torch.randn(5, 4, 3, 3), torch.tensor([0, 1, 500, 998, 999])
    theirs = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(schedule.add_noise(x0, eps, t), theirs.add_noise(x0, eps, t), rtol=1e-5, atol=1e-5)
    assert schedule.add_noise(x0.bfloat16(), eps.bfloat16(), t).dtype == torch.bfloat16


# ---------------------------------------------------------------- transitions, posterior, conversions


@pytest.mark.parametrize(("s", "t"), [(0, 1), (4, 5), (20, 60), (300, 301), (100, 700), (0, 999)])
def test_posterior_is_bayes_rule(schedule: Schedule, s: int, t: int) -> None:
    """q(x_s | x_t, x_0) ∝ q(x_t | x_s) q(x_s | x_0), both products of single steps, normalised on a grid of x_s."""

    def steps(first: int, last: int) -> tuple[float, float]:
        ratio, variance = 1.0, 0.0
        for beta in schedule.betas[first:last].tolist():
            ratio, variance = ratio * math.sqrt(1 - beta), (1 - beta) * variance + beta
        return ratio, variance

    (a_s, v_s), (ratio, v) = steps(0, s + 1), steps(s + 1, t + 1)
    s_, t_ = torch.tensor(s), torch.tensor(t)
    assert tuple(value.item() for value in transition(schedule, s_, t_)) == pytest.approx((ratio, v), rel=1e-9)

    x0, x_t = 0.7, -0.4
    x_s = torch.linspace(-12, 12, 2_000_001, dtype=torch.float64)
    log = -((x_t - ratio * x_s) ** 2) / (2 * v) - (x_s - a_s * x0) ** 2 / (2 * v_s)
    weight = torch.softmax(log, 0)
    mean = (weight * x_s).sum()
    variance = (weight * (x_s - mean) ** 2).sum()
    wrap = lambda value: torch.full((1, 1), value, dtype=torch.float64)  # noqa: E731
    assert posterior_mean(schedule, wrap(x0), wrap(x_t), s_, t_).item() == pytest.approx(mean.item(), abs=1e-8)
    assert posterior_variance(schedule, s_, t_).item() == pytest.approx(variance.item(), rel=1e-6)


def test_posterior_of_neighbours_as_printed(schedule: Schedule) -> None:
    """P1's own coefficients, at every t ≥ 1; at t = 0 the mean is x̂_0 and the variance 0."""
    t = torch.arange(1, 1000)
    bar, before, beta = schedule.alphas_cumprod[1:], schedule.alphas_cumprod[:-1], schedule.betas[1:]
    torch.testing.assert_close(
        posterior_variance(schedule, t - 1, t), beta * (1 - before) / (1 - bar), rtol=1e-8, atol=0
    )
    x0, x_t = torch.randn(999, 2, dtype=torch.float64), torch.randn(999, 2, dtype=torch.float64)
    first, second = before.sqrt() * beta / (1 - bar), (1 - beta).sqrt() * (1 - before) / (1 - bar)
    torch.testing.assert_close(posterior_mean(schedule, x0, x_t, t - 1, t), first[:, None] * x0 + second[:, None] * x_t)
    clean, zero = torch.tensor([-1]), torch.tensor([0])
    assert posterior_variance(schedule, clean, zero) == 0
    torch.testing.assert_close(posterior_mean(schedule, x0[:1], x_t[:1], clean, zero), x0[:1])


def test_one_step_is_its_formula(schedule: Schedule) -> None:
    """F1, and the same mean and variance as F3 between neighbours."""
    t = torch.arange(1, 1000)
    one, zero = torch.ones(999, 2, dtype=torch.float64), torch.zeros(999, 2, dtype=torch.float64)
    ratio, v = transition(schedule, t - 1, t)
    torch.testing.assert_close(forward_step(schedule, one, zero, t)[:, 0], ratio, rtol=1e-9, atol=0)
    torch.testing.assert_close(forward_step(schedule, zero, one, t)[:, 0].square(), v, rtol=1e-8, atol=0)


@pytest.mark.parametrize(("s", "t"), [(0, 1), (4, 5), (300, 301), (100, 700), (-1, 0), (-1, 500), (0, 999)])
def test_reverse_mean_from_the_noise(schedule: Schedule, s: int, t: int) -> None:
    """P3 is P1 and P2 with x̂_0 of P4; between neighbours as printed, (x_t − β_t/√(1−ᾱ_t) ε)/√α_t."""
    x_t, eps = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    s_, t_ = torch.tensor(s), torch.tensor(t)
    mean = reverse_mean(schedule, eps, x_t, s_, t_)
    x0 = (x_t - schedule.sigma(t_) * eps) / schedule.alpha(t_)
    scale = x0.abs().max().item()  # at the noisy end x̂_0 is large and cancels
    torch.testing.assert_close(mean, posterior_mean(schedule, x0, x_t, s_, t_), rtol=1e-7, atol=1e-11 * scale)
    if t == s + 1:
        beta, bar = schedule.betas[t], schedule.alphas_cumprod[t]
        torch.testing.assert_close(
            mean, (x_t - beta / (1 - bar).sqrt() * eps) / (1 - beta).sqrt(), rtol=1e-8, atol=1e-9
        )


def test_learned_variance_lies_between_its_ends(schedule: Schedule) -> None:
    """P5: o = 1 gives β_t, o = −1 β̃_t, 0 their geometric mean, above 1 more than β_t; at t = 0 β̃ of t = 1."""
    for s, t in ((0, 1), (400, 401), (998, 999), (10, 60)):
        s_, t_ = torch.tensor(s), torch.tensor(t)
        large, small = transition(schedule, s_, t_)[1].item(), posterior_variance(schedule, s_, t_).item()
        output = torch.tensor([[1.0, -1.0, 0.0, 3.0]], dtype=torch.float64)
        expected = [large, small, math.sqrt(large * small), large * large / small]
        assert learned_log_variance(schedule, output, s_, t_).exp()[0].tolist() == pytest.approx(expected, rel=1e-7)
        if t == s + 1:
            assert large == pytest.approx(schedule.betas[t].item(), rel=1e-7)
    first = learned_log_variance(
        schedule, torch.tensor([[1.0, -1.0]], dtype=torch.float64), torch.tensor(-1), torch.tensor(0)
    ).exp()[0]
    assert first.tolist() == pytest.approx(
        [schedule.betas[0].item(), posterior_variance(schedule, torch.tensor(0), torch.tensor(1)).item()]
    )


@pytest.mark.parametrize("name", TARGETS)
def test_score_is_the_gradient_of_the_kernel(schedule: Schedule, name: str) -> None:
    """With the true ε in the words of any target: autograd of log q(x_t | x_0)."""
    t = torch.tensor([0, 30, 500, 999])
    x0, eps = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    x_t = schedule.add_noise(x0, eps, t).requires_grad_()
    log = torch.distributions.Normal(schedule.alpha(t)[:, None] * x0, schedule.sigma(t)[:, None]).log_prob(x_t).sum()
    (gradient,) = torch.autograd.grad(log, x_t)
    x_t = x_t.detach()
    actual = score(schedule, name, target(schedule, name, x0, eps, t), x_t, t)
    torch.testing.assert_close(actual, gradient, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        from_x0(schedule, name, x0, x_t, t), target(schedule, name, x0, eps, t), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("name", TARGETS)
def test_predictions_convert_without_loss(schedule: Schedule, name: str) -> None:
    t = torch.arange(1000)
    x0, eps = torch.randn(1000, 3, dtype=torch.float64), torch.randn(1000, 3, dtype=torch.float64)
    x_t = schedule.add_noise(x0, eps, t)
    prediction = target(schedule, name, x0, eps, t)
    torch.testing.assert_close(to_x0(schedule, name, prediction, x_t, t), x0, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(to_eps(schedule, name, prediction, x_t, t), eps, rtol=1e-7, atol=1e-9)


def test_v_is_the_derivative_along_the_angle() -> None:
    """v = dx/dφ with a = cos φ, s = sin φ (Salimans & Ho 2022): a difference quotient of the kernel itself."""
    schedule = Schedule.from_config(ScheduleConfig("cosine"))
    t = torch.tensor([3, 400, 990])
    x0, eps = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    phi = torch.atan2(schedule.sigma(t), schedule.alpha(t))[:, None]
    ahead, behind = (torch.cos(phi + d) * x0 + torch.sin(phi + d) * eps for d in (1e-6, -1e-6))
    torch.testing.assert_close(target(schedule, "v", x0, eps, t), (ahead - behind) / 2e-6, rtol=1e-7, atol=1e-8)
