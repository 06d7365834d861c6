"""All samplers by name, with what a caller must know of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ldm.diffusion.samplers.ancestral import ddim, ddpm
from ldm.diffusion.samplers.dpm_solver import dpmpp_2m
from ldm.diffusion.samplers.langevin import annealed_langevin, predictor_corrector


@dataclass(frozen=True)
class Sampler:
    """A sampler and its properties.

    Attributes:
        function: sampler(denoiser, x, grid, noise, *, callback, and the ``options``).
        order: of convergence as steps double (math.md S5); weak for stochastic ones. None: not stated.
        options: settings of SampleConfig that it reads, by name.
        calls: network calls for a number of steps.
        fewest: the smallest number of steps.
    """

    function: Callable[..., Tensor]
    order: float | None
    options: tuple[str, ...] = ()
    calls: Callable[[int], int] = lambda steps: steps
    fewest: int = 1


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(ddpm, 1, ("variance",)),
    "ddim": Sampler(ddim, 1, ("eta",)),
    "dpmpp_2m": Sampler(dpmpp_2m, 2),
    "annealed_langevin": Sampler(annealed_langevin, 0.5, calls=lambda steps: 5 * (steps - 1) + 1),
    "predictor_corrector": Sampler(predictor_corrector, 1, ("eta",), calls=lambda steps: 2 * steps - 1),
}
