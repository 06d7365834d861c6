"""Orders of convergence of the samplers on exact targets (docs/equations.md S5).

Orders are measured between two finite ends, uniform in λ, without lowering the order of the last step
and, where a solver accepts them, with exact starting values. A deterministic sampler is compared with
the exact probability flow on a mixture, sample by sample. A stochastic one is compared in distribution
on Gaussian data: there it is affine in x_T and in each draw of noise, so that its mean and variance
follow from one run without Monte Carlo.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.diffusion.condition import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.samplers.registry import SAMPLERS
from ldm.diffusion.schedule import Schedule
from ldm.evaluation.metrics import root_mean_square
from ldm.evaluation.samplers.mixture import GaussianMixture

ENDS = (-1.5, 1.0)  # λ at the two ends
SUBSTEPS = 4  # of the exact flow, per step of the finest grid
# options that must shrink as steps double, or a sampler would not converge: the Langevin step (samplers/langevin.py)
REFINED: dict[str, Callable[[int], dict[str, Any]]] = {
    "predictor_corrector": lambda steps: {"snr": 0.16 * (10 / steps) ** 0.5},
    "annealed_langevin": lambda steps: {"snr": 0.3 * (10 / steps) ** 0.25},
}


def _float64(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


GAUSSIAN = GaussianMixture.of(_float64([1.0]), _float64([[0.5]]), _float64([0.3**2]))
MIXTURE = GaussianMixture.of(
    _float64([0.2, 0.5, 0.3]),
    _float64([[-1.2, 0.6], [0.8, 0.9], [0.3, -1.1]]),
    _float64([[[0.15, 0.1], [0.1, 0.15]], [[0.1, 0.0], [0.0, 0.2]], [[0.12, -0.08], [-0.08, 0.1]]]),
)


@dataclass(frozen=True)
class Case:
    """A sampler with options, and the order it should have."""

    sampler: str
    stated: float
    options: Mapping[str, Any] = field(default_factory=dict)

    def run(
        self, schedule: Schedule, target: str, mixture: GaussianMixture, x: Tensor, grid: Tensor,
        noise: Callable[[int], Tensor], path: Sequence[Tensor] = (), **options: Any,
    ) -> tuple[Tensor, int]:  # fmt: skip
        """Sample with the exact denoiser; returns the samples and the number of network calls.

        On a finite grid the last step keeps its order, and an order of 3 or more starts with values of
        the exact ``path``, if the sampler has these options.
        """
        calls, exact = 0, mixture.model(schedule, target)

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return exact(x_t, t, Condition())

        function = SAMPLERS[self.sampler].function
        takes, options = inspect.signature(function).parameters, {**self.options, **options}
        if grid[-1] >= 0 and "lower_final" in takes:
            options["lower_final"] = False
        if path and "start" in takes and self.stated >= 3:
            options["start"] = path[1 : math.ceil(self.stated)]
        return function(Denoiser(schedule, target, predict), x, grid, noise, **options), calls


# every sampler of a denoiser with its defaults, and variants whose options change the order
CASES = {name: Case(name, sampler.order) for name, sampler in SAMPLERS.items() if not sampler.consistency}
VARIANTS = {
    "ddim, eta 1": Case("ddim", 1, {"eta": 1.0}),
    "unipc, order 3": Case("unipc", 4, {"order": 3}),
    "unipc, order 2, no corrector": Case("unipc", 2, {"corrector": False}),
    "unipc, order 3, no corrector": Case("unipc", 3, {"order": 3, "corrector": False}),
}
CASES |= {name: case for name, case in VARIANTS.items() if case.sampler in SAMPLERS}


@dataclass(frozen=True)
class Order:
    """An order of convergence: error ∝ steps^(−order); higher is better.

    Attributes:
        measured: log₂ of the ratio of errors over the last doubling of steps.
        sense: "path": root mean square error of the end points; "weak": error of mean and variance, over the variance.
        errors: (steps, network calls, error).
    """

    stated: float
    measured: float
    sense: str
    errors: list[tuple[int, int, float]]


def order(case: Case, schedule: Schedule, target: str, steps: Sequence[int]) -> Order:
    """Measure the order of one sampler; each number of steps divides the last, which doubles the one before it."""
    weak = draws_noise(case)
    if weak:
        errors = [weak_error(case, schedule, target, n) for n in steps]
    else:
        errors = path_errors(case, schedule, target, steps)
    measured = math.log2(errors[-2][2] / errors[-1][2])
    return Order(case.stated, measured, "weak" if weak else "path", errors)


def uniform(schedule: Schedule, steps: int, ends: tuple[float, float] = ENDS) -> Float[Tensor, " nodes"]:
    """Grid of fractional t, uniform in λ between two ends. Raises ValueError if the schedule lacks such λ."""
    low, high = schedule.half_log_snr_table[-1], schedule.half_log_snr_table[0]
    if not low <= ends[0] < ends[1] <= high:
        raise ValueError(f"λ from {ends[0]} to {ends[1]} is outside that of the schedule, {low:.2f} to {high:.2f}")
    return schedule.time(torch.linspace(*ends, steps + 1, dtype=torch.float64))


def flow(
    mixture: GaussianMixture, x: Float[Tensor, "b d"], lam: Float[Tensor, " nodes"], substeps: int = SUBSTEPS
) -> list[Tensor]:
    """Exact path of x at every node, d(x/α)/dλ = −(σ/α) ε, by the Runge–Kutta method of order 4."""

    def slope(lam: Tensor, y: Tensor) -> Tensor:
        alpha, sigma = torch.sigmoid(2 * lam).sqrt(), torch.sigmoid(-2 * lam).sqrt()
        return sigma**2 / alpha * mixture.score(alpha * y, alpha, sigma)

    y, nodes = x / torch.sigmoid(2 * lam[0]).sqrt(), [x]
    for left, right in pairwise(lam):
        h = (right - left) / substeps
        for i in range(substeps):
            at = left + i * h
            k1 = slope(at, y)
            k2 = slope(at + h / 2, y + h / 2 * k1)
            k3 = slope(at + h / 2, y + h / 2 * k2)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(at + h, y + h * k3))
        nodes.append(torch.sigmoid(2 * right).sqrt() * y)
    return nodes


def path_errors(case: Case, schedule: Schedule, target: str, steps: Sequence[int]) -> list[tuple[int, int, float]]:
    """Steps, network calls and root mean square error of the end points of a deterministic sampler."""
    exact, errors = _exact_path(steps[-1]), []
    for n in steps:
        nodes = exact[:: steps[-1] // n]
        out, calls = case.run(schedule, target, MIXTURE, nodes[0], uniform(schedule, n), _no_noise, nodes)
        errors.append((n, calls, root_mean_square(out, nodes[-1])))
    return errors


def _no_noise(i: int) -> Tensor:
    raise ValueError(f"a sampler taken for deterministic asks for draw {i}: it must be measured in distribution")


@functools.cache
def _exact_path(steps: int) -> list[Tensor]:
    """The flow of 32 draws from the first end to the second, at every node."""
    alpha, sigma = (math.sqrt(1 / (1 + math.exp(sign * 2 * ENDS[0]))) for sign in (-1, 1))
    x, _ = MIXTURE.draw(32, torch.Generator().manual_seed(0), alpha, sigma)
    return flow(MIXTURE, x, torch.linspace(*ENDS, steps + 1, dtype=torch.float64))


def weak_error(case: Case, schedule: Schedule, target: str, steps: int) -> tuple[int, int, float]:
    """Steps, network calls, and the larger error of mean and variance on Gaussian data, over the variance."""
    grid = uniform(schedule, steps)
    alpha, sigma = schedule.alpha(grid), schedule.sigma(grid)
    mean, variance = alpha * GAUSSIAN.means[0, 0], alpha**2 * GAUSSIAN.variances[0, 0] + sigma**2  # along the grid
    options = REFINED[case.sampler](steps) if case.sampler in REFINED else {}
    begin, exact_mean, exact_variance = (float(mean[0]), float(variance[0])), float(mean[-1]), float(variance[-1])
    found, calls = gaussian_moments(case, schedule, target, grid, begin, **options)
    return steps, calls, max(abs(found[0] - exact_mean), abs(found[1] - exact_variance)) / exact_variance


def gaussian_moments(
    case: Case,
    schedule: Schedule,
    target: str,
    grid: Float[Tensor, " nodes"],
    begin: tuple[float, float] = (0.0, 1.0),
    **options: Any,
) -> tuple[tuple[float, float], int]:
    """Exact mean and variance of the samples that start from N(begin) at grid[0], and the network calls.

    On ``GAUSSIAN`` the sampler is affine: row 0 starts at 0 and row 1 at 1, both without noise; row 2 + i
    starts at 0 with 1 as its i-th draw of noise.
    """
    asked: dict[int, int] = {}
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)

    def count(i: int) -> Tensor:
        asked.setdefault(i, 2 + len(asked))
        return torch.zeros_like(x)

    out, calls = case.run(schedule, target, GAUSSIAN, x, grid, count, **options)
    if asked:
        rows = torch.cat([x, x.new_zeros(len(asked), 1)])

        def noise(i: int) -> Tensor:
            z = torch.zeros_like(rows)
            z[asked[i]] = 1
            return z

        out, calls = case.run(schedule, target, GAUSSIAN, rows, grid, noise, **options)
    zero, gain = float(out[0]), (out[1:, 0] - out[0]).square()
    mean, variance = begin
    return (zero + float(out[1] - out[0]) * mean, float(gain[0] * variance + gain[1:].sum())), calls


def draws_noise(case: Case) -> bool:
    """True if a sampler draws noise at its steps."""
    drawn: list[int] = []
    schedule, x = Schedule.from_config(ScheduleConfig("linear")), torch.zeros(1, 2, dtype=torch.float64)

    def noise(i: int) -> Tensor:
        drawn.append(i)
        return torch.zeros_like(x)

    case.run(schedule, "v", MIXTURE, x, uniform(schedule, 4), noise)
    return bool(drawn)
