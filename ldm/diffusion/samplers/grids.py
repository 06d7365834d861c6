"""Step grids: the t of each step of a sampler, falling, and where it ends (math.md S5, Grids)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.schedule import Schedule

CLEAN = -1.0  # the t of clean data
RHO = 7.0  # of Karras et al. 2022


def trailing(schedule: Schedule, steps: int) -> Float[Tensor, " nodes"]:
    """T−1, …, one node at the end of each of ``steps`` equal parts of 1…T: 999, 949, …, 49 for 20. Then clean data.

    Distinct for every number of steps from 1 to T. Raises ValueError outside.
    """
    n = _checked(schedule, steps)
    return _ended([round(n - i * n / steps) - 1 for i in range(steps)], schedule)


def leading(schedule: Schedule, steps: int, offset: int = 1) -> Float[Tensor, " nodes"]:
    """Stable Diffusion's grid i·(T//S) + offset, falling: 951, …, 1 for 20. The offset shrinks where it would leave 0…T−1."""
    n = _checked(schedule, steps)
    stride = n // steps
    offset = min(offset, n - 1 - (steps - 1) * stride)
    return _ended([i * stride + offset for i in reversed(range(steps))], schedule)


def linspace(schedule: Schedule, steps: int) -> Float[Tensor, " nodes"]:
    """Equally spaced from T−1 to 0, both included: 999, …, 0."""
    n = _checked(schedule, steps)
    return _ended([round((n - 1) * (1 - i / max(steps - 1, 1))) for i in range(steps)], schedule)


def karras(schedule: Schedule, steps: int) -> Float[Tensor, " nodes"]:
    """(σ/α)^(1/ρ) equally spaced over the schedule's own range, ρ = 7 (Karras et al. 2022, eq. 5); t is fractional."""
    n = _checked(schedule, steps)
    noise = torch.exp(-schedule.half_log_snr_table[[n - 1, 0]])  # σ/α at both ends
    high, low = noise.pow(1 / RHO)
    levels = (high + torch.linspace(0, 1, steps, dtype=torch.float64, device=high.device) * (low - high)).pow(RHO)
    return _ended(schedule.time(-torch.log(levels)), schedule)


def uniform_lambda(schedule: Schedule, steps: int) -> Float[Tensor, " nodes"]:
    """λ equally spaced from T−1 to 0 (Lu et al. 2022); t is fractional."""
    n = _checked(schedule, steps)
    high, low = schedule.half_log_snr_table[[n - 1, 0]]
    return _ended(schedule.time(high + torch.linspace(0, 1, steps, dtype=torch.float64, device=high.device) * (low - high)), schedule)


GRIDS: dict[str, Callable[[Schedule, int], Tensor]] = {
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
    "karras": karras,
    "uniform_lambda": uniform_lambda,
}


def check_steps(num_steps: int, steps: int) -> None:
    """Raise ValueError unless 1 ≤ steps ≤ T."""
    if not 1 <= steps <= num_steps:
        raise ValueError(f"steps must lie between 1 and {num_steps}, got {steps}")


def _checked(schedule: Schedule, steps: int) -> int:
    check_steps(schedule.num_steps, steps)
    return schedule.num_steps


def _ended(nodes: list[int] | Tensor, schedule: Schedule) -> Tensor:
    """The nodes and the clean end, float64 beside the schedule's tables."""
    given = torch.as_tensor(nodes, dtype=torch.float64, device=schedule.betas.device)
    return torch.cat([given, given.new_tensor([CLEAN])])
