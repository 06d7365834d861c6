"""Every figure of every sampler on exact targets: its order, and how close it comes to the data (docs/equations.md S5).

Reaching the data is measured as a user samples: from N(0, I), on the trailing grid, to clean data; by moments and by the
sliced Wasserstein distance to exact draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.diffusion.samplers.grids import GRIDS
from ldm.diffusion.samplers.registry import SAMPLERS
from ldm.diffusion.schedule import Schedule
from ldm.evaluation.samplers.orders import CASES, MIXTURE, Case, order

ORDER_STEPS = (10, 20, 40, 80, 160)  # the last two give the order
DRAWS = 4096
DIRECTIONS = 64

Progress = Callable[[int, int, dict[str, Any]], None]


def reach(case: Case, schedule: Schedule, target: str, steps: int, draws: int = DRAWS) -> dict[str, float]:
    """Quality of samples of ``MIXTURE`` drawn from N(0, I): errors of mean and covariance, sliced Wasserstein distance to exact draws."""
    generator = torch.Generator().manual_seed(1)

    def noise(_: int) -> Tensor:
        return torch.randn(draws, 2, dtype=torch.float64, generator=generator)

    out, calls = case.run(schedule, target, MIXTURE, noise(-1), GRIDS["trailing"](schedule, steps), noise)
    mean, covariance = MIXTURE.moments()
    exact, _ = MIXTURE.draw(draws, torch.Generator().manual_seed(2))
    return {
        "calls": calls,
        "mean": float((out.mean(0) - mean).norm()),
        "covariance": float((torch.cov(out.T) - covariance).norm() / covariance.norm()),
        "sliced_wasserstein": sliced_wasserstein(out, exact),
    }


def floor(draws: int = DRAWS) -> float:
    """The sliced Wasserstein distance between two sets of exact draws: what no sampler can beat but by luck."""
    first, second = (MIXTURE.draw(draws, torch.Generator().manual_seed(seed))[0] for seed in (2, 3))
    return sliced_wasserstein(first, second)


def sliced_wasserstein(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"], directions: int = DIRECTIONS) -> float:
    """The mean over random directions of the 1-Wasserstein distance between the projections of two sets of equal size."""
    ways = torch.randn(a.shape[1], directions, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ways = ways / ways.norm(dim=0)
    first, second = ((x.double() @ ways).sort(0).values for x in (a, b))
    return float((first - second).abs().mean())


def conformance(cases: Sequence[str], steps: Sequence[int], progress: Progress) -> dict[str, Any]:
    """Every figure of every case of ``CASES`` named."""
    schedule, target, rows = Schedule.from_config(ScheduleConfig("linear")), "x0", {}
    for done, name in enumerate(cases, 1):
        case = CASES[name]
        fewest = SAMPLERS[case.sampler].fewest
        reached = {str(n): reach(case, schedule, target, n) for n in steps if n >= fewest}
        rows[name] = {**asdict(order(case, schedule, target, ORDER_STEPS)), "reach": reached}
        progress(done, len(cases), {})
    return {"schedule": "linear", "target": target, "draws": DRAWS, "floor": floor(), "samplers": rows}
