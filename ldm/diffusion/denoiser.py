"""A network as samplers see it: its prediction read as x̂_0, ε̂ or score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, Shaped
from torch import Tensor

from ldm.diffusion.process import learned_log_variance, score, to_eps, to_x0
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.targets import TABLE

Denoise = Callable[[Tensor, Tensor], Tensor]  # denoise(x_t [b, …], t [b]) -> prediction [b, …]


@dataclass(frozen=True)
class Prediction:
    """One network call at (x_t, t), in any of the equivalent forms (docs/equations.md P4).

    Attributes:
        raw: the network's output, a prediction of its target.
        variance_output: the second half of the output channels if the network has learned the
            reverse variance (P5), else None.
    """

    denoiser: Denoiser
    raw: Float[Tensor, "b *d"]
    x_t: Float[Tensor, "b *d"]
    t: Shaped[Tensor, "*k"]
    variance_output: Float[Tensor, "b *d"] | None = None

    @property
    def x0(self) -> Float[Tensor, "b *d"]:
        """x̂_0."""
        return to_x0(self.denoiser.schedule, self.denoiser.target, self.raw, self.x_t, self.t)

    @property
    def eps(self) -> Float[Tensor, "b *d"]:
        """ε̂."""
        return to_eps(self.denoiser.schedule, self.denoiser.target, self.raw, self.x_t, self.t)

    @property
    def score(self) -> Float[Tensor, "b *d"]:
        """∇ log q(x_t), estimated."""
        return score(self.denoiser.schedule, self.denoiser.target, self.raw, self.x_t, self.t)

    def log_variance(self, s: Shaped[Tensor, "*k"]) -> Float[Tensor, "b *d"]:
        """The learned log variance of p(x_s | x_t).

        Raises ValueError if the network has learned none.
        """
        if self.variance_output is None:
            raise ValueError("this model has not learned the reverse variance: take variance posterior or beta")
        return learned_log_variance(self.denoiser.schedule, self.variance_output, s, self.t)


@dataclass(frozen=True)
class Denoiser:
    """``predict(x_t, t)``, guidance included, with its process and its target.

    ``learned_variance``: the network returns twice the channels of x_t, the second half for the
    reverse variance.
    """

    schedule: Schedule
    target: str
    predict: Denoise
    learned_variance: bool = False

    def __post_init__(self) -> None:
        if self.target not in TABLE:
            raise ValueError(f"target must be one of {', '.join(TABLE)}, got {self.target!r}")

    def __call__(self, x_t: Float[Tensor, "b *d"], t: Shaped[Tensor, "*k"]) -> Prediction:
        """One network call; ``t`` is one for the whole batch, or one for each sample."""
        raw, output = self.predict(x_t, t.expand(len(x_t))), None
        if self.learned_variance:
            raw, output = raw.chunk(2, dim=1)
        return Prediction(self, raw, x_t, t, output)
