"""Step grids and samplers against diffusers' schedulers, exact denoisers and their formulas."""

import math
from itertools import pairwise

import diffusers
import pytest
import torch
from support.denoisers import gaussian_denoiser, network, their_scheduler
from torch import Tensor

from ldm.config import TARGETS, ScheduleConfig
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.samplers.ancestral import ddim, ddim_inversion, ddpm
from ldm.diffusion.samplers.dpm_solver import dpmpp_2m
from ldm.diffusion.samplers.grids import GRIDS, check_steps, make_grid
from ldm.diffusion.samplers.registry import SAMPLERS
from ldm.diffusion.schedule import Schedule

pytestmark = [
    pytest.mark.usefixtures("seed"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # in diffusers
]


# ---------------------------------------------------------------- grids and samplers

INTEGER_GRIDS = ("trailing", "leading", "linspace")
SCHEDULES = {n: Schedule.from_config(ScheduleConfig("scaled_linear", n)) for n in (1000, 50, 2)}


def trailing(steps: int) -> Tensor:
    return GRIDS["trailing"](SCHEDULES[1000], steps)


def ending(*nodes: int) -> Tensor:
    """A grid that ends at clean data."""
    return torch.tensor([*nodes, -1], dtype=torch.float64)


@pytest.mark.parametrize("name", sorted(GRIDS))
@pytest.mark.parametrize("num_steps", [1000, 50, 2])
def test_grids_have_every_number_of_steps(name: str, num_steps: int) -> None:
    for steps in range(1, num_steps + 1):
        grid = GRIDS[name](SCHEDULES[num_steps], steps).tolist()
        assert len(grid) == steps + 1 and grid[0] <= num_steps - 1 and grid[-2] >= 0 and grid[-1] == -1
        assert all(a > b for a, b in pairwise(grid)), (steps, grid)
    for steps in (0, num_steps + 1, -1):
        with pytest.raises(ValueError, match=f"steps must lie between 1 and {num_steps}, got {steps}"):
            GRIDS[name](SCHEDULES[num_steps], steps)
        with pytest.raises(ValueError):
            check_steps(num_steps, steps)


@pytest.mark.parametrize("steps", [s for s in range(1, 1001) if 1000 % s == 0])
def test_grids_are_those_of_diffusers(steps: int) -> None:
    for name in INTEGER_GRIDS:
        if name == "linspace" and steps == 1:
            continue  # theirs is then t = 0: clean data asked for from noise
        theirs = diffusers.DDIMScheduler(
            timestep_spacing=name, steps_offset=1 if name == "leading" and steps < 1000 else 0
        )
        theirs.set_timesteps(steps)
        assert GRIDS[name](SCHEDULES[1000], steps).tolist() == [*theirs.timesteps.tolist(), -1]


@pytest.mark.parametrize("steps", [1, 2, 5, 9, 20, 30, 50, 77, 333, 500, 998])
def test_grids_of_other_families_are_those_of_diffusers(steps: int) -> None:
    """Trailing where steps do not divide T, DPM-Solver's spacings of S + 1 nodes, and Euler's fractional t."""
    ddim = diffusers.DDIMScheduler(timestep_spacing="trailing")
    ddim.set_timesteps(steps)
    assert trailing(steps)[:-1].tolist() == ddim.timesteps[:steps].tolist()  # theirs may have one too many
    for name, spacing in (("linspace_positive", "linspace"), ("leading_positive", "leading")):
        theirs = diffusers.DPMSolverMultistepScheduler(timestep_spacing=spacing, steps_offset=1)
        theirs.set_timesteps(steps)
        assert (GRIDS[name](SCHEDULES[1000], steps)[:-1] - theirs.timesteps).abs().max() <= (
            name == "linspace_positive"
        ) * (steps % 2 == 0)
    if steps > 1:
        euler = diffusers.EulerDiscreteScheduler(timestep_spacing="linspace")
        euler.set_timesteps(steps)
        assert (GRIDS["linspace_fractional"](SCHEDULES[1000], steps)[:-1] - euler.timesteps).abs().max() < 1e-3


def test_a_grid_may_have_an_offset_and_end_at_the_first_noise() -> None:
    schedule = SCHEDULES[1000]
    assert make_grid("leading", schedule, 4).tolist() == [751, 501, 251, 1, -1]
    assert make_grid("leading", schedule, 4, offset=7, end_clean=False).tolist() == [757, 507, 257, 7, 0]
    assert make_grid("leading", schedule, 4, offset=400).tolist() == [
        999,
        749,
        499,
        249,
        -1,
    ]  # no more than there is room for
    assert make_grid("trailing", schedule, 4, offset=7).tolist() == [999, 749, 499, 249, -1]  # it has none
    for name, offset in (("leading", 0), ("linspace", 1), ("karras", 1)):
        with pytest.raises(ValueError, match=f"{name} grid is t = 0 already"):
            make_grid(name, schedule, 4, offset=offset, end_clean=False)


def test_published_grids() -> None:
    assert [
        int(g[i]) for g in (GRIDS[n](SCHEDULES[1000], 20) for n in ("leading", "trailing", "linspace")) for i in (0, -2)
    ] == [
        951,
        1,
        999,
        49,
        999,
        0,
    ]


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("steps", [2, 7, 40])
def test_karras_and_uniform_grids_are_their_formulas(kind: str, steps: int) -> None:
    """(σ/α)^(1/7) and λ equally spaced between the schedule's ends, and both as in diffusers."""
    config = ScheduleConfig(kind)
    schedule = Schedule.from_config(config)
    for name, of_lambda, option in (
        ("karras", lambda lam: torch.exp(-lam / 7), "use_karras_sigmas"),
        ("uniform_lambda", lambda lam: lam, "use_lu_lambdas"),
    ):
        grid = GRIDS[name](schedule, steps)
        lam = schedule.half_log_snr(grid[:-1])
        even = of_lambda(schedule.half_log_snr(torch.linspace(999.0, 0.0, 2, dtype=torch.float64)))
        torch.testing.assert_close(
            of_lambda(lam), torch.linspace(*even.tolist(), steps, dtype=torch.float64), rtol=1e-9, atol=1e-9
        )
        theirs = their_scheduler(diffusers.DPMSolverMultistepScheduler, schedule, config, "eps", **{option: True})
        theirs.set_timesteps(steps)
        torch.testing.assert_close(theirs.sigmas[:-1].double(), torch.exp(-lam), rtol=1e-6, atol=0)
        assert (theirs.timesteps - grid[:-1]).abs().max() < (
            1 if kind == "cosine" else 0.5 + 1e-9
        )  # whole: cut, or rounded
    theirs = their_scheduler(
        diffusers.EulerDiscreteScheduler, schedule, config, "eps", use_karras_sigmas=True, timestep_spacing="linspace"
    )
    theirs.set_timesteps(steps)
    assert (theirs.timesteps - GRIDS["karras"](schedule, steps)[:-1]).abs().max() < 1e-3  # fractional


@pytest.mark.parametrize(
    "name", sorted(set(SAMPLERS) - {"annealed_langevin", "predictor_corrector"})
)  # in test_langevin.py
@pytest.mark.parametrize("steps", [1, 2, 3, 30, 333])
def test_a_sampler_calls_the_network_as_often_as_it_says(name: str, steps: int) -> None:
    schedule, sampler = SCHEDULES[1000], SAMPLERS[name]
    grid, steps = trailing(max(steps, sampler.fewest)), max(steps, sampler.fewest)
    calls, done, drawn = [], [], []

    def noise(i: int) -> Tensor:
        drawn.append(i)
        return torch.ones(2, 3)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (2,) and t[0] == t[1]
        calls.append(float(t[0]))
        return torch.tanh(x)

    x = torch.randn(2, 3)
    kept = x.clone()
    last = sampler.function(
        Denoiser(schedule, "v", denoise), x, grid, noise, callback=lambda i, sample, _: done.append((i, sample))
    )
    assert (
        len(calls) == sampler.calls(steps)
        and sorted(set(calls).intersection(grid.tolist()), reverse=True) == grid[:-1].tolist()
    )
    assert [i for i, _ in done] == list(range(steps)) and drawn == (
        list(range(steps - 1)) if sampler.stochastic else []
    )
    assert done[-1][1] is last and last.isfinite().all() and torch.equal(x, kept)


CASES = [
    (schedule, name) for schedule in ("linear", "scaled_linear", "cosine") for name in ("eps", "x0", "v")
]  # theirs


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_ddim_is_diffusers(kind: str, name: str, eta: float) -> None:
    config = ScheduleConfig(kind)
    schedule = Schedule.from_config(config)
    for steps in (1, 4, 25):
        theirs = their_scheduler(diffusers.DDIMScheduler, schedule, config, name)
        theirs.set_timesteps(steps)
        x = torch.randn(3, 8, dtype=torch.float64)
        noise, denoise = torch.randn(steps, 3, 8, dtype=torch.float64), network(schedule, name)
        expected = x
        for i, t in enumerate(theirs.timesteps):
            expected = theirs.step(
                denoise(expected, t.expand(3)), t, expected, eta=eta, variance_noise=noise[i]
            ).prev_sample
        actual = ddim(Denoiser(schedule, name, denoise), x, trailing(steps), lambda i, z=noise: z[i], eta=eta)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_ddpm_is_diffusers(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ScheduleConfig(kind)
    schedule = Schedule.from_config(config)
    for grid in (ending(999), ending(999, 700, 37, 2), trailing(20)):
        theirs = their_scheduler(diffusers.DDPMScheduler, schedule, config, name, variance_type="fixed_small")
        theirs.one = torch.tensor(1.0, dtype=torch.float64)
        theirs.set_timesteps(timesteps=grid[:-1].long().tolist())
        x = torch.randn(3, 8, dtype=torch.float64)
        noise, denoise = torch.randn(len(grid) - 1, 3, 8, dtype=torch.float64), network(schedule, name)
        expected = x
        for i, t in enumerate(theirs.timesteps):
            monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, z=noise[i], **__: z)
            expected = theirs.step(denoise(expected, t.expand(3)), t, expected).prev_sample
        actual = ddpm(Denoiser(schedule, name, denoise), x, grid, lambda i, z=noise: z[i])
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_dpmpp_2m_is_diffusers(kind: str, name: str) -> None:
    """float32: their solver works in it whatever it is given."""
    config = ScheduleConfig(kind)
    schedule = Schedule.from_config(config)
    for steps in (1, 2, 5, 10, 20, 50):
        theirs = their_scheduler(
            diffusers.DPMSolverMultistepScheduler, schedule, config, name,
            algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", final_sigmas_type="zero",
            timestep_spacing="trailing",
        )  # fmt: skip
        theirs.set_timesteps(steps)
        assert theirs.timesteps.tolist() == trailing(steps)[:-1].tolist()
        x, denoise = torch.randn(3, 8), network(schedule, name)
        expected = x
        for t in theirs.timesteps:
            expected = theirs.step(denoise(expected, t.expand(3)), t, expected).prev_sample
        actual = dpmpp_2m(Denoiser(schedule, name, denoise), x, trailing(steps), lambda i, x=x: x)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("grid", [ending(999), ending(999, 500, 499, 20, 0), ending(600, 3), trailing(40)])
def test_ddim_with_eta_one_is_ddpm(name: str, grid: Tensor, schedule: Schedule) -> None:
    x, noise = torch.randn(2, 6, dtype=torch.float64), torch.randn(len(grid) - 1, 2, 6, dtype=torch.float64)
    one = ddim(Denoiser(schedule, name, network(schedule, name)), x, grid, lambda i: noise[i], eta=1.0)
    two = ddpm(Denoiser(schedule, name, network(schedule, name)), x, grid, lambda i: noise[i])
    torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "steps", "eta", "tolerance"),
    [
        ("ddpm", 1000, None, 0.01),
        ("ddim", 500, 0.0, 0.01),
        ("ddim", 500, 0.5, 0.01),
        ("dpmpp_2m", 50, None, 0.01),
    ],
)
def test_samplers_reach_gaussian_data(name: str, steps: int, eta: float | None, tolerance: float) -> None:
    """With the exact denoiser a sampler is affine in x_T and in each step's noise: one run gives mean and variance.

    Row 0 starts at 0, row 1 at 1, row 2 + i gets 1 as the noise of step i.
    """
    schedule, (mean, std) = Schedule.from_config(ScheduleConfig("linear")), (1.5, 0.4)
    x = torch.zeros(2 + steps, 1, dtype=torch.float64)
    x[1] = 1

    def noise(i: int) -> Tensor:
        z = torch.zeros_like(x)
        z[2 + i] = 1
        return z

    denoise = gaussian_denoiser(schedule, mean, std, "v")
    options = {} if eta is None else {"eta": eta}
    out = SAMPLERS[name].function(Denoiser(schedule, "v", denoise), x, trailing(steps), noise, **options)[:, 0]
    assert out[0].item() == pytest.approx(mean, abs=tolerance)
    assert (out[1:] - out[0]).square().sum().sqrt().item() == pytest.approx(std, rel=tolerance)


def test_inversion_comes_back() -> None:
    """DDIM from the inverted noise: the error halves as steps double, and is 0 where ε̂ is constant."""
    schedule = SCHEDULES[1000]
    denoiser = Denoiser(schedule, "v", network(schedule, "v"))
    x = torch.randn(4, 6, dtype=torch.float64)
    lam = schedule.half_log_snr_table

    def round_trip(steps: int, denoiser: Denoiser) -> float:
        grid = schedule.time(torch.linspace(lam[800], lam[50], steps + 1, dtype=torch.float64))
        noise = ddim_inversion(denoiser, x, grid)
        assert (noise - x).abs().max() > 0.1
        return float((ddim(denoiser, noise, grid, lambda i: x) - x).abs().max())

    errors = [round_trip(steps, denoiser) for steps in (100, 200)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.1), errors
    constant = Denoiser(schedule, "eps", lambda x, t: torch.full_like(x, 0.3))
    assert round_trip(10, constant) < 1e-12
    grid = trailing(20)
    asked: list[float] = []
    recording = Denoiser(schedule, "eps", lambda x, t: (asked.append(t[0].item()), torch.full_like(x, 0.3))[1])
    ddim_inversion(recording, x, grid)
    assert asked == [
        0.0,
        *grid[:-1].flip(0).tolist()[:-1],
    ]  # at the step of the sample held; clean data as the first level
