"""Each sampler on exact targets: its order, and the distance of its samples to the data (docs/equations.md S5).

Samples are drawn as a user would: from N(0, I), on the trailing grid, to clean data. They are compared
with exact draws by moments and by the sliced Wasserstein distance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.diffusion.samplers.grids import GRIDS
from ldm.diffusion.samplers.registry import SAMPLERS
from ldm.diffusion.schedule import Schedule
from ldm.evaluation.metrics import sliced_wasserstein
from ldm.evaluation.samplers.orders import CASES, MIXTURE, Case, order

ORDER_STEPS = (10, 20, 40, 80, 160)  # the last two give the order
DRAWS = 4096

Progress = Callable[[int, int, dict[str, Any]], None]


def reach(case: Case, schedule: Schedule, target: str, steps: int, draws: int = DRAWS) -> dict[str, float]:
    """Errors of samples of ``MIXTURE``: of mean and covariance, and sliced Wasserstein distance to exact draws."""
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
    """The noise floor: sliced Wasserstein distance between two sets of exact draws."""
    first, second = (MIXTURE.draw(draws, torch.Generator().manual_seed(seed))[0] for seed in (2, 3))
    return sliced_wasserstein(first, second)


def conformance(cases: Sequence[str], steps: Sequence[int], progress: Progress) -> dict[str, Any]:
    """Measure the named ``CASES``; the distances for each number of ``steps``."""
    schedule, target, rows = Schedule.from_config(ScheduleConfig("linear")), "x0", {}
    for done, name in enumerate(cases, 1):
        case = CASES[name]
        fewest = SAMPLERS[case.sampler].fewest
        reached = {str(n): reach(case, schedule, target, n) for n in steps if n >= fewest}
        rows[name] = {**asdict(order(case, schedule, target, ORDER_STEPS)), "reach": reached}
        progress(done, len(cases), {})
    return {"schedule": "linear", "target": target, "draws": DRAWS, "floor": floor(), "samplers": rows}
