"""The signature of a sampler, and the noise levels at the nodes of its grid.

A sampler is a function ``sampler(denoiser, x, grid, noise=no_noise, *, callback=None, …)``. The
grid is the t of each step, falling, followed by the t at which the sample ends (−1: clean data);
``grids`` makes them, and any falling t in float64 will do. ``noise(i)`` is the i-th fresh standard
normal array: a function, so that an image's draws do not depend on the batch around it. A sampler
works in the dtype of ``x``, with coefficients computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.schedule import Schedule

Noise = Callable[[int], Tensor]
# callback(step, sample after the step, x̂_0 that the step used): returns None, or a replacement for the sample
Callback = Callable[[int, Tensor, Tensor], Tensor | None]


def no_noise(step: int) -> Tensor:
    """The ``noise`` of a deterministic sampler: raises ValueError when it is called."""
    raise ValueError(
        "this sampler draws noise at its steps: pass noise=…, a function of the step, or call ldm.sample, which does"
    )


@dataclass(frozen=True)
class Nodes:
    """t, α, σ and λ = log(α/σ) at the nodes of a grid, each float64 [nodes], S + 1 of them.

    λ is infinite at clean data only: where no signal is left, ᾱ is taken to be
    ``Schedule.least_signal``.
    """

    t: Float[Tensor, " nodes"]
    alpha: Float[Tensor, " nodes"]
    sigma: Float[Tensor, " nodes"]
    lam: Float[Tensor, " nodes"]

    @classmethod
    def of(cls, schedule: Schedule, grid: Float[Tensor, " nodes"], x: Tensor) -> Nodes:
        """The nodes of ``grid``, on the device of ``x``.

        Raises ValueError unless t falls from at most T−1 to at least −1.
        """
        grid = grid.to(x.device, torch.float64)
        if len(grid) < 2 or not bool((grid.diff() < 0).all()) or grid[0] > schedule.num_steps - 1 or grid[-1] < -1:
            raise ValueError(
                f"a grid must fall from at most {schedule.num_steps - 1} to at least −1, got {grid.tolist()}"
            )
        alpha, sigma = schedule.alpha(grid), schedule.sigma(grid)
        nothing = alpha == 0
        sigma = torch.where(nothing, math.sqrt(1 - schedule.least_signal), sigma)
        alpha = torch.where(nothing, math.sqrt(schedule.least_signal), alpha)
        return cls(grid, alpha, sigma, torch.log(alpha) - torch.log(sigma))

    @property
    def steps(self) -> int:
        """S."""
        return len(self.t) - 1

    @property
    def level(self) -> Float[Tensor, " nodes"]:
        """σ/α, the noise level of x/α; 0 at clean data."""
        return self.sigma / self.alpha

    def order(self, step: int, highest: int, lowered: bool) -> int:
        """The order of a multistep solver in λ at ``step``: at most ``step + 1``.

        ``lowered``: at most the number of steps that are left. A step into clean data, where λ is
        infinite, is of first order.
        """
        if self.sigma[step + 1] == 0:
            return 1
        return min(highest, step + 1, self.steps - step if lowered else highest)


def check_start(nodes: Nodes, start: Sequence[Tensor]) -> None:
    """Raise ValueError if there are more exact samples than nodes after the first."""
    if len(start) > nodes.steps:
        raise ValueError(
            f"start must hold at most {nodes.steps} samples, one for each node after the first, got {len(start)}"
        )


def after_step(callback: Callback | None, step: int, x: Tensor, x0: Tensor) -> Tensor:
    """Call the callback; its return value, if any, replaces the sample."""
    given = callback(step, x, x0) if callback else None
    return x if given is None else given
