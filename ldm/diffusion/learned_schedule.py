"""A learned monotone schedule (docs/equations.md F5).

Kingma et al. 2021, "Variational Diffusion Models", section 4 and appendix I. γ(t) = −2λ(t) =
log((1 − ᾱ)/ᾱ). Its two ends minimise the variational bound. Its interior minimises the variance of
the bound's estimator at one uniformly drawn t: in the limit of many steps the bound itself does not
depend on the interior. The network is trained by its own objective, which the schedule never
minimises.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ldm.config import GIVEN, ScheduleConfig
from ldm.diffusion import gaussian
from ldm.diffusion.condition import Condition
from ldm.diffusion.guidance import Model
from ldm.diffusion.schedule import Schedule, like
from ldm.diffusion.targets import to_eps

KNOTS = 32  # parts of equal length on the time axis, each with a slope of its own
FLOOR = 1e-3  # share of the way that is spread evenly over the parts, so that none can shrink to nothing
RANGES = ((-20.0, -1.0), (1.0, 20.0))  # where γ of the first and of the last step may move; float32 images need no more


class LearnedSchedule(nn.Module):
    """γ(t) = γ_min + (γ_max − γ_min) h(t): learned ends, and a learned h that rises from 0 to 1.

    h is linear between knots. Its increments are a softmax with a floor, so that γ rises with t
    whatever the parameters are. Straight parts of several steps keep γ from rising steeply within a
    single step, which a random t would meet once in T draws.

    Args:
        config: num_steps, start and ends are read. The parameters are departures, all 0 at first,
            from these ends and, for ``cosine``, from the cosine schedule cut to the current ends
            (Nichol & Dhariwal 2021: at the knots γ = 2 log tan θ, θ linear in t); for ``linear``,
            from a straight line in γ.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        super().__init__()
        self.num_steps, self.start = config.num_steps, config.start
        self.ends = nn.Parameter(torch.zeros(2))
        self.increments = nn.Parameter(torch.zeros(min(KNOTS, config.num_steps - 1)))
        lowest, highest = torch.tensor(RANGES, dtype=torch.float64).unbind(1)
        self.lowest: Tensor
        self.width: Tensor
        self.first_ends: Tensor
        self.register_buffer("lowest", lowest, persistent=False)
        self.register_buffer("width", highest - lowest, persistent=False)
        self.register_buffer(
            "first_ends", torch.logit((torch.tensor(config.ends, dtype=torch.float64) - lowest) / self.width)
        )

    def forward(self) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"]]:
        """γ(0 … T−1) twice, float64: differentiable in the ends alone, and in the interior."""
        ends = self.lowest + self.width * torch.sigmoid(self.first_ends + self.ends.double())
        increments = self.increments.double()
        return self._gamma(ends, increments.detach()), self._gamma(ends.detach(), increments)

    def _gamma(self, ends: Float[Tensor, "2"], increments: Float[Tensor, " parts"]) -> Float[Tensor, " T"]:
        parts = len(increments)
        start = _cosine_rise(ends, parts) if self.start == "cosine" else increments.new_full((parts,), 1 / parts)
        rise = (1 - FLOOR) * torch.softmax(torch.log(start - FLOOR / parts) + increments, 0) + FLOOR / parts
        knots = F.pad(torch.cumsum(rise, 0), (1, 0))
        place = torch.arange(self.num_steps, dtype=torch.float64, device=rise.device) * parts / (self.num_steps - 1)
        part = place.long().clamp(max=parts - 1)
        return ends[0] + (ends[1] - ends[0]) * (knots[part] + (place - part) * rise[part])

    @torch.no_grad()
    def schedule(self) -> Schedule:
        """The current table as a plain schedule, for training the network and for samplers."""
        log_bar = F.logsigmoid(-self()[0])
        return Schedule(-torch.expm1(torch.diff(log_bar, prepend=log_bar.new_zeros(1))), check=False)

    def given(self) -> ScheduleConfig:
        """The current table as a configuration that lists its β."""
        return ScheduleConfig(GIVEN, self.num_steps, betas=tuple(self.schedule().betas.tolist()))


def _cosine_rise(ends: Float[Tensor, "2"], parts: int) -> Float[Tensor, " parts"]:
    """Shares of the cosine schedule's rise from γ_min to γ_max in equal parts of its time."""
    first, last = torch.atan(torch.exp(ends / 2)).unbind()
    place = torch.arange(parts + 1, dtype=torch.float64, device=ends.device) / parts
    gamma = 2 * torch.log(torch.tan(first + (last - first) * place))
    return gamma.diff() / (gamma[-1] - gamma[0])


class InputTap:
    """A model that keeps its last input and output, to differentiate one by the other."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        self.x_t = x_t.requires_grad_()
        self.prediction = self.model(self.x_t, t, cond)
        return self.prediction


def error_and_slope(
    schedule: Schedule,
    target: str,
    watched: InputTap,
    x0: Float[Tensor, "b *d"],
    eps: Float[Tensor, "b *d"],
    t: Int[Tensor, " b"],
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """m = mean ‖ε − ε̂(x_t)‖² over elements, and dm/dγ_t with x_0, ε and the weights held, float64.

    Both per sample. γ_t enters through x_t = a x_0 + s ε, the network's input, with
    dx_t/dγ = ½ a s (a ε − s x_0), and through P4, which turns the prediction into ε̂. The graph is
    kept, and no weight receives a gradient.
    """
    x_t, prediction = watched.x_t, watched.prediction[:, : x0.shape[1]].to(x0.dtype)  # the rest is a variance
    gamma = (-2 * schedule.half_log_snr_table[t]).requires_grad_()
    a, s = like(torch.sigmoid(-gamma).sqrt(), x0), like(torch.sigmoid(gamma).sqrt(), x0)
    error = (to_eps(target, prediction, x_t, a, s) - eps).square().flatten(1).sum(1)
    through_p4, at_input = torch.autograd.grad(error.sum(), (gamma, x_t), retain_graph=True, materialize_grads=True)
    moved = (a * s * (a * eps - s * x0)).detach() / 2
    slope = through_p4 + (at_input * moved).flatten(1).sum(1)
    return error.detach().double() / x0[0].numel(), slope.double() / x0[0].numel()


def schedule_loss(
    tables: tuple[Float[Tensor, " T"], Float[Tensor, " T"]],
    t: Int[Tensor, " b"],
    error: Float[Tensor, " b"],
    slope: Float[Tensor, " b"],
    x0: Float[Tensor, "b *d"],
    eps: Float[Tensor, "b *d"],
    pixels: bool,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """A number whose gradient trains the schedule, and metrics to log.

    t is uniform on 0 … T−1; all in nats per dimension. One draw of the denoising terms is

        D = T·½(SNR_{t−1} − SNR_t)·mean‖x_0 − x̂_0‖² = T·½ expm1(γ_t − γ_{t−1})·m

    and 0 at t = 0 (L2, L3 with σ² = β̃). The ends (first table) receive the gradient of prior +
    decoder + D, the interior (second table) that of D²: of the variance, as far as the mean does
    not depend on it.
    """
    gamma, steps, earlier = tables[0].detach(), len(tables[0]), (t - 1).clamp(min=0)
    rise = gamma[t] - gamma[earlier]  # 0 at t = 0, where the term and its gradient vanish with it
    term = steps / 2 * torch.expm1(rise) * error
    at_earlier = steps / 2 * torch.exp(rise) * error  # −dD/dγ_{t−1}
    at_t = at_earlier + steps / 2 * torch.expm1(rise) * slope  # dD/dγ_t

    def moved(table: Tensor) -> Tensor:
        return at_t * table[t] - at_earlier * table[earlier]

    outer = prior(tables[0][-1], x0) + decoder(tables[0][0], x0, eps, pixels)
    loss = (outer + moved(tables[0]) + 2 * term * moved(tables[1])).mean()
    metrics = {"bound": (outer.detach() + term).mean(), "denoising_square": term.square().mean()}
    return loss, metrics | {"gamma_min": gamma[0], "gamma_max": gamma[-1]}


def prior(gamma: Float[Tensor, ""], x0: Float[Tensor, "b *d"]) -> Float[Tensor, " b"]:
    """KL(q(x_T|x_0) ‖ N(0, I)) at γ of the last step, mean over dimensions (F4)."""
    zero, mean = torch.zeros_like(gamma), torch.sigmoid(-gamma).sqrt() * x0.double()
    return gaussian.kl(mean, F.logsigmoid(gamma), zero, zero).flatten(1).mean(1)


def decoder(
    gamma: Float[Tensor, ""], x0: Float[Tensor, "b *d"], eps: Float[Tensor, "b *d"], pixels: bool
) -> Float[Tensor, " b"]:
    """−log p(x_0|x_t) at γ of the first step, mean over dimensions.

    p is a density, or for ``pixels`` the mass of a bin (L5): a Gaussian about x_t/a_t = x_0 +
    (s_t/a_t) ε with variance s_t²/a_t² = e^γ (Kingma et al. 2021, eq. 12). It leaves the network
    out, so that every sample informs the first end, and not only those drawn at t = 0.
    """
    x0, score = x0.double(), gaussian.discretised_log_probability if pixels else gaussian.log_density
    return -score(x0, x0 + torch.exp(gamma / 2) * eps.double(), gamma).flatten(1).mean(1)
