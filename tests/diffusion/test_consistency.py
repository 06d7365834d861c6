"""Consistency functions, their sampler and their distillation, against diffusers' LCMScheduler and closed forms."""

from __future__ import annotations

import sys
from collections.abc import Callable
from unittest import mock

import diffusers
import pytest
import torch
from support.denoisers import gaussian_denoiser, network, their_scheduler
from torch import Tensor, nn

from ldm.config import DistillConfig, ScheduleConfig
from ldm.diffusion.condition import Condition
from ldm.diffusion.consistency import Distillation, consistency, pseudo_huber, scalings
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.process import from_x0
from ldm.diffusion.samplers.ancestral import ddim
from ldm.diffusion.samplers.consistency import lcm
from ldm.diffusion.samplers.grids import GRIDS
from ldm.diffusion.schedule import Schedule

pytestmark = pytest.mark.usefixtures("seed")
MEAN, STD = 1.5, 0.4  # of Gaussian data


def exact(schedule: Schedule, target: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A network whose consistency function maps x_t on N(a m, a² σ² + s²) to the same quantile of N(m, σ²)."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        a, s = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        end = MEAN + STD * (x - a * MEAN) / (a**2 * STD**2 + s**2).sqrt()
        skip, out = (c[:, None] for c in scalings(t))
        return from_x0(schedule, target, (end - skip * x) / out, x, t)

    return predict


# ---------------------------------------------------------------- parametrisation and sampler


def test_scalings_are_those_of_diffusers() -> None:
    theirs = diffusers.LCMScheduler()
    for t in (0, 1, 7, 499, 999):
        expected = theirs.get_scalings_for_boundary_condition_discrete(t)
        assert [c.item() for c in scalings(torch.tensor(t))] == pytest.approx(expected, rel=1e-12)
    assert [c.item() for c in scalings(torch.tensor(-1.0))] == [1, 0]  # clean data


@pytest.mark.parametrize("num_steps", [1000, 600, 50, 12])
def test_the_lcm_grid_is_that_of_diffusers(num_steps: int) -> None:
    schedule, nodes = Schedule.from_config(ScheduleConfig(num_steps=num_steps)), min(50, num_steps)
    theirs = diffusers.LCMScheduler(num_train_timesteps=num_steps, original_inference_steps=nodes)
    for steps in range(1, nodes + 1):
        theirs.set_timesteps(steps)
        assert GRIDS["lcm"](schedule, steps).tolist() == [*theirs.timesteps.tolist(), -1]


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_lcm_is_diffusers(target: str, steps: int) -> None:
    config = ScheduleConfig("scaled_linear")
    schedule, x = Schedule.from_config(config), torch.randn(3, 5, dtype=torch.float64)
    predict, noise = network(schedule, target), torch.randn(steps, 3, 5, dtype=torch.float64)
    theirs = their_scheduler(diffusers.LCMScheduler, schedule, config, target)
    theirs.set_timesteps(steps)
    drawn, sample = iter(noise), x
    with mock.patch.object(sys.modules[type(theirs).__module__], "randn_tensor", lambda *_, **__: next(drawn)):
        for t in theirs.timesteps.tolist():  # of whole t as a tensor they make scalings in float32
            sample = theirs.step(predict(sample, torch.tensor([t])), t, sample).prev_sample
    ours = lcm(Denoiser(schedule, target, predict), x, GRIDS["lcm"](schedule, steps), lambda i: noise[i])
    torch.testing.assert_close(ours, sample, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kind", "target"), [("cosine", "v"), ("linear", "x0"), ("linear", "eps")])
def test_the_exact_consistency_function_is_sampled_exactly_in_any_number_of_steps(kind: str, target: str) -> None:
    """One affine run gives mean and variance. With x̂_0 = E[x_0 | x_t] instead, variance is lost at every number."""
    schedule = Schedule.from_config(ScheduleConfig(kind))
    for steps in (1, 2, 4):
        x = torch.zeros(2 + steps, 1, dtype=torch.float64)
        x[1] = 1

        def noise(i: int, x: Tensor = x) -> Tensor:
            z = torch.zeros_like(x)
            z[2 + i] = 1
            return z

        found = {}
        for name, predict in (("f", exact(schedule, target)), ("mean", gaussian_denoiser(schedule, MEAN, STD, target))):
            out = lcm(Denoiser(schedule, target, predict), x, GRIDS["lcm"](schedule, steps), noise)[:, 0]
            assert out[0].item() == pytest.approx(MEAN, abs=0.02)  # linear β leave some signal at the first step
            found[name] = (out[1:] - out[0]).square().sum().sqrt().item()
        assert found["f"] == pytest.approx(STD, rel=1e-3) and found["mean"] < 0.8 * STD


# ---------------------------------------------------------------- distillation


class Net(nn.Module):
    """A smooth network of x_t, t and its condition."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5, dtype=torch.float64) / 2)
        self.graded: list[bool] = []

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        self.graded.append(torch.is_grad_enabled())
        assert cond.vector is not None
        return torch.tanh(x @ self.weight + cond.vector + t[:, None] / 1000)


@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_the_loss_is_that_of_diffusers_schedulers(target: str) -> None:
    """A DDIM step of 25 by DDIMScheduler, both ends by LCMScheduler, one sample after another."""
    config = ScheduleConfig("scaled_linear")
    schedule, student, average, teacher = Schedule.from_config(config), Net(), Net(), Net()
    x0, eps, vector, null = torch.randn(4, 5, 5, dtype=torch.float64)
    t, scale, c = torch.tensor([999, 639, 79, 39, 3]), 2.5, 0.02
    cond, null_cond = Condition(vector=vector), Condition(vector=null)
    guided = Guidance(teacher, cond, null_cond, schedule, target, scale=scale)
    loss = Distillation(DistillConfig(scale, 25, c), schedule, target)
    ours = loss.losses(student, average, guided, x0, eps, t, cond)

    solver = their_scheduler(diffusers.DDIMScheduler, schedule, config, target, timestep_spacing="trailing")
    ends = their_scheduler(diffusers.LCMScheduler, schedule, config, target)
    solver.set_timesteps(25)
    ends.set_timesteps(1)  # its step is the last: no noise

    def end(network: Net, x: Tensor, time: int, i: int) -> Tensor:
        if time <= 0:
            return x
        ends._step_index = 0
        said = network(x, torch.tensor([time]), Condition(vector=vector[i : i + 1]))
        return ends.step(said, time, x).denoised

    for i, time in enumerate(t.tolist()):
        x = solver.add_noise(x0[i : i + 1], eps[i : i + 1], t[i])
        both = [teacher(x, t[i : i + 1], Condition(vector=v[i : i + 1])) for v in (null, vector)]
        before = solver.step(both[0] + scale * (both[1] - both[0]), time, x).prev_sample
        d = end(student, x, time, i) - end(average, before, time - 40, i)
        expected = (torch.sqrt(d**2 + c**2) - c).mean()
        torch.testing.assert_close(ours[i], expected, rtol=1e-9, atol=1e-12)


def test_clean_data_end_every_path_and_the_first_interval() -> None:
    distillation = Distillation(DistillConfig(intervals=50), Schedule.from_config(ScheduleConfig()), "v")
    assert distillation.earlier(torch.tensor([999, 21, 20, 19, 0])).tolist() == [979, 1, -1, -1, -1]
    fine = Distillation(DistillConfig(intervals=5000), distillation.schedule, "v")
    assert fine.earlier(torch.tensor([999, 1])).tolist() == [998, -1]


def test_the_end_that_is_aimed_at_has_no_gradient() -> None:
    schedule, student, average, teacher = Schedule.from_config(ScheduleConfig()), Net(), Net(), Net()
    x0, eps, vector = torch.randn(3, 2, 5, dtype=torch.float64)
    t, cond = torch.tensor([700, 5]), Condition(vector=vector)
    losses = Distillation(DistillConfig(), schedule, "v").losses(
        student, average, lambda x, t: teacher(x, t, cond), x0, eps, t, cond
    )
    losses.sum().backward()
    assert student.graded == [True] and average.graded == teacher.graded == [False]
    assert average.weight.grad is teacher.weight.grad is None and float(student.weight.grad.abs().sum()) > 0  # type: ignore[union-attr]


def test_pseudo_huber_is_a_square_near_zero_and_a_distance_far_from_it() -> None:
    small, large = torch.full((2, 3), 1e-4, dtype=torch.float64), torch.full((1, 3), -5.0, dtype=torch.float64)
    assert pseudo_huber(small, 0.1).tolist() == pytest.approx([1e-8 / 0.2] * 2, rel=1e-5)
    assert pseudo_huber(large, 1e-3).item() == pytest.approx(5 - 1e-3, rel=1e-6)


def test_an_exact_student_of_an_exact_teacher_has_the_error_of_the_ddim_step_alone() -> None:
    """Of first order in all over a path, so the loss of a step falls fourfold as the intervals double."""
    schedule = Schedule.from_config(ScheduleConfig("linear"))
    student, teacher = exact(schedule, "v"), gaussian_denoiser(schedule, MEAN, STD, "v")
    x0, eps = torch.randn(2, 200, 1, dtype=torch.float64)
    t = torch.full((200,), 600)

    def loss(intervals: int, predict: Callable[[Tensor, Tensor], Tensor]) -> float:
        distillation = Distillation(DistillConfig(intervals=intervals, huber=1e-6), schedule, "v")
        both = [lambda x, t, _: predict(x, t)] * 2
        return float(distillation.losses(*both, teacher, MEAN + STD * x0, eps, t).mean())

    losses = [loss(n, student) for n in (25, 50)]
    assert losses[0] / losses[1] == pytest.approx(4, rel=0.3) and losses[1] < 0.02
    assert loss(50, teacher) > 2 * losses[1]  # E[x_0 | x_t] is not the end of the path


class Affine(nn.Module):
    """x̂_0 = w_t x_t + b_t: with it f is exact on Gaussian data."""

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self.gain, self.shift = (nn.Parameter(torch.zeros(num_steps, dtype=torch.float64)) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        t = t.clamp(min=0).long()
        return self.gain[t, None] * x + self.shift[t, None]


def test_distillation_learns_where_the_teachers_flow_ends() -> None:
    """One call of the student from pure noise is DDIM of the teacher in as many steps as there are intervals."""
    schedule = Schedule.from_config(ScheduleConfig("linear_rescaled", 40))
    teacher = gaussian_denoiser(schedule, MEAN, STD, "x0")
    student, distillation = Affine(40), Distillation(DistillConfig(intervals=5, huber=0.1), schedule, "x0")
    optimizer = torch.optim.Adam(student.parameters(), 0.05)
    t = torch.arange(40).repeat(8)
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 300)
        x0, eps = torch.randn(2, len(t), 1, dtype=torch.float64)
        optimizer.zero_grad()
        distillation.losses(student, student, teacher, MEAN + STD * x0, eps, t).mean().backward()
        optimizer.step()
    x = torch.tensor([[-1.5], [0.0], [1.5]], dtype=torch.float64)
    slow = ddim(Denoiser(schedule, "x0", teacher), x, GRIDS["trailing"](schedule, 5))
    with torch.no_grad():
        fast = consistency(Denoiser(schedule, "x0", student)(x, torch.tensor(39)))
    assert float((slow[2] - slow[0]).item()) > 0.5
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-3)
