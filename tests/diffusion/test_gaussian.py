"""Gaussians against torch, scipy and 60-digit arithmetic; the discretised one against its own definition."""

import math

import mpmath
import pytest
import torch
from scipy.stats import norm
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from autoencoder.posterior import DiagonalGaussian
from ldm.diffusion import gaussian, reference

pytestmark = pytest.mark.usefixtures("seed")

LEVELS = 2 * torch.arange(256, dtype=torch.float64) / 255 - 1


def covariance(*shape: int) -> Tensor:
    root = torch.randn(*shape, 4, 4, dtype=torch.float64)
    return root @ root.mT + 0.1 * torch.eye(4, dtype=torch.float64)


def test_the_diagonal_forms_are_those_of_torch() -> None:
    x, mean, other, log_variance, other_log_variance = 2 * torch.randn(5, 3, 4, 4, dtype=torch.float64)
    ours, theirs = Normal(mean, (log_variance / 2).exp()), Normal(other, (other_log_variance / 2).exp())
    torch.testing.assert_close(gaussian.log_density(x, mean, log_variance), ours.log_prob(x))
    torch.testing.assert_close(gaussian.entropy(log_variance), ours.entropy())
    torch.testing.assert_close(gaussian.kl(mean, log_variance, other, other_log_variance), kl_divergence(ours, theirs))
    zero = torch.zeros(())
    standard = DiagonalGaussian(mean[None].float(), log_variance[None].float()).kl()
    torch.testing.assert_close(
        gaussian.kl(mean.float(), log_variance.float(), zero, zero), standard[0], rtol=1e-5, atol=1e-5
    )


def test_the_full_forms_are_those_of_torch() -> None:
    (x, mean, other), one, two = torch.randn(3, 6, 4, dtype=torch.float64), covariance(6), covariance(6)
    ours, theirs = MultivariateNormal(mean, one), MultivariateNormal(other, two)
    torch.testing.assert_close(reference.log_density_full(x, mean, one), ours.log_prob(x))
    torch.testing.assert_close(
        reference.log_density_full(x, mean[0], one[0]), MultivariateNormal(mean[0], one[0]).log_prob(x)
    )
    torch.testing.assert_close(reference.entropy_full(one), ours.entropy())
    torch.testing.assert_close(reference.kl_full(mean, one, other, two), kl_divergence(ours, theirs))


def test_full_and_diagonal_agree() -> None:
    (x, mean, other), (a, b) = torch.randn(3, 6, 4, dtype=torch.float64), torch.randn(2, 6, 4, dtype=torch.float64)
    one, two = torch.diag_embed(a.exp()), torch.diag_embed(b.exp())
    torch.testing.assert_close(gaussian.log_density(x, mean, a).sum(1), reference.log_density_full(x, mean, one))
    torch.testing.assert_close(gaussian.entropy(a).sum(1), reference.entropy_full(one))
    torch.testing.assert_close(gaussian.kl(mean, a, other, b).sum(1), reference.kl_full(mean, one, other, two))


def test_a_small_kl_keeps_its_digits() -> None:
    """½(e^d − 1 − d) ≈ d²/4 for variances that nearly agree, here 2.5e-13 in float32."""
    d, zero = torch.tensor([1e-6]), torch.zeros(1)
    assert 0 <= gaussian.kl(zero, d, zero, zero).item() < 1e-12
    assert gaussian.kl(zero.double(), d.double(), zero.double(), zero.double()).item() == pytest.approx(
        2.5e-13, rel=1e-2
    )


@pytest.mark.parametrize("bad", [[[1.0, 2.0], [2.0, 1.0]], [[1.0, 0.5], [0.0, 1.0]], [[0.0, 0.0], [0.0, 1.0]]])
def test_what_is_no_covariance_is_refused(bad: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="symmetric and positive definite"):
        reference.entropy_full(torch.tensor(bad))


# ---------------------------------------------------------------- the discretised Gaussian (L5)


@pytest.mark.parametrize("std", [1e-4, 0.003, 0.05, 0.7, 20.0])
@pytest.mark.parametrize("mean", [-1.4, -1.0, -0.3001, 0.0, 0.999, 3.0])
def test_the_masses_of_256_bins_sum_to_one(mean: float, std: float) -> None:
    log_p = gaussian.discretised_log_probability(
        LEVELS, torch.tensor(mean, dtype=torch.float64), 2 * torch.tensor(std, dtype=torch.float64).log()
    )
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_bins_are_differences_of_scipys_cdf() -> None:
    edges = (torch.arange(257, dtype=torch.float64) * 2 - 1) / 255 - 1
    edges[0], edges[-1] = -math.inf, math.inf
    for mean, std in ((0.21, 0.1), (-0.9, 0.4), (0.0, 3.0)):
        expected = torch.from_numpy(norm.cdf(edges, mean, std)).diff()
        log_p = gaussian.discretised_log_probability(
            LEVELS, torch.tensor(mean, dtype=torch.float64), 2 * torch.tensor(std, dtype=torch.float64).log()
        )
        torch.testing.assert_close(log_p.exp(), expected, rtol=1e-9, atol=1e-14)


def exact(k: int, mean: float, std: float) -> float:
    """log of the mass of bin k in 60 digits."""
    with mpmath.workdps(60):
        mean_, std_ = mpmath.mpf(mean), mpmath.mpf(std)
        low = -mpmath.inf if k == 0 else (mpmath.mpf(2 * k - 1) / 255 - 1 - mean_) / std_
        high = mpmath.inf if k == 255 else (mpmath.mpf(2 * k + 1) / 255 - 1 - mean_) / std_
        if low + high > 0:
            low, high = -high, -low
        upper, lower = (mpmath.erfc(-z / mpmath.sqrt(2)) / 2 for z in (high, low))
        return float(mpmath.log(upper - lower))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("std", [1e-3, 0.01, 0.08, 1.0, 50.0])
def test_tails_are_exact_and_their_gradients_finite(std: float, dtype: torch.dtype) -> None:
    """Means up to thousands of deviations away, where Φ itself is 0 or 1 in float64."""
    cases = [
        (k, mean) for k in (0, 1, 100, 127, 128, 200, 254, 255) for mean in (-2.5, -1.0, -0.6, 0.0, 0.37, 1.0, 2.5)
    ]
    x = torch.tensor([2 * k / 255 - 1 for k, _ in cases], dtype=dtype)
    mean = torch.tensor([m for _, m in cases], dtype=dtype, requires_grad=True)
    log_variance = torch.full_like(x, 2 * math.log(std)).requires_grad_()
    log_p = gaussian.discretised_log_probability(x, mean, log_variance)
    stds = (log_variance.detach().double() / 2).exp().tolist()
    expected = torch.tensor(
        [exact(k, m, s) for (k, _), m, s in zip(cases, mean.tolist(), stds, strict=True)], dtype=torch.float64
    )
    assert log_p.dtype == dtype and bool(log_p.isfinite().all())
    # the level of a pixel itself is rounded in float32: 6e-8 of a position that counts in units of std
    rtol, atol = (2e-5, 1e-5 + 3e-7 / std) if dtype == torch.float32 else (1e-9, 1e-9)
    torch.testing.assert_close(log_p.double(), expected, rtol=rtol, atol=atol)
    gradients = torch.autograd.grad(log_p.sum(), [mean, log_variance])
    assert all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("std", [0.004, 0.05, 0.5])
def test_gradients_are_difference_quotients(std: float) -> None:
    x = LEVELS[[0, 3, 90, 254, 255]]
    mean = torch.tensor([-0.8, 0.4, 0.1, 0.9, 1.2], dtype=torch.float64, requires_grad=True)
    log_variance = torch.full_like(x, 2 * math.log(std)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda m, v: gaussian.discretised_log_probability(x, m, v), (mean, log_variance), atol=1e-4, rtol=1e-5
    )


def test_a_wide_gaussian_has_the_density_times_the_bin() -> None:
    x, mean, log_variance = LEVELS[60:190], torch.tensor(0.1).double(), torch.tensor(-1.0).double()
    density = gaussian.log_density(x, mean, log_variance) + math.log(2 / 255)
    torch.testing.assert_close(gaussian.discretised_log_probability(x, mean, log_variance), density, rtol=0, atol=1e-4)


def test_pixels_are_checked() -> None:
    gaussian.check_pixels(LEVELS.float())
    gaussian.check_pixels(torch.arange(256).float() / 127.5 - 1)  # as images are prepared
    for bad in (LEVELS + 0.3 / 127.5, LEVELS + 2 / 255, LEVELS - 2 / 255, LEVELS / 2, torch.tensor([math.nan])):
        with pytest.raises(ValueError, match="8-bit levels"):
            gaussian.check_pixels(bad)
