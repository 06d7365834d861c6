"""What is learned: targets, weights and the training loss (math.md T1, L1, L2)."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float, Int
from torch import Tensor

from ldm.config import ObjectiveConfig
from ldm.diffusion.condition import Condition
from ldm.diffusion.guidance import Model
from ldm.diffusion.schedule import Schedule, like


def target(
    schedule: Schedule, name: str, x0: Float[Tensor, "b *d"], eps: Float[Tensor, "b *d"], t: Int[Tensor, " b"]
) -> Float[Tensor, "b *d"]:
    """What the network is asked for: ε, x_0, or v = a_t ε − s_t x_0 (Salimans & Ho 2022)."""
    if name == "v":
        return like(schedule.alpha(t), x0) * eps - like(schedule.sigma(t), x0) * x0
    return {"eps": eps, "x0": x0}[name]


def simple(snr: Float[Tensor, "*b"], config: ObjectiveConfig) -> Float[Tensor, "*b"]:
    """Weight 1 on the squared error of the target itself (Ho et al. 2020, L_simple)."""
    return snr.new_ones(snr.shape)


def min_snr(snr: Float[Tensor, "*b"], config: ObjectiveConfig) -> Float[Tensor, "*b"]:
    """min(SNR, γ) on the squared error of x_0 (Hang et al. 2023), converted to the target: /SNR for ε, /(SNR + 1) for v."""
    weight = snr.clamp(max=config.min_snr_gamma)
    if config.target == "x0":
        return weight
    if config.target == "v":
        return weight / (snr + 1)
    if bool((snr == 0).any()):
        raise ValueError("min_snr with ε targets is undefined where the SNR is 0: predict v or x0")
    return weight / snr


WEIGHTINGS: dict[str, Callable[[Tensor, ObjectiveConfig], Tensor]] = {"simple": simple, "min_snr": min_snr}


class Objective:
    """The weighted denoising loss of one configuration. Weights for all T steps are tabulated once."""

    def __init__(self, config: ObjectiveConfig, schedule: Schedule) -> None:
        self.config, self.schedule = config, schedule
        self.weights = WEIGHTINGS[config.weighting]((schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)), config).float()

    def loss(
        self, model: Model, x0: Float[Tensor, "b *d"], eps: Float[Tensor, "b *d"], t: Int[Tensor, " b"], cond: Condition
    ) -> Float[Tensor, " b"]:
        """w_t · mean‖target − model(x_t, t, c)‖², for each sample of the batch (mean over its elements)."""
        x_t = self.schedule.add_noise(x0, eps, t)
        error = model(x_t, t, cond) - target(self.schedule, self.config.target, x0, eps, t)
        return self.weights[t] * error.float().square().flatten(1).mean(1)


def uniform_timesteps(uniform: Float[Tensor, " b"], num_steps: int) -> Int[Tensor, " b"]:
    """t uniform on 0 … T−1 from draws in [0, 1)."""
    return (uniform.double() * num_steps).long().clamp(max=num_steps - 1)
