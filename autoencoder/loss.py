"""The stage-1 loss (docs/equations.md L8; Esser et al. 2021, eq. 4 to 7) as plain functions.

Every term is a mean per element: L1 and MSE over pixels and channels, LPIPS over images, KL over
latent elements, hinge over patches. Published weights go with the reconstruction and the KL summed
per image; dividing both sums by the C·H·W image elements leaves KL_mean · c·h·w / (C·H·W), so a
published KL weight is multiplied by c·h·w / (C·H·W) to be used here (1e-6 at factor 8 with 4 latent
and 3 image channels: 2.1e-8), see LossConfig.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from autoencoder.config import LossConfig
from autoencoder.posterior import DiagonalGaussian

GRADIENT_FLOOR = 1e-4
ADAPTIVE_MAX = 1e4


def reconstruction_loss(reconstruction: Float[Tensor, "b C H W"], image: Float[Tensor, "b C H W"]) -> Float[Tensor, ""]:
    """Return the mean absolute error over all elements."""
    return (reconstruction - image).abs().mean()


def reconstruction_terms(
    reconstruction: Float[Tensor, "b C H W"],
    image: Float[Tensor, "b C H W"],
    posterior: DiagonalGaussian,
    config: LossConfig,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Return the unweighted terms ``l1``, ``kl`` and, if weighted, ``mse`` and ``lpips``.

    ``kl`` is in nats per latent element. Raises ValueError if config.lpips is positive and no
    ``perceptual`` is given.
    """
    terms = {"l1": reconstruction_loss(reconstruction, image), "kl": posterior.kl().mean()}
    if config.mse > 0.0:
        terms["mse"] = (reconstruction - image).square().mean()
    if config.lpips > 0.0:
        if perceptual is None:
            raise ValueError(f"loss.lpips is {config.lpips}: pass the PerceptualLoss of net {config.lpips_net}")
        terms["lpips"] = perceptual(reconstruction, image).mean()
    return terms


# Reference form: no command calls it; docs/equations.md L12 cites it, and tests compare the loss and the KL with it.
def vae_bound(log_likelihood: Float[Tensor, " b"], posterior: DiagonalGaussian) -> Float[Tensor, " b"]:
    """Return E_q log p(x|z) − KL(q(z|x) ‖ N(0, I)) ≤ log p(x) for each image, in nats.

    docs/equations.md L12.

    ``log_likelihood`` is log p(x|z), summed over the image, at draws z of the posterior; the KL is
    summed over the latent.
    """
    return log_likelihood - posterior.kl().flatten(1).sum(1)


def weighted_sum(terms: dict[str, Float[Tensor, ""]], config: LossConfig) -> Float[Tensor, ""]:
    """Return Σ weight · term over the named terms; each name is a weight of ``config``."""
    return torch.stack([getattr(config, name) * term for name, term in terms.items()]).sum()


def generator_hinge(fake_logits: Float[Tensor, "b 1 h w"]) -> Float[Tensor, ""]:
    """Return −E[D(x̂)], the generator's side of the hinge loss (Lim & Ye 2017)."""
    return -fake_logits.mean()


def discriminator_hinge(
    real_logits: Float[Tensor, "b 1 h w"], fake_logits: Float[Tensor, "b 1 h w"]
) -> Float[Tensor, ""]:
    """Return ½(E[max(0, 1 − D(x))] + E[max(0, 1 + D(x̂))]); x̂ must be detached by the caller."""
    return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())


def adaptive_weight(rec_grad: Tensor, gan_grad: Tensor) -> Float[Tensor, ""]:
    """Return ‖∇rec‖ / (‖∇gan‖ + 1e-4) clamped to [0, 1e4], detached (Esser et al. 2021, eq. 7).

    Takes the gradients at the decoder's last layer, of one shape, already averaged over the global
    batch: the norm of an average is not the average of norms, so a per-process value would depend
    on the number of processes.
    """
    rec_norm, gan_norm = rec_grad.detach().norm(), gan_grad.detach().norm()
    return (rec_norm / (gan_norm + GRADIENT_FLOOR)).clamp(0.0, ADAPTIVE_MAX)


def gan_factor(update: int, config: LossConfig) -> float:
    """Return the factor on the adversarial term at generator update ``update`` (from 0).

    0 before gan_start, then linear from 0 to ``gan`` over gan_ramp updates, then constant.
    """
    if update < config.gan_start:
        return 0.0
    if config.gan_ramp == 0:
        return config.gan
    return config.gan * min(1.0, (update - config.gan_start) / config.gan_ramp)
