"""All samplers by name, with their properties."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ldm.diffusion.samplers.ancestral import ddim, ddpm
from ldm.diffusion.samplers.consistency import lcm
from ldm.diffusion.samplers.dpm_solver import dpmpp_2m, dpmpp_2m_sde, dpmpp_2s, dpmpp_3m, dpmpp_3m_published, dpmpp_sde
from ldm.diffusion.samplers.edm import dpm2, euler, euler_ancestral, heun, lms
from ldm.diffusion.samplers.langevin import PER_LEVEL, annealed_langevin, predictor_corrector
from ldm.diffusion.samplers.pndm import FEWEST, plms
from ldm.diffusion.samplers.unipc import unipc


@dataclass(frozen=True)
class Sampler:
    """A sampler and its properties.

    Attributes:
        function: sampler(denoiser, x, grid, noise, *, callback, and the ``options``).
        order: order of convergence as steps double (docs/equations.md S5), with exact starting
            values from order 3 on; in the weak sense for stochastic samplers.
        stochastic: draws noise at its steps with the default settings (ddim: if eta is above 0).
        options: names of the settings of SampleConfig that it reads.
        calls: number of network calls for a number of steps, on a grid that ends at clean data.
        fewest: smallest number of steps.
        looks_ahead: averages in the slope at the end of a step, which suffers from a first step
            that is long in σ/α.
        consistency: reads the network as a consistency function, and is right for a network that
            was distilled into one alone: its error does not depend on the steps, and ``order`` is
            infinite.
    """

    function: Callable[..., Tensor]
    order: float
    stochastic: bool = False
    options: tuple[str, ...] = ()
    calls: Callable[[int], int] = lambda steps: steps
    fewest: int = 1
    looks_ahead: bool = False
    consistency: bool = False


def _two_but_the_last(steps: int) -> int:
    return 2 * steps - 1


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(ddpm, 1, True, ("variance",)),
    "ddim": Sampler(ddim, 1, options=("eta",)),
    "dpmpp_2m": Sampler(dpmpp_2m, 2),
    "dpmpp_3m": Sampler(dpmpp_3m, 3),
    "dpmpp_3m_published": Sampler(dpmpp_3m_published, 2),
    "dpmpp_2s": Sampler(dpmpp_2s, 2),
    "dpmpp_sde": Sampler(dpmpp_sde, 1, True),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde, 2, True),
    "unipc": Sampler(unipc, 3),
    "euler": Sampler(euler, 1),
    "euler_ancestral": Sampler(euler_ancestral, 1, True),
    "heun": Sampler(heun, 2, calls=_two_but_the_last, looks_ahead=True),
    "dpm2": Sampler(dpm2, 2, calls=_two_but_the_last),
    "lms": Sampler(lms, 4),
    "plms": Sampler(plms, 2, calls=lambda steps: steps + 1, fewest=FEWEST, looks_ahead=True),
    "annealed_langevin": Sampler(annealed_langevin, 0.5, True, calls=lambda steps: PER_LEVEL * (steps - 1) + 1),
    "predictor_corrector": Sampler(predictor_corrector, 1, True, ("eta",), calls=_two_but_the_last),
    "lcm": Sampler(lcm, math.inf, True, consistency=True),
}
