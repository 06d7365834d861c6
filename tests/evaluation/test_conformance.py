"""Every sampler has its stated order and reaches its target (docs/equations.md S5)."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.cli.main import main
from ldm.config import SCHEDULES, TARGETS, SampleConfig, ScheduleConfig, UNetConfig
from ldm.diffusion.samplers.grids import GRIDS
from ldm.diffusion.samplers.registry import SAMPLERS, Sampler
from ldm.diffusion.schedule import Schedule
from ldm.evaluation.samplers.conformance import reach
from ldm.evaluation.samplers.on_a_run import LEVELS, cheapest, compare_samplers
from ldm.evaluation.samplers.orders import (
    CASES,
    GAUSSIAN,
    MIXTURE,
    Case,
    draws_noise,
    flow,
    gaussian_moments,
    order,
    uniform,
)
from ldm.models.unet import UNet
from ldm.pipeline import Pipeline

LINEAR = Schedule.from_config(ScheduleConfig("linear"))
NAMES, KINDS = sorted(set(SAMPLERS) - {"lcm"}), sorted(SCHEDULES)  # lcm is in test_consistency.py
PAIRS = [(name, kind, TARGETS[(i + j) % len(TARGETS)]) for i, name in enumerate(NAMES) for j, kind in enumerate(KINDS)]


@pytest.mark.parametrize("name", sorted(CASES))
def test_order_of_convergence(name: str) -> None:
    """As steps double from 80 to 160, or for first-order ones from 20 to 40, within 0.2 of what is stated."""
    case = CASES[name]
    i = sorted(CASES).index(name)
    steps = (80, 160) if case.stated > 1 else (20, 40)
    found = order(case, Schedule.from_config(ScheduleConfig(KINDS[i % len(KINDS)])), TARGETS[i % len(TARGETS)], steps)
    assert found.measured == pytest.approx(case.stated, abs=0.2), found


def test_every_sampler_states_an_order() -> None:
    assert {name: CASES[name].stated for name in NAMES} == {name: SAMPLERS[name].order for name in NAMES}
    assert all(sampler.order > 0 for sampler in SAMPLERS.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_sampler_draws_noise_if_it_says_so(name: str) -> None:
    assert draws_noise(CASES[name]) == SAMPLERS[name].stochastic


# annealed_langevin is in test_langevin.py
@pytest.mark.parametrize(("name", "kind", "target"), [pair for pair in PAIRS if pair[0] != "annealed_langevin"])
def test_every_sampler_reaches_gaussian_data(name: str, kind: str, target: str) -> None:
    """From N(0, I) to clean data in 24 steps, every sampler on every schedule, each target with each of both somewhere.

    Equally spaced in λ: the first step of the trailing grid on the cosine schedule, from σ/α = 20,000 to
    13, is too long for heun and plms.
    """
    schedule = Schedule.from_config(ScheduleConfig(kind))
    (mean, variance), _ = gaussian_moments(CASES[name], schedule, target, GRIDS["uniform_lambda"](schedule, 24))
    assert mean == pytest.approx(0.5, abs=0.06)  # at the last step some schedules still hold some of x_0
    assert math.sqrt(variance) == pytest.approx(0.3, rel=0.35)


def test_heun_and_plms_need_a_grid_with_a_shorter_first_step() -> None:
    """What docs/samplers.md warns of: the deviation of N(0.5, 0.3²) on the cosine schedule in 20 steps."""
    schedule = Schedule.from_config(ScheduleConfig("cosine"))
    for name in ("heun", "plms"):
        found = {
            g: gaussian_moments(CASES[name], schedule, "x0", GRIDS[g](schedule, 20))[0][1] ** 0.5
            for g in ("trailing", "uniform_lambda")
        }
        assert found["trailing"] > 0.36 and found["uniform_lambda"] == pytest.approx(0.3, rel=0.12), found


def test_all_pairs_are_covered() -> None:
    assert {(n, t) for n, _, t in PAIRS} == {(n, t) for n in NAMES for t in TARGETS}
    assert {(k, t) for _, k, t in PAIRS} == {(k, t) for k in KINDS for t in TARGETS}


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"annealed_langevin"}))
def test_every_sampler_reaches_the_mixture(name: str) -> None:
    found = reach(CASES[name], LINEAR, "x0", 30, draws=500)
    assert found["sliced_wasserstein"] < 0.15 and found["mean"] < 0.2 and found["covariance"] < 0.25, found


def test_a_wrong_solver_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """2M with its correction reversed is of first order; ancestral noise of the wrong size does not converge."""

    def turned(denoiser: Any, x: Tensor, grid: Tensor, noise: Any, **_: object) -> Tensor:
        lam, before = LINEAR.half_log_snr(grid), None
        for i in range(len(grid) - 1):
            x0 = denoiser(x, grid[i]).x0
            data = x0 if before is None else x0 - (x0 - before) / 2
            x = (
                LINEAR.sigma(grid[i + 1]) / LINEAR.sigma(grid[i]) * x
                - LINEAR.alpha(grid[i + 1]) * torch.expm1(lam[i] - lam[i + 1]) * data
            )
            before = x0
        return x

    monkeypatch.setitem(SAMPLERS, "turned", Sampler(turned, 2))
    assert order(Case("turned", 2), LINEAR, "x0", (20, 40)).measured == pytest.approx(1, abs=0.2)
    ddpm = SAMPLERS["ddpm"].function
    loud = lambda denoiser, x, grid, noise: ddpm(denoiser, x, grid, lambda i: 1.1 * noise(i))  # noqa: E731
    monkeypatch.setitem(SAMPLERS, "loud", Sampler(loud, 1, True))
    assert order(Case("loud", 1), LINEAR, "v", (20, 40)).measured < 0.5


def test_the_flow_keeps_gaussian_quantiles() -> None:
    """On Gaussian data x − α m stays in proportion to the marginal's deviation."""
    lam = torch.linspace(-1.5, 1.0, 41, dtype=torch.float64)
    alpha, sigma = torch.sigmoid(2 * lam).sqrt(), torch.sigmoid(-2 * lam).sqrt()
    deviation = (alpha**2 * 0.09 + sigma**2).sqrt()
    x = torch.tensor([[-1.0], [0.3], [2.0]], dtype=torch.float64)
    expected = [alpha[i] * 0.5 + deviation[i] / deviation[0] * (x - alpha[0] * 0.5) for i in range(41)]
    torch.testing.assert_close(torch.stack(flow(GAUSSIAN, x, lam)), torch.stack(expected), rtol=0, atol=1e-8)


def test_moments_are_those_of_many_samples() -> None:
    """What the rows of one affine run say, against 100,000 runs of DDPM in 5 steps."""
    grid, n = uniform(LINEAR, 5), 100_000
    generator = torch.Generator().manual_seed(0)
    noise = lambda _: torch.randn(n, 1, dtype=torch.float64, generator=generator)  # noqa: E731
    out, calls = CASES["ddpm"].run(LINEAR, "v", GAUSSIAN, 0.2 + 1.5 * noise(0), grid, noise)
    (mean, variance), same = gaussian_moments(CASES["ddpm"], LINEAR, "v", grid, (0.2, 2.25))
    assert calls == same == 5
    assert out.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / n))
    assert out.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / n))


def test_ends_outside_the_schedule_are_refused() -> None:
    with pytest.raises(ValueError, match="is outside that of the schedule"):
        uniform(LINEAR, 4, (-9.0, 1.0))


# ---------------------------------------------------------------- on a model


def test_distances_on_a_model_are_those_of_its_images() -> None:
    torch.manual_seed(0)
    unet = UNet(UNetConfig((8, 8), 1, (1,), (2,), groups=4), 3, 3, None)
    for parameter in unet.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    unet.requires_grad_(False).eval()
    pipe = Pipeline(unet, ScheduleConfig(num_steps=12), "v", None, None, 8, SampleConfig(guidance_scale=1.0, seed=3))
    seen: list[tuple[int, int]] = []
    report = compare_samplers(
        pipe,
        ["", "", ""],
        ["ddim", "dpmpp_2m", "ddpm", "plms"],
        [1, 6, 12],
        1e-6,
        2,
        lambda done, total, _: seen.append((done, total)),
    )
    rows = {(row["sampler"], row["steps"]): row for row in report["rows"]}
    assert report["reference"]["steps"] == 12 and rows["ddim", 12]["rms"] == 0 and ("plms", 1) not in rows
    images = [
        torch.cat(list(pipe.sample([""] * 3, SampleConfig(name, n, 1.0, seed=3)))).clamp(-1, 1)
        for name, n in (("ddim", 12), ("dpmpp_2m", 6))
    ]
    assert rows["dpmpp_2m", 6]["rms"] == pytest.approx(
        127.5 * (images[0] - images[1]).square().mean().sqrt().item(), rel=1e-5
    )
    assert (
        LEVELS == 127.5
        and "rms" not in rows["ddpm", 6]
        and rows["ddpm", 6]["sliced_wasserstein"] > 0
        and report["floor"] > 0
    )
    assert report["cheapest"] == rows["ddim", 12] and seen[-1][0] == seen[-1][1]


def test_the_cheapest_is_counted_in_calls() -> None:
    rows = [
        {"calls": 19, "rms": 1.0},
        {"calls": 12, "rms": 2.0},
        {"calls": 12, "rms": 1.5},
        {"calls": 5, "rms": 9.0},
        {"calls": 1},
    ]
    assert cheapest(rows, 2.0) == rows[2] and cheapest(rows, 1.2) == rows[0] and cheapest(rows, 0.5) is None


def test_the_command_on_exact_targets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.evaluation.samplers.conformance.ORDER_STEPS", (5, 10))
    assert (
        main(
            ["sampler-report", "--samplers", "euler", "euler_ancestral", "--steps", "3", "--out", str(tmp_path / "out")]
        )
        == 0
    )
    report = json.loads((tmp_path / "out/samplers.json").read_text())
    assert (
        set(report["samplers"]) == {"euler", "euler_ancestral"}
        and (tmp_path / "out/samplers.png").stat().st_size > 10_000
    )
    row = report["samplers"]["euler"]
    assert (
        row["measured"] == pytest.approx(math.log2(row["errors"][-2][2] / row["errors"][-1][2]))
        and row["reach"]["3"]["calls"] == 3
    )
    assert "| euler           | 1        |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samplers", "lcm"], "--samplers: lcm is for distilled models, not for exact denoisers: name a run"),
        (["--samplers", "dpm"], "--samplers: 'dpm' is none of ddpm"),
        (["--steps", "0"], "--steps must lie between 1 and 1000"),
        (["nowhere", "--grid", "even"], "--grid: 'even' is none of trailing"),
        (["--images", "4"], "--images needs a run"),
        (["nowhere"], "nowhere is not a run"),
        (["nowhere", "--within", "0"], "--within must be above 0"),
    ],
)
def test_slips_are_told_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sampler-report", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_the_mixture_is_one_that_tells() -> None:
    """Unequal modes, apart, and not on the axes: or a sampler could be right by symmetry."""
    mean, covariance = MIXTURE.moments()
    assert len(set(MIXTURE.weights.tolist())) == 3 and mean.norm() > 0.1 and abs(covariance[0, 1]) > 0.01
