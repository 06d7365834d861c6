"""Completion against the conditional of a Gaussian, the published path of RePaint, and the plain sampler."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ldm.diffusion.completion import Known, blended, repaint, repaint_path
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.samplers.ancestral import ddim, ddpm
from ldm.diffusion.samplers.dpm_solver import dpmpp_2m
from ldm.diffusion.samplers.grids import make_grid
from ldm.diffusion.schedule import Schedule

SCHEDULE = Schedule.named("cosine", 1000)


def published_path(steps: int, jump: int, repeats: int) -> list[int]:
    """Times as RePaint's appendix lists them, from T−1 down to −1 (clean), turned into nodes of a grid."""
    left = {t: repeats - 1 for t in range(0, steps - jump, jump)}
    t, times = steps, []
    while t >= 1:
        t -= 1
        times.append(t)
        if left.get(t, 0) > 0:
            left[t] -= 1
            for _ in range(jump):
                t += 1
                times.append(t)
    return [steps - 1 - t for t in [*times, -1]]


@pytest.mark.parametrize(
    ("steps", "jump", "repeats", "calls"),
    [
        (250, 10, 10, 2410),
        (50, 10, 10, 410),
        (25, 5, 5, 105),
        (20, 4, 3, 52),
        (7, 3, 2, 13),
        (10, 1, 3, 28),
        (5, 4, 1, 5),
    ],
)
def test_the_path_is_the_published_one(steps: int, jump: int, repeats: int, calls: int) -> None:
    path = repaint_path(steps, jump, repeats)
    assert path == published_path(steps, jump, repeats)
    assert sum(b > a for a, b in pairwise(path)) == calls


RHO, GIVEN = 0.8, 1.5  # correlation of the two numbers of a sample, and the known one


def gaussian(x_t: Tensor, t: Tensor) -> Tensor:
    """The exact prediction of v for samples [b, 1, 1, 2] of N(0, [[1, ρ], [ρ, 1]])."""
    a, s = SCHEDULE.alpha(t)[:, None], SCHEDULE.sigma(t)[:, None]
    covariance = torch.tensor([[1.0, RHO], [RHO, 1.0]], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(covariance)
    turned = x_t.flatten(1) @ vectors
    x0 = (turned * (a * values / (a * a * values + s * s))) @ vectors.T
    return ((a * x_t.flatten(1) - x0) / s).view_as(x_t)


def drawn(count: int) -> tuple[Denoiser, Known, Tensor]:
    torch.manual_seed(0)
    x0 = torch.zeros(count, 1, 1, 2, dtype=torch.float64)
    x0[..., 0] = GIVEN
    mask = torch.tensor([0.0, 1.0], dtype=torch.float64).expand(count, 1, 1, 2)
    return Denoiser(SCHEDULE, "v", gaussian), Known(x0, mask), torch.randn(count, 1, 1, 2, dtype=torch.float64)


def test_repaint_draws_the_conditional_and_blending_less_so() -> None:
    """E[b | a] = ρ a and Var[b | a] = 1 − ρ²; going back and forth brings the mean there."""
    count = 8_000
    denoiser, known, x = drawn(count)
    grid = make_grid("trailing", SCHEDULE, 50)
    noise = lambda name: torch.randn(count, 1, 1, 2, dtype=torch.float64)  # noqa: E731
    found = {
        "repaint": repaint(ddpm, denoiser, known, x, grid, noise, jump=5, repeats=8),
        "once": repaint(ddpm, denoiser, known, x, grid, noise, jump=5, repeats=1),
        "blended": ddim(denoiser, x, grid, callback=blended(known, SCHEDULE, grid, x)),
    }
    error = {name: abs(float(y[..., 1].mean()) - RHO * GIVEN) for name, y in found.items()}
    for y in found.values():
        assert bool((y[..., 0] == GIVEN).all())
    assert error["repaint"] < 0.08, error
    assert error["once"] > 2 * error["repaint"] and error["blended"] > 2 * error["repaint"], error
    assert float(found["repaint"][..., 1].var()) == pytest.approx(1 - RHO**2, rel=0.15)


@pytest.mark.parametrize("sampler", [ddim, dpmpp_2m])
def test_where_all_is_drawn_blending_is_the_sampler(sampler) -> None:
    denoiser, known, x = drawn(8)
    grid = make_grid("trailing", SCHEDULE, 12)
    everything = Known(known.x0, torch.ones_like(known.mask))
    assert torch.equal(
        sampler(denoiser, x, grid, callback=blended(everything, SCHEDULE, grid, x)), sampler(denoiser, x, grid)
    )


def test_the_known_part_has_the_noise_of_its_level_at_every_step() -> None:
    """Its one noise while blending, and the callback sees each step before it is kept."""
    _, known, x = drawn(4)
    grid, seen = make_grid("trailing", SCHEDULE, 6), []

    def callback(step: int, x: Tensor, x0: Tensor) -> None:
        seen.append(step)

    keep = blended(known, SCHEDULE, grid, x, callback)
    for step in range(6):
        t = grid[step + 1]
        kept = keep(step, torch.zeros_like(x), x)
        expected = float(SCHEDULE.alpha(t)) * GIVEN + float(SCHEDULE.sigma(t)) * x[..., 0]
        torch.testing.assert_close(kept[..., 0], expected)
        assert bool((kept[..., 1] == 0).all())
    assert seen == list(range(6))


def test_the_way_back_has_the_variance_of_the_process() -> None:
    """After jumps alone, with a model that leaves x as it is, the unknown part is a draw of q(x_t | x_s)."""
    count = 20_000
    _, known, _ = drawn(count)
    grid = make_grid("trailing", SCHEDULE, 3)
    torch.manual_seed(1)
    path = repaint_path(3, 1, 2)
    backs = [i for i, (a, b) in enumerate(pairwise(path)) if b < a]
    seen: dict[str, Tensor] = {}

    def still(denoiser: Denoiser, x: Tensor, grid: Tensor, noise, *, callback) -> Tensor:
        seen[f"{float(grid[0]):.0f} of call {len(seen)}"] = x
        return torch.ones_like(x)

    noise = lambda name: torch.randn(count, 1, 1, 2, dtype=torch.float64)  # noqa: E731
    repaint(still, Denoiser(SCHEDULE, "v", gaussian), known, known.x0, grid, noise, jump=1, repeats=2)
    assert backs and len(seen) == len(path) - 1 - len(backs)
    after_back = list(seen.values())[backs[0]]  # as many calls as nodes visited before it
    here, there = path[backs[0]], path[backs[0] + 1]
    ratio = SCHEDULE.alpha(grid[there]) / SCHEDULE.alpha(grid[here])
    variance = SCHEDULE.sigma(grid[there]) ** 2 - (ratio * SCHEDULE.sigma(grid[here])) ** 2
    unknown = after_back[..., 1]
    assert float(unknown.mean()) == pytest.approx(float(ratio), abs=5 * math.sqrt(float(variance) / count))
    assert float(unknown.var()) == pytest.approx(float(variance), rel=0.05)
