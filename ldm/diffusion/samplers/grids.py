"""Step grids: the t of each step of a sampler, falling, and the t at which it ends.

docs/equations.md S5.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.schedule import Schedule

CLEAN = -1.0  # the t of clean data
RHO = 7.0  # of Karras et al. 2022
LCM_NODES = 50  # of the grid that `lcm` takes its nodes from
OFFSET = ("leading", "leading_positive")  # grids that take an offset


def trailing(schedule: Schedule, steps: int) -> Float[Tensor, " nodes"]:
    """One node at the end of each of S equal parts of 1…T, then clean data: 999, 949, …, 49 for 20.

    All nodes differ for every number of steps S from 1 to T. Raises ValueError outside.
    """
    n = _checked(schedule, steps)
    return _ended([round(n - i * n / steps) - 1 for i in range(steps)], schedule)


def leading(schedule: Schedule, steps: int, offset: int = 1) -> Float[Tensor, " nodes"]:
    """Stable Diffusion's grid i·(T//S) + offset, falling: 951, …, 1 for 20.

    The offset shrinks where it would leave 0…T−1.
    """
    n = _checked(schedule, steps)
    return _offset([i * (n // steps) for i in range(steps)], offset, schedule)


def linspace(schedule: Schedule, steps: int) -> Float[Tensor, " nodes"]:
    """Equally spaced from T−1 to 0, both included, to the nearest whole t: 999, …, 0."""
    return linspace_fractional(schedule, steps).round()


def linspace_fractional(schedule: Schedule, steps: int) -> Float[Tensor, " nodes"]:
    """Equally spaced from T−1 to 0, both included; t is fractional."""
    n = _checked(schedule, steps)
    return _ended([(n - 1) * (1 - i / max(steps - 1, 1)) for i in range(steps)], schedule)


def linspace_positive(schedule: Schedule, steps: int) -> Float[Tensor, " nodes"]:
    """S + 1 equally spaced whole t from T−1 to 0, without the 0: 999, …, 50 for 20.

    T steps are all t.
    """
    n = _checked(schedule, steps)
    if steps == n:
        return linspace(schedule, n)
    return _ended([round((n - 1) * (1 - i / steps)) for i in range(steps)], schedule)


def leading_positive(schedule: Schedule, steps: int, offset: int = 1) -> Float[Tensor, " nodes"]:
    """Stable Diffusion's grid of S + 1 nodes without the last: 941, …, 48 for 20.

    Its nodes are i·(T//(S+1)) + offset. T steps are all t.
    """
    n = _checked(schedule, steps)
    if steps == n:
        return linspace(schedule, n)
    return _offset([i * (n // (steps + 1)) for i in range(1, steps + 1)], offset, schedule)


def karras(schedule: Schedule, steps: int) -> Float[Tensor, " nodes"]:
    """(σ/α)^(1/ρ) equally spaced over the schedule's own range, ρ = 7 (Karras et al. 2022, eq. 5).

    The t are fractional.
    """
    n = _checked(schedule, steps)
    noise = torch.exp(-schedule.half_log_snr_table[[n - 1, 0]])  # σ/α at both ends
    high, low = noise.pow(1 / RHO)
    levels = (high + torch.linspace(0, 1, steps, dtype=torch.float64, device=high.device) * (low - high)).pow(RHO)
    return _ended(schedule.time(-torch.log(levels)), schedule)


def uniform_lambda(schedule: Schedule, steps: int) -> Float[Tensor, " nodes"]:
    """λ equally spaced from T−1 to 0 (Lu et al. 2022); t is fractional."""
    n = _checked(schedule, steps)
    noisy, clean = schedule.half_log_snr_table[[n - 1, 0]]
    part = torch.linspace(0, 1, steps, dtype=torch.float64, device=noisy.device)
    return _ended(schedule.time(noisy + part * (clean - noisy)), schedule)


def lcm(schedule: Schedule, steps: int) -> Float[Tensor, " nodes"]:
    """S of the 50 nodes of a trailing grid, evenly spaced: 999, 759, 499, 259 for 4.

    The grid of latent consistency models, and of diffusers' LCMScheduler where 50 divides T. More
    than 50 steps are of all T.
    """
    n = _checked(schedule, steps)
    nodes = min(LCM_NODES, n) if steps <= LCM_NODES else n
    return _ended(trailing(schedule, nodes)[[i * nodes // steps for i in range(steps)]], schedule)


GRIDS: dict[str, Callable[..., Tensor]] = {
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
    "linspace_fractional": linspace_fractional,
    "linspace_positive": linspace_positive,
    "leading_positive": leading_positive,
    "karras": karras,
    "uniform_lambda": uniform_lambda,
    "lcm": lcm,
}


def make_grid(
    name: str, schedule: Schedule, steps: int, offset: int = 1, end_clean: bool = True
) -> Float[Tensor, " nodes"]:
    """The grid of that name.

    ``offset``: used by the grids of ``OFFSET``. ``end_clean`` false: the grid ends at t = 0, not at
    clean data. Raises ValueError if the steps are out of range, or if the grid's last node is t = 0
    already.
    """
    grid = GRIDS[name](schedule, steps, **({"offset": offset} if name in OFFSET else {}))
    if not end_clean:
        if grid[-2] <= 0:
            raise ValueError(
                f"the last node of the {name} grid is t = 0 already: with end_clean false it has nowhere to go"
            )
        grid[-1] = 0
    return grid


def check_steps(num_steps: int, steps: int) -> None:
    """Raise ValueError unless 1 ≤ steps ≤ T."""
    if not 1 <= steps <= num_steps:
        raise ValueError(f"steps must lie between 1 and {num_steps}, got {steps}")


def _checked(schedule: Schedule, steps: int) -> int:
    check_steps(schedule.num_steps, steps)
    return schedule.num_steps


def _offset(nodes: list[int], offset: int, schedule: Schedule) -> Tensor:
    """The rising nodes, moved up by ``offset`` as far as 0…T−1 has room, in falling order."""
    return _ended([node + min(offset, schedule.num_steps - 1 - nodes[-1]) for node in reversed(nodes)], schedule)


def _ended(nodes: list[int] | list[float] | Tensor, schedule: Schedule) -> Tensor:
    """The nodes and the clean end, float64, on the schedule's device."""
    given = torch.as_tensor(nodes, dtype=torch.float64, device=schedule.betas.device)
    return torch.cat([given, given.new_tensor([CLEAN])])
