"""The table of targets: every function of it against the definition that the literature prints."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ldm.config import TARGETS, ScheduleConfig
from ldm.config.process import BLIND
from ldm.diffusion import process, targets
from ldm.diffusion.condition import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import moved_score
from ldm.diffusion.objective import target
from ldm.diffusion.schedule import Schedule, like
from ldm.evaluation.samplers.mixture import GaussianMixture

DEFINITIONS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {  # (p, q) of prediction = p ε + q x_0
    "eps": lambda a, s: (torch.ones_like(a), torch.zeros_like(a)),
    "x0": lambda a, s: (torch.zeros_like(a), torch.ones_like(a)),
    "v": lambda a, s: (a, -s),
    "score": lambda a, s: (-1 / s, torch.zeros_like(a)),
    "flow": lambda a, s: (torch.ones_like(a), -torch.ones_like(a)),
}
everywhere = pytest.mark.parametrize("name", targets.TABLE)


def levels(n: int = 200) -> tuple[Tensor, Tensor]:
    """(a, s) with a² + s² = 1, from nearly no noise to nearly no signal, float64 [n, 1]."""
    angle = torch.linspace(1e-3, math.pi / 2 - 1e-3, n, dtype=torch.float64)[:, None]
    return torch.cos(angle), torch.sin(angle)


def samples(n: int = 200) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(n, 3, dtype=torch.float64), torch.randn(n, 3, dtype=torch.float64)


def test_the_rows_are_those_of_the_configuration() -> None:
    assert set(targets.TABLE) == set(DEFINITIONS) == set(TARGETS)
    assert {name for name in TARGETS if targets.blind(name)} == set(BLIND) == {"eps", "score"}


@everywhere
def test_a_row_is_its_definition(name: str) -> None:
    (a, s), (x0, eps) = levels(), samples()
    p, q = DEFINITIONS[name](a, s)
    row = targets.TABLE[name](a, s)
    torch.testing.assert_close(torch.as_tensor(row.p / row.r).expand_as(p).double(), p)
    torch.testing.assert_close(torch.as_tensor(row.q / row.r).expand_as(q).double(), q)
    torch.testing.assert_close(torch.as_tensor(row.det / row.r).expand_as(a).double(), a * p - s * q)
    torch.testing.assert_close(targets.combine(name, x0, eps, a, s), p * eps + q * x0)


@everywhere
def test_conversions_solve_the_linear_system(name: str) -> None:
    """x̂_0 and ε̂ of any pair (x_t, prediction) are the solution of [[a, s], [q, p]] (x_0, ε) = (x_t, prediction)."""
    (a, s), (x_t, prediction) = levels(), samples()
    p, q = DEFINITIONS[name](a, s)
    matrix = torch.stack([torch.cat([a, s], 1), torch.cat([q, p], 1)], 1)
    solution = torch.linalg.solve(matrix, torch.stack([x_t, prediction], 1))
    x0, eps = targets.to_x0(name, prediction, x_t, a, s), targets.to_eps(name, prediction, x_t, a, s)
    torch.testing.assert_close(x0, solution[:, 0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(eps, solution[:, 1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(targets.from_x0(name, x0, x_t, a, s), prediction, rtol=1e-9, atol=1e-9)


@everywhere
def test_changes_of_a_prediction_are_derivatives(name: str) -> None:
    """error_ratio = (dprediction/dx_0)² and per_score = dprediction/dscore, x_t held: both by autograd."""
    a, s = levels()
    x_t = torch.randn(200, 1, dtype=torch.float64)
    x0 = torch.randn(200, 1, dtype=torch.float64).requires_grad_()
    p, q = DEFINITIONS[name](a, s)
    (slope,) = torch.autograd.grad((p * (x_t - a * x0) / s + q * x0).sum(), x0)
    torch.testing.assert_close(targets.error_ratio(name, (a / s).square()), slope.square())
    score = torch.randn(200, 1, dtype=torch.float64).requires_grad_()
    eps = -s * score
    (slope,) = torch.autograd.grad((p * eps + q * (x_t - s * eps) / a).sum(), score)
    torch.testing.assert_close(targets.per_score(name, a, s), slope)


@everywhere
def test_the_functions_of_a_schedule_are_those_of_the_table(name: str) -> None:
    schedule, t = Schedule.named("cosine", 200), torch.arange(200)
    x0, eps = samples()
    a, s = like(schedule.alpha(t), x0), like(schedule.sigma(t), x0)
    p, q = DEFINITIONS[name](a, s)
    x_t, prediction = a * x0 + s * eps, p * eps + q * x0
    torch.testing.assert_close(target(schedule, name, x0, eps, t), prediction)
    torch.testing.assert_close(process.to_x0(schedule, name, prediction, x_t, t), x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(process.to_eps(schedule, name, prediction, x_t, t), eps, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(process.score(schedule, name, prediction, x_t, t), -eps / s, rtol=1e-9, atol=1e-7)
    torch.testing.assert_close(process.from_x0(schedule, name, x0, x_t, t), prediction, rtol=1e-9, atol=1e-9)
    moved = moved_score(schedule, name, prediction, torch.ones_like(x0), t)
    torch.testing.assert_close(process.score(schedule, name, moved, x_t, t), 1 - eps / s, rtol=1e-8, atol=1e-6)


@everywhere
def test_a_perfect_network_says_the_same_in_every_target(name: str) -> None:
    """The exact model of a mixture, read as x̂_0 and as a score, is E[x_0 | x_t] and ∇ log q(x_t)."""
    schedule, t = Schedule.from_config(ScheduleConfig("linear", 50)), torch.tensor([0, 7, 30, 49])
    mixture = GaussianMixture.of(torch.tensor([0.3, 0.7]), torch.randn(2, 3), torch.tensor([0.1, 0.5]))
    x_t = torch.randn(4, 3, dtype=torch.float64)
    pred = mixture.denoiser(schedule, name)(x_t, t)
    a, s = schedule.alpha(t), schedule.sigma(t)
    torch.testing.assert_close(pred.x0, mixture.denoised(x_t, a, s), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(pred.score, mixture.score(x_t, a, s), rtol=1e-7, atol=1e-7)
    assert torch.equal(pred.raw, mixture.model(schedule, name)(x_t, t, Condition()))


def test_flow_is_the_velocity_of_a_straight_path() -> None:
    """dx/dτ on its own process, α = 1 − τ and σ = τ (Liu et al. 2023): constant, so any step is exact."""
    tau = torch.linspace(0.01, 0.99, 200, dtype=torch.float64)[:, None].requires_grad_()
    x0, eps = samples()
    x_t = (1 - tau) * x0 + tau * eps
    slopes = [torch.autograd.grad(x_t[:, i].sum(), tau, retain_graph=True)[0] for i in range(3)]
    x_t, a, s = x_t.detach(), 1 - tau.detach(), tau.detach()
    velocity = targets.combine("flow", x0, eps, a, s)
    torch.testing.assert_close(velocity, torch.cat(slopes, 1))
    torch.testing.assert_close(targets.to_x0("flow", velocity, x_t, a, s), x0)
    torch.testing.assert_close(targets.to_eps("flow", velocity, x_t, a, s), eps)
    torch.testing.assert_close(x_t - s * velocity, x0)


def test_coefficients_of_zero_and_one_cost_nothing() -> None:
    """No copy is made of what is asked for in its own words."""
    (a, s), (x, pred) = levels(), samples()
    assert targets.to_x0("x0", pred, x, a, s) is pred and targets.to_eps("eps", pred, x, a, s) is pred
    assert targets.from_x0("x0", pred, x, a, s) is pred
    assert targets.combine("eps", x, pred, a, s) is pred and targets.combine("x0", pred, x, a, s) is pred


def test_a_denoiser_names_the_targets() -> None:
    with pytest.raises(ValueError, match="target must be one of eps, x0, v, score, flow, got 'noise'"):
        Denoiser(Schedule.named("cosine", 10), "noise", lambda x, t: x)
