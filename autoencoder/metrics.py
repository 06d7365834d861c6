"""Quality of reconstructions and use of latent channels. Images lie in [−1, 1]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from autoencoder.posterior import DiagonalGaussian

DATA_RANGE = 2.0
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03
# Variance of the posterior mean over the set above which a latent channel is active (Burda et al. 2016, section 5.2).
ACTIVE_VARIANCE = 0.01


def psnr(a: Float[Tensor, "b C H W"], b: Float[Tensor, "b C H W"]) -> Float[Tensor, " b"]:
    """Return 10 log₁₀(range² / MSE) of each pair of images, in dB; infinite for equal images."""
    mse = (a.double() - b.double()).square().mean(dim=(1, 2, 3))
    return 10.0 * torch.log10(DATA_RANGE**2 / mse)


def ssim(a: Float[Tensor, "b C H W"], b: Float[Tensor, "b C H W"]) -> Float[Tensor, " b"]:
    """Return the structural similarity of each pair of images, averaged over the channels.

    Wang et al. 2004, eq. 13. 11×11 Gaussian windows of σ = 1.5 that lie wholly inside the image,
    statistics without the n/(n−1) correction, K₁ = 0.01, K₂ = 0.03. Raises ValueError for a side
    below 11 pixels: there is no window then.
    """
    if min(a.shape[2:]) < SSIM_WINDOW:
        raise ValueError(
            f"image {a.shape[2]}×{a.shape[3]} is too small for SSIM: each side needs at least {SSIM_WINDOW} pixels"
        )
    a, b = a.double(), b.double()  # variances are differences of nearly equal numbers
    mean_a, mean_b = _window_mean(a), _window_mean(b)
    var_a = _window_mean(a * a) - mean_a**2
    var_b = _window_mean(b * b) - mean_b**2
    cov = _window_mean(a * b) - mean_a * mean_b
    c1, c2 = (SSIM_K1 * DATA_RANGE) ** 2, (SSIM_K2 * DATA_RANGE) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _window_mean(x: Tensor) -> Tensor:
    offset = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - (SSIM_WINDOW - 1) / 2
    kernel = torch.softmax(-(offset**2) / (2 * SSIM_SIGMA**2), dim=0)
    c = x.shape[1]
    x = F.conv2d(x, kernel.view(1, 1, -1, 1).expand(c, 1, -1, 1), groups=c)
    return F.conv2d(x, kernel.view(1, 1, 1, -1).expand(c, 1, 1, -1), groups=c)


def high_frequency_energy(
    reconstruction: Float[Tensor, "b C H W"], image: Float[Tensor, "b C H W"]
) -> Float[Tensor, " b"]:
    """Return each reconstruction's spectral energy above half of Nyquist divided by the original's.

    A frequency counts when it exceeds 1/4 cycle per pixel along either axis. Below 1: blurred;
    above 1: invented detail. Not finite where the original has none.
    """
    return _high_energy(reconstruction) / _high_energy(image)


def _high_energy(x: Tensor) -> Tensor:
    power = torch.fft.fft2(x.double()).abs().square()
    fy, fx = (torch.fft.fftfreq(n, dtype=torch.float64, device=x.device).abs() for n in x.shape[2:])
    high = (fy[:, None] > 0.25) | (fx[None, :] > 0.25)
    return (power * high).sum(dim=(1, 2, 3))


def kl_per_dimension(posterior: DiagonalGaussian) -> Float[Tensor, " b"]:
    """Return the KL to N(0, I) of each image in nats per latent element."""
    return posterior.kl().mean(dim=(1, 2, 3))
