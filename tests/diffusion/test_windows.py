"""Fused windows against MultiDiffusion's averaged steps, and what they cover."""

import pytest
import torch
from torch import Tensor, nn

from ldm.diffusion.condition import NO_CONDITION, Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.samplers.ancestral import ddim
from ldm.diffusion.samplers.dpm_solver import dpmpp_2m
from ldm.diffusion.samplers.grids import make_grid
from ldm.diffusion.samplers.nodes import Nodes
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.windows import Windows, windowed

SCHEDULE = Schedule.named("cosine", 100)


class Wavy(nn.Module):
    """A model whose output at one place depends on its neighbours and on where its window begins."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 2, 3, padding=1).double()

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        ramp = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype).expand(len(x), 1, *x.shape[-2:])
        return torch.tanh(self.conv(torch.cat([x, ramp], 1))) * (1 + t[:, None, None, None] / 100)


def views(height: int, width: int, side: int, stride: int) -> list[tuple[int, int]]:
    """Corners of windows, the last of an axis at its end, by MultiDiffusion's loop."""

    def corners(n: int) -> list[int]:
        found = []
        at = 0
        while at + side < n:
            found.append(at)
            at += stride
        return [*found, n - side]

    return [(top, left) for top in corners(height) for left in corners(width)]


def averaged_steps(model: nn.Module, x: Tensor, grid: Tensor, side: int, stride: int, multistep: bool) -> Tensor:
    """MultiDiffusion as it is published: each view makes its own step, DDIM's or DPM-Solver++(2M)'s, and they are
    averaged, here with the weights of a tent."""
    nodes, history = Nodes.of(SCHEDULE, grid, x), {}
    ramp = torch.tensor([min(i, side - 1 - i) + 1.0 for i in range(side)], dtype=x.dtype)
    tent = torch.outer(ramp, ramp)
    for i in range(nodes.steps):
        total, weight = torch.zeros_like(x), torch.zeros_like(x)
        for top, left in views(*x.shape[-2:], side, stride):
            place = (..., slice(top, top + side), slice(left, left + side))
            t = nodes.t[i].expand(len(x))
            v = model(x[place], t, NO_CONDITION)
            x0 = nodes.alpha[i] * x[place] - nodes.sigma[i] * v
            data = x0
            if multistep and i > 0 and i < nodes.steps - 1:
                h, before = nodes.lam[i + 1] - nodes.lam[i], nodes.lam[i] - nodes.lam[i - 1]
                data = x0 + h / (2 * before) * (x0 - history[top, left])
            history[top, left] = x0
            eps = (x[place] - nodes.alpha[i] * data) / nodes.sigma[i]
            total[place] += tent * (nodes.alpha[i + 1] * data + nodes.sigma[i + 1] * eps)
            weight[place] += tent
        x = total / weight
    return x


@pytest.mark.parametrize(("sampler", "multistep"), [(ddim, False), (dpmpp_2m, True)])
@pytest.mark.parametrize(("size", "stride"), [((8, 19), 3), ((13, 17), 8), ((8, 8), 4)])
def test_one_step_with_the_mean_prediction_is_the_mean_of_the_steps(
    sampler, multistep: bool, size: tuple[int, int], stride: int
) -> None:
    model, grid = Wavy(), make_grid("trailing", SCHEDULE, 20)
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    fused = windowed(model, Windows(8, stride))
    denoiser = Denoiser(SCHEDULE, "v", lambda x_t, t: fused(x_t, t, NO_CONDITION))
    with torch.no_grad():
        ours = sampler(denoiser, x, grid)
        theirs = averaged_steps(model, x, grid, 8, stride, multistep)
    assert (ours - theirs).abs().max() < 1e-12
    whole = sampler(Denoiser(SCHEDULE, "v", lambda x_t, t: model(x_t, t, NO_CONDITION)), x, grid)
    assert bool((ours - whole).abs().max() > 1e-3) is (size != (8, 8))  # windows differ where there are several


@pytest.mark.parametrize("size", [(8, 8), (5, 30), (21, 8), (9, 31)])
@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize("circular", [(False, False), (True, False), (True, True)])
def test_every_place_is_covered_by_whole_windows(
    size: tuple[int, int], stride: int, circular: tuple[bool, bool]
) -> None:
    seen = torch.zeros(size)
    for rows, columns in Windows(8, stride, circular).places(*size):
        assert (len(rows), len(columns)) == (min(8, size[0]), min(8, size[1]))
        for positions, closed in ((rows, circular[0]), (columns, circular[1])):
            assert closed or bool((positions.diff() == 1).all())
        seen[rows[:, None], columns] += 1
    assert bool((seen >= 1).all())


def test_a_model_without_neighbours_is_itself() -> None:
    x = torch.randn(3, 2, 11, 25)
    t = torch.full((3,), 7)
    fused = windowed(lambda x_t, t, cond: x_t.sin() * t[:, None, None, None], Windows(8, 4, (False, True)))
    torch.testing.assert_close(fused(x, t, NO_CONDITION), x.sin() * 7)


def test_a_closed_sample_has_no_seam() -> None:
    """Rolling it by a stride rolls the prediction, also across its ends; of an open one it does not."""
    model, x, t = Wavy(), torch.randn(1, 2, 8, 24, dtype=torch.float64), torch.tensor([3])
    with torch.no_grad():
        for circular, equal in (((False, True), True), ((False, False), False)):
            fused = windowed(model, Windows(8, 4, circular))
            rolled = fused(x.roll(4, 3), t, NO_CONDITION)
            assert torch.allclose(rolled, fused(x, t, NO_CONDITION).roll(4, 3)) is equal


def test_further_channels_are_cut_with_the_sample() -> None:
    x, extra = torch.randn(2, 1, 8, 20), torch.randn(2, 1, 8, 20)
    fused = windowed(lambda x_t, t, cond: x_t + cond.concat, Windows(8, 3))
    torch.testing.assert_close(fused(x, torch.zeros(2), Condition(concat=extra)), x + extra)


def test_refusals() -> None:
    for stride in (0, 9):
        with pytest.raises(ValueError, match=f"between 1 and their side 8, got {stride}"):
            Windows(8, stride)
    fused = windowed(lambda x_t, t, cond: x_t, Windows(8, 4))
    with pytest.raises(ValueError, match="ControlNet"):
        fused(torch.zeros(1, 1, 8, 9), torch.zeros(1), Condition(control=(torch.zeros(1),)))
