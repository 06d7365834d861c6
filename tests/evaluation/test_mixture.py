"""Gaussian mixtures against numerical integration, Monte Carlo and autograd (docs/equations.md F6)."""

import math

import pytest
import torch
from torch import Tensor

from ldm.config import TARGETS
from ldm.diffusion.condition import Condition
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.process import to_x0
from ldm.diffusion.schedule import Schedule
from ldm.evaluation.samplers.mixture import GaussianMixture

pytestmark = pytest.mark.usefixtures("seed")

LEVELS = [(0.98, 0.2), (0.6, 0.8), (0.1, 0.995)]  # α, σ


def tensor(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def line() -> GaussianMixture:
    return GaussianMixture.of(tensor(0.3, 0.5, 0.2), tensor([-1.0], [0.4], [2.0]), tensor(0.04, 0.3, 0.1))


def plane() -> GaussianMixture:
    covariances = tensor([[0.5, 0.3], [0.3, 0.4]], [[0.1, 0.0], [0.0, 0.2]], [[0.3, -0.25], [-0.25, 0.3]])
    return GaussianMixture.of(tensor(0.2, 0.5, 0.3), tensor([-1.0, 0.5], [1.0, 1.0], [0.3, -1.5]), covariances)


# its matrix of axes is not symmetric, as that of a 2×2 covariance may be
SKEW = tensor([1.0, 0.4, -0.2], [0.4, 0.7, 0.3], [-0.2, 0.3, 0.5])


def space() -> GaussianMixture:
    covariances = torch.stack([SKEW, SKEW[[2, 0, 1]][:, [2, 0, 1]]])
    return GaussianMixture.of(tensor(0.4, 0.6), tensor([-1.0, 0.5, 0.0], [1.0, 1.0, -0.5]), covariances)


def at(alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(alpha, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64)


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_marginal_is_its_integral(alpha: float, sigma: float) -> None:
    """∫ q(x_t|x_0) q(x_0) dx_0 and E[x_0|x_t] on a grid of x_0, from densities written out here."""
    weights, means, variances = (0.3, 0.5, 0.2), (-1.0, 0.4, 2.0), (0.04, 0.3, 0.1)
    x0 = torch.linspace(-12, 12, 200_001, dtype=torch.float64)

    def normal(x: Tensor | float, mean: Tensor | float, variance: float) -> Tensor:
        return torch.exp(-torch.as_tensor((x - mean) ** 2 / (2 * variance))) / math.sqrt(2 * math.pi * variance)

    prior = torch.stack([w * normal(x0, m, v) for w, m, v in zip(weights, means, variances, strict=True)]).sum(0)
    for x_t in (-2.5, -0.3, 0.0, 1.7):
        joint = prior * normal(x_t, alpha * x0, sigma**2)
        total = torch.trapezoid(joint, x0)
        mean = torch.trapezoid(joint * x0, x0) / total
        x = tensor([x_t])
        assert line().log_density(x, *at(alpha, sigma)).item() == pytest.approx(math.log(total), abs=1e-8)
        assert line().denoised(x, *at(alpha, sigma)).item() == pytest.approx(mean.item(), abs=1e-8)


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_marginal_of_full_covariances_by_monte_carlo(alpha: float, sigma: float) -> None:
    """The average of q(x_t|x_0) over draws of x_0 that torch.distributions makes, within five standard errors."""
    n, mixture = 400_000, plane()
    covariances = tensor([[0.5, 0.3], [0.3, 0.4]], [[0.1, 0.0], [0.0, 0.2]], [[0.3, -0.25], [-0.25, 0.3]])
    normals = torch.distributions.MultivariateNormal(mixture.means, covariances)
    which = torch.distributions.Categorical(mixture.weights).sample((n,))
    x0 = normals.sample((n,))[torch.arange(n), which]
    for x_t in (tensor(0.5, 0.2), tensor(-0.4, -1.0)):
        kernel = torch.exp(-(x_t - alpha * x0).square().sum(1) / (2 * sigma**2)) / (2 * math.pi * sigma**2)
        density, mean = kernel.mean(), (kernel[:, None] * x0).mean(0) / kernel.mean()
        weight = kernel / density
        assert abs(mixture.log_density(x_t[None], *at(alpha, sigma)) - density.log()) < 5 * weight.std() / math.sqrt(n)
        error = (weight[:, None] * (x0 - mean)).std(0) / math.sqrt(n)
        assert ((mixture.denoised(x_t[None], *at(alpha, sigma)) - mean).abs() < 5 * error).all()


@pytest.mark.parametrize(
    "mixture",
    [line(), plane(), space(), GaussianMixture.points(torch.randn(5, 3))],
    ids=["line", "plane", "space", "points"],
)
@pytest.mark.parametrize("level", LEVELS)
def test_score_is_the_gradient_and_tweedie_holds(mixture: GaussianMixture, level: tuple[float, float]) -> None:
    x = (2 * torch.randn(20, mixture.means.shape[1], dtype=torch.float64)).requires_grad_()
    alpha, sigma = at(*level)
    (gradient,) = torch.autograd.grad(mixture.log_density(x, alpha, sigma).sum(), x)
    torch.testing.assert_close(mixture.score(x, alpha, sigma), gradient)
    torch.testing.assert_close(
        mixture.denoised(x, alpha, sigma), (x + sigma**2 * gradient) / alpha, rtol=1e-8, atol=1e-8
    )


def test_points_are_a_softmax_over_the_set() -> None:
    """E[x_0|x_t] of a finite set: its members weighted by the kernel, written out."""
    points, x = torch.randn(6, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    weight = torch.softmax(-(x[:, None] - 0.8 * points).square().sum(2) / (2 * 0.36), 1)
    torch.testing.assert_close(GaussianMixture.points(points).denoised(x, *at(0.8, 0.6)), weight @ points)


def test_draws_have_the_moments_and_the_classes() -> None:
    mixture, n = plane(), 200_000
    mean, covariance = mixture.moments()
    x0, of = mixture.draw(n)
    assert ((x0.mean(0) - mean).abs() < 5 * (covariance.diag() / n).sqrt()).all()
    torch.testing.assert_close(torch.cov(x0.T), covariance, rtol=0.02, atol=0.02)
    shares = torch.bincount(of) / n
    torch.testing.assert_close(shares.double(), mixture.weights, rtol=0, atol=0.006)
    inside = torch.cov(x0[of == 2].T)
    torch.testing.assert_close(inside, tensor([0.3, -0.25], [-0.25, 0.3]), rtol=0.03, atol=0.01)
    mixed, of = space().draw(n)
    torch.testing.assert_close(torch.cov(mixed[of == 0].T), SKEW, rtol=0, atol=0.02)
    torch.testing.assert_close(torch.cov(mixed.T), space().moments()[1], rtol=0, atol=0.03)
    x_t, _ = mixture.draw(n, alpha=0.6, sigma=0.8)
    torch.testing.assert_close(
        torch.cov(x_t.T), 0.36 * covariance + 0.64 * torch.eye(2, dtype=torch.float64), rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize("name", TARGETS)
def test_denoiser_speaks_every_target(name: str, schedule: Schedule) -> None:
    """For every target x̂_0 is E[x_0|x_t], and the score that of q(x_t), at whole and fractional t, per sample too."""
    mixture = plane()
    x = torch.randn(7, 2, dtype=torch.float64)
    for t in (tensor(3.0)[0], tensor(420.3)[0], torch.tensor(900)):
        said = mixture.denoiser(schedule, name)(x, t)
        level = schedule.alpha(t), schedule.sigma(t)
        torch.testing.assert_close(said.x0, mixture.denoised(x, *level), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(said.score, mixture.score(x, *level), rtol=1e-6, atol=1e-8)
    t = torch.tensor([0, 5, 100, 300, 500, 700, 990])
    said = mixture.model(schedule, name)(x, t, Condition())
    for i in range(7):
        alone = mixture.denoised(x[i : i + 1], schedule.alpha(t[i]), schedule.sigma(t[i]))
        torch.testing.assert_close(to_x0(schedule, name, said, x, t)[i : i + 1], alone, rtol=1e-6, atol=1e-7)
    images = torch.randn(2, 1, 1, 2)  # any shape of d numbers, in its own type
    assert mixture.model(schedule, name)(images, t[:2], Condition()).shape == images.shape


def test_a_class_is_one_component_and_guidance_leans_on_both(schedule: Schedule) -> None:
    """E[x_0|x_t, class] is the component's own, and γ moves ε by ε(∅) + γ (ε(c) − ε(∅))."""
    mixture, t = plane(), torch.tensor([200, 600])
    x, level = torch.randn(2, 2, dtype=torch.float64), (schedule.alpha(t), schedule.sigma(t))
    classes, everything = Condition(vector=torch.eye(3)[[2, 0]]), Condition(vector=torch.ones(2, 3))
    parts = [mixture.component(k).score(x[i : i + 1], *(v[i] for v in level)) for i, k in ((0, 2), (1, 0))]
    scores = torch.cat(parts), mixture.score(x, *level)
    for scale in (0.0, 1.0, 4.0):
        eps = Guidance(mixture.model(schedule, "eps"), classes, everything, schedule, "eps", scale=scale)(x, t)
        expected = scores[1] + scale * (scores[0] - scores[1])
        torch.testing.assert_close(-eps / level[1][:, None], expected, rtol=1e-8, atol=1e-10)


def test_classifier_is_bayes_rule() -> None:
    """q(class | x_t) = w_k q(x_t | class k)/q(x_t); its gradient is the difference of the scores."""
    mixture, level = plane(), at(0.7, math.sqrt(0.51))
    x = torch.randn(9, 2, dtype=torch.float64).requires_grad_()
    log = mixture.log_posterior(x, *level)
    for k in range(3):
        alone = mixture.component(k)
        expected = mixture.weights[k].log() + alone.log_density(x, *level) - mixture.log_density(x, *level)
        torch.testing.assert_close(log[:, k], expected)
        (gradient,) = torch.autograd.grad(log[:, k].sum(), x, retain_graph=True)
        torch.testing.assert_close(gradient, alone.score(x, *level) - mixture.score(x, *level))


def test_what_is_no_mixture_is_refused() -> None:
    with pytest.raises(ValueError, match="weights must be positive and sum to 1"):
        GaussianMixture.of(tensor(0.3, 0.3), tensor([0.0], [1.0]), tensor(1.0, 1.0))
    with pytest.raises(ValueError, match="variances must not be negative"):
        GaussianMixture.of(tensor(1.0), tensor([0.0]), tensor(-1.0))
    with pytest.raises(ValueError, match=r"symmetric \[k, d, d\]"):
        GaussianMixture.of(tensor(1.0), tensor([0.0, 0.0]), tensor([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="a point without noise has no density"):
        GaussianMixture.points(tensor([0.0], [1.0])).log_density(tensor([0.0]), *at(1.0, 0.0))
