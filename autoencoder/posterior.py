"""The encoder's output: a Gaussian with diagonal covariance over the latent elements."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# the limits of the published checkpoints; a wider range overflows exp in half precision
LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0


@dataclass(frozen=True)
class DiagonalGaussian:
    """q(z|x) = N(mean, diag exp(logvar)); both are [b, c, h, w]."""

    mean: Float[Tensor, "b c h w"]
    logvar: Float[Tensor, "b c h w"]

    @staticmethod
    def from_moments(moments: Float[Tensor, "b c2 h w"]) -> DiagonalGaussian:
        """Split moments [b, 2c, h, w] into mean and log-variance, the latter clamped to [−30, 20].

        Half-precision moments become float32: the KL is a small difference of large terms.
        Raises ValueError if the number of channels is odd.
        """
        if moments.shape[1] % 2:
            raise ValueError(
                f"moments hold mean and log-variance, so an even number of channels, got {moments.shape[1]}"
            )
        if moments.dtype in (torch.float16, torch.bfloat16):
            moments = moments.float()
        mean, logvar = moments.chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar.clamp(LOGVAR_MIN, LOGVAR_MAX))

    @property
    def std(self) -> Float[Tensor, "b c h w"]:
        """Standard deviation, exp(logvar / 2)."""
        return (0.5 * self.logvar).exp()

    @property
    def moments(self) -> Float[Tensor, "b c2 h w"]:
        """Mean and clamped log-variance along the channels, [b, 2c, h, w], as a latent cache keeps them."""
        return torch.cat([self.mean, self.logvar], dim=1)

    def sample(self, noise: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return mean + std · noise for standard normal noise.

        Kingma & Welling 2014, section 2.4.
        """
        return self.mean + self.std * noise

    def kl(self) -> Float[Tensor, "b c h w"]:
        """KL(q(z|x) ‖ N(0, I)) of each element, in nats: ½(μ² + σ² − 1 − log σ²).

        docs/equations.md L12.
        """
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar)
