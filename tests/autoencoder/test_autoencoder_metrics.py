"""Image metrics against direct float64 computation and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from autoencoder import DiagonalGaussian
from autoencoder.metrics import high_frequency_energy, kl_per_dimension, psnr, ssim


def test_psnr_closed_form() -> None:
    a = torch.zeros(3, 2, 8, 8)
    b = a + torch.tensor([0.02, 0.2, 2.0]).view(3, 1, 1, 1)
    assert psnr(a, b).tolist() == pytest.approx([40.0, 20.0, 0.0], abs=1e-5)
    assert psnr(a, a).tolist() == [math.inf] * 3


def ssim_loop(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, eq. 13 to 16, window by window, for one channel in [−1, 1]."""
    y = np.arange(11) - 5
    w = np.exp(-(y[:, None] ** 2 + y[None, :] ** 2) / (2 * 1.5**2))
    w /= w.sum()
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    values = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mp, mq = (w * p).sum(), (w * q).sum()
            vp, vq, cov = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum(), (w * (p - mp) * (q - mq)).sum()
            values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(values))


def test_ssim_equals_the_direct_loop() -> None:
    rng = np.random.default_rng(0)
    smooth = np.stack([[gaussian_filter(rng.standard_normal((20, 17)), s) for s in (0.5, 2.0)] for _ in range(3)])
    a = np.clip(smooth, -1, 1)
    b = np.clip(a + 0.1 * rng.standard_normal(a.shape), -1, 1)
    expected = [np.mean([ssim_loop(a[i, c], b[i, c]) for c in range(2)]) for i in range(3)]
    assert ssim(torch.from_numpy(a), torch.from_numpy(b)).tolist() == pytest.approx(expected, abs=1e-10)
    single = ssim(torch.from_numpy(a).float(), torch.from_numpy(b).float())
    assert single.tolist() == pytest.approx(expected, abs=1e-5)
    assert ssim(torch.from_numpy(a), torch.from_numpy(a)).tolist() == pytest.approx([1.0] * 3, abs=1e-12)


def test_ssim_refuses_small_images() -> None:
    assert ssim(torch.zeros(1, 1, 11, 11), torch.zeros(1, 1, 11, 11)).item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="10×12 is too small for SSIM: each side needs at least 11"):
        ssim(torch.zeros(1, 1, 10, 12), torch.zeros(1, 1, 10, 12))


def wave(fy: float, fx: float, n: int = 32) -> torch.Tensor:
    grid = torch.arange(n, dtype=torch.float64)
    return torch.cos(2 * math.pi * (fy * grid[:, None] + fx * grid[None, :])).view(1, 1, n, n)


def test_high_frequency_energy_counts_above_half_nyquist() -> None:
    low, high, oblique = wave(0.125, 0.0), wave(0.0, 0.375), wave(0.28125, 0.0625)
    at = wave(0.0, 0.25) + wave(0.25, 0.0) + wave(0.21875, 0.0) + wave(0.0, 0.21875)  # not above half of Nyquist
    image = 3.0 * low + high
    assert high_frequency_energy(0.1 * low + 5.0 * at + 0.5 * high, image).item() == pytest.approx(0.25)
    assert high_frequency_energy(image + 2.0 * oblique, image).item() == pytest.approx(5.0)
    assert high_frequency_energy(low, image).item() == pytest.approx(0.0, abs=1e-12)


def test_kl_per_dimension_of_a_shifted_unit_gaussian() -> None:
    mean = torch.tensor([0.0, 2.0]).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    assert kl_per_dimension(DiagonalGaussian(mean, torch.zeros_like(mean))).tolist() == [0.0, 2.0]
