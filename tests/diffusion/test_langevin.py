"""Langevin samplers: the step against its closed form on a Gaussian, the rest against DDIM and on a mixture (S4)."""

import math

import pytest
import torch
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.samplers.ancestral import ddim
from ldm.diffusion.samplers.grids import GRIDS
from ldm.diffusion.samplers.langevin import annealed_langevin, langevin_step, predictor_corrector
from ldm.diffusion.samplers.registry import SAMPLERS
from ldm.diffusion.schedule import Schedule
from ldm.evaluation.samplers.mixture import GaussianMixture
from ldm.evaluation.samplers.orders import MIXTURE, Case, gaussian_moments, uniform

pytestmark = pytest.mark.usefixtures("seed")

SCHEDULE = Schedule.from_config(ScheduleConfig("linear"))
NAMES = ("annealed_langevin", "predictor_corrector")


def test_a_step_shrinks_and_spreads_as_it_should() -> None:
    """On N(m, v) at level t, V = α² v + σ²: x − α m shrinks by 1 − δ/(2V), and the variance grows by δ = 4 r² σ²."""
    mean, variance, snr, t = 0.7, 0.2, 0.3, torch.tensor(400.0, dtype=torch.float64)
    of = lambda *v: torch.tensor(v, dtype=torch.float64)  # noqa: E731
    denoiser = GaussianMixture.of(of(1.0), of([mean]), of(variance)).denoiser(SCHEDULE, "eps")
    a, s = SCHEDULE.alpha(t).item(), SCHEDULE.sigma(t).item()
    x = of([a * mean], [a * mean + 1.0], [a * mean])
    out = langevin_step(denoiser(x, t), of([0.0], [0.0], [1.0]), snr)
    delta = 4 * snr**2 * s**2
    assert out[0].item() == pytest.approx(a * mean)
    assert (out[1] - out[0]).item() == pytest.approx(1 - delta / (2 * (a**2 * variance + s**2)))
    assert (out[2] - out[0]).item() == pytest.approx(math.sqrt(delta))


@pytest.mark.parametrize("dimensions", [1, 2, 16])
def test_steps_without_end_keep_the_variance(dimensions: int) -> None:
    """V/(1 − δ/(4V)) on data of variance V, the fixed point of v ← (1 − δ/(2V))² v + δ, in any dimension."""
    snr, t, generator = 0.3, torch.tensor(400), torch.Generator().manual_seed(0)
    of = lambda *v: torch.tensor(v, dtype=torch.float64)  # noqa: E731
    denoiser = GaussianMixture.of(of(1.0), of([0.0] * dimensions), of(0.2)).denoiser(SCHEDULE, "eps")
    a, s = SCHEDULE.alpha(t).item(), SCHEDULE.sigma(t).item()
    variance, delta = a**2 * 0.2 + s**2, 4 * snr**2 * s**2
    normal = lambda: torch.randn(4_000, dimensions, dtype=torch.float64, generator=generator)  # noqa: E731
    x, squares = variance**0.5 * normal(), []
    for _ in range(80):
        x = langevin_step(denoiser(x, t), normal(), snr)
        squares.append(x.square().mean().item())
    assert sum(squares[20:]) / 60 == pytest.approx(variance / (1 - delta / (4 * variance)), rel=0.015)


def test_song_s_step_is_ours_in_many_dimensions() -> None:
    """Algorithm 4's x + ε g + √(2ε) z, ε = 2 (r ‖z‖/‖g‖)², for the kernel's score, which is white noise over −s_t."""
    t, z, eps = (
        torch.tensor(300),
        torch.randn(3, 4_000, dtype=torch.float64),
        torch.randn(3, 4_000, dtype=torch.float64),
    )
    out = langevin_step(Denoiser(SCHEDULE, "eps", lambda *_: eps)(torch.zeros_like(z), t), z, 0.1)
    g = -eps / SCHEDULE.sigma(t)
    epsilon = 2 * (0.1 * z.norm() / g.norm()) ** 2
    torch.testing.assert_close(out, epsilon * g + (2 * epsilon).sqrt() * z, rtol=0.03, atol=5e-3)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("end", [-1.0, 20.0])
def test_without_steps_to_speak_of_the_predictor_is_ddim(eta: float, end: float) -> None:
    grid = torch.tensor([999.0, 700.0, 333.0, 90.0, end], dtype=torch.float64)
    x, noise = torch.randn(4, 2, dtype=torch.float64), torch.randn(12, 4, 2, dtype=torch.float64)
    denoiser = MIXTURE.denoiser(SCHEDULE, "v")
    corrected = predictor_corrector(denoiser, x, grid, lambda i: noise[i], eta=eta, corrections=2, snr=1e-9)
    torch.testing.assert_close(
        corrected, ddim(denoiser, x, grid, lambda i: noise[3 * i], eta=eta), rtol=1e-6, atol=1e-6
    )


def test_without_steps_to_speak_of_annealed_dynamics_keeps_x_over_alpha() -> None:
    x, noise = torch.randn(4, 2, dtype=torch.float64), torch.randn(20, 4, 2, dtype=torch.float64)
    grid = torch.tensor([900.0, 700.0, 333.0, 90.0], dtype=torch.float64)
    denoiser, alpha = MIXTURE.denoiser(SCHEDULE, "x0"), SCHEDULE.alpha(grid)
    out = annealed_langevin(denoiser, x, grid, lambda i: noise[i], snr=1e-9)
    torch.testing.assert_close(out, x * alpha[-1] / alpha[0], rtol=1e-6, atol=1e-6)
    clean = annealed_langevin(denoiser, x, torch.cat([grid, grid.new_tensor([-1.0])]), lambda i: noise[i], snr=1e-9)
    torch.testing.assert_close(clean, denoiser(out, grid[-1]).x0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "per_step"), [(NAMES[0], {}, 5), (NAMES[1], {}, 1), (NAMES[1], {"eta": 1.0}, 2)]
)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_calls_and_draws(name: str, options: dict[str, float], per_step: int, steps: int) -> None:
    """As many calls as the registry says, each draw its own, none in the last step, one callback a step."""
    calls, drawn, done = [], [], []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        calls.append(float(t[0]))
        return torch.tanh(x)

    def noise(i: int) -> Tensor:
        drawn.append(i)
        return torch.ones(2, 3)

    x, grid = torch.randn(2, 3), GRIDS["trailing"](SCHEDULE, steps)
    told = lambda i, sample, _: done.append((i, sample))  # noqa: E731
    out = SAMPLERS[name].function(Denoiser(SCHEDULE, "v", denoise), x, grid, noise, callback=told, **options)
    assert (
        len(calls) == SAMPLERS[name].calls(steps)
        and calls == sorted(calls, reverse=True)
        and set(calls) <= set(grid[:-1].tolist())
    )
    assert len(drawn) == len(set(drawn)) == per_step * (steps - 1)
    assert [i for i, _ in done] == list(range(steps)) and done[-1][1] is out and out.isfinite().all()


@pytest.mark.parametrize("options", [{"corrections": 0}, {"snr": 0.0}, {"snr": -1.0}])
def test_impossible_settings_are_refused(options: dict[str, float]) -> None:
    for name in NAMES:
        with pytest.raises(ValueError, match="corrections must be at least 1 and snr above 0"):
            SAMPLERS[name].function(
                Denoiser(SCHEDULE, "v", lambda x, t: x),
                torch.zeros(1, 1),
                torch.tensor([9.0, 3.0]),
                lambda i: i,
                **options,
            )


@pytest.mark.parametrize(("name", "steps"), [("annealed_langevin", 60), ("predictor_corrector", 30)])
def test_modes_have_their_weights(name: str, steps: int) -> None:
    """From N(0, I): the share of samples in each mode, and mean and covariance, as far as 600 draws can tell."""
    generator = torch.Generator().manual_seed(0)
    noise = lambda _: torch.randn(600, 2, dtype=torch.float64, generator=generator)  # noqa: E731
    out = SAMPLERS[name].function(MIXTURE.denoiser(SCHEDULE, "x0"), noise(0), GRIDS["trailing"](SCHEDULE, steps), noise)
    shares = MIXTURE.log_posterior(out, torch.tensor(1.0), torch.tensor(0.1)).exp().mean(0)
    torch.testing.assert_close(shares, MIXTURE.weights, rtol=0, atol=0.08)
    mean, covariance = MIXTURE.moments()
    torch.testing.assert_close(out.mean(0), mean, rtol=0, atol=0.2)
    torch.testing.assert_close(torch.cov(out.T), covariance, rtol=0, atol=0.2)


def test_corrections_forget_a_wrong_start() -> None:
    """Twice the right variance at the first level: DDIM carries it to the end, Langevin steps at each level lose it."""
    grid = uniform(SCHEDULE, 8)
    alpha, sigma = SCHEDULE.alpha(grid), SCHEDULE.sigma(grid)
    begin, end = (float(alpha[i] ** 2 * 0.09 + sigma[i] ** 2) for i in (0, -1))
    found = []
    for case in (Case("ddim", 1), Case("predictor_corrector", 1), Case("predictor_corrector", 1, {"corrections": 5})):
        (_, variance), _ = gaussian_moments(case, SCHEDULE, "v", grid, (float(alpha[0]) * 0.5, 2 * begin))
        found.append(variance / end)
    assert (
        found[0] == pytest.approx(2, abs=0.15) and found[1] < 0.8 * found[0] and found[2] == pytest.approx(1, abs=0.2)
    ), found
