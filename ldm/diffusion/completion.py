"""Completion of a partly known sample by a model that was not trained for it (docs/equations.md C5).

The known part of x_t is a draw of q(x_t | x_0), the rest is the sampler's. ``blended`` replaces the
known part after each step of any sampler, with one noise for all steps (Avrahami et al. 2022, and
what diffusers does with such a model). ``repaint`` draws a fresh noise for each step, and goes back
to an earlier noise level again and again, so that both parts come to agree (Lugmayr et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.process import transition
from ldm.diffusion.samplers.nodes import Callback, after_step
from ldm.diffusion.schedule import Schedule, like

Step = Callable[..., Tensor]  # sampler(denoiser, x, grid, noise, *, callback) of first order
Named = Callable[[str], Tensor]  # a standard normal array by its name


@dataclass(frozen=True)
class Known:
    """The part of a sample that is given.

    Attributes:
        x0: the clean sample, as diffused.
        mask: 1 where it is to be drawn, 0 where it is known.
    """

    x0: Float[Tensor, "b c h w"]
    mask: Float[Tensor, "b 1 h w"]

    def keep(self, schedule: Schedule, x: Float[Tensor, "b c h w"], t: Tensor, eps: Tensor) -> Float[Tensor, "b c h w"]:
        """``x`` at t with its known part replaced by a_t x_0 + s_t ε; at t = −1 by x_0."""
        return torch.lerp(schedule.add_noise(self.x0, eps, t.expand(len(x))), x, self.mask)


def blended(
    known: Known, schedule: Schedule, grid: Float[Tensor, " nodes"], eps: Tensor, callback: Callback | None = None
) -> Callback:
    """A sampler's callback that keeps the known part after each step, and calls ``callback`` before."""
    grid = grid.to(eps.device)

    def after(step: int, x: Tensor, x0: Tensor) -> Tensor:
        return known.keep(schedule, after_step(callback, step, x, x0), grid[step + 1], eps)

    return after


def repaint_path(steps: int, jump: int, repeats: int) -> list[int]:
    """Nodes of a grid in the order in which they are visited, from 0 to ``steps``.

    Each part of ``jump`` steps, counted from the last node but one, is gone through ``repeats``
    times. The first part, which may be shorter, once.
    """
    again = dict.fromkeys(range(steps - 1, jump - 1, -jump), repeats - 1)
    nodes = [0]
    while (here := nodes[-1]) < steps:
        if again.get(here, 0):
            again[here] -= 1
            nodes += range(here - 1, here - jump - 1, -1)
        nodes.append(nodes[-1] + 1)
    return nodes


def repaint(
    sampler: Step,
    denoiser: Denoiser,
    known: Known,
    x: Float[Tensor, "b c h w"],
    grid: Float[Tensor, " nodes"],
    noise: Named,
    *,
    jump: int = 5,
    repeats: int = 5,
    callback: Callback | None = None,
    **options: object,
) -> Float[Tensor, "b c h w"]:
    """Complete a sample by RePaint (Lugmayr et al. 2022, Algorithm 1).

    ``sampler`` makes each step on a grid of two nodes, and so in its first order. ``noise``: the
    draw of each name, such as "step 3", "known 3" and "back 4", numbered along the path.
    """
    schedule, path = denoiser.schedule, repaint_path(len(grid) - 1, jump, repeats)
    down = 0  # steps made, without those back
    for visit, (here, there) in enumerate(pairwise(path)):
        if there < here:
            ratio, variance = transition(schedule, grid[here], grid[there])
            x = like(ratio, x) * x + like(variance.sqrt(), x) * noise(f"back {visit}")
            continue
        step = down

        def after(_: int, x: Tensor, x0: Tensor, step: int = step) -> Tensor:
            return after_step(callback, step, x, x0)

        x = sampler(
            denoiser, x, grid[[here, there]], lambda _, visit=visit: noise(f"step {visit}"), callback=after, **options
        )
        eps = noise(f"known {visit}") if grid[there] >= 0 else torch.zeros_like(x)
        x = known.keep(schedule, x, grid[there], eps)
        down += 1
    return x
