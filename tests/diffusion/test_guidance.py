"""The guidance stack against exact scores of a mixture, its formulas, diffusers, and counts of evaluations."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from ldm.config import TARGETS, ScheduleConfig
from ldm.diffusion.condition import Condition, concatenate
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import Guidance, classifier_gradient, guides, mean_shift, moved_score, rescaled, thresholded
from ldm.diffusion.process import from_x0, to_x0, transition
from ldm.diffusion.samplers.ancestral import ddim, ddpm
from ldm.diffusion.samplers.grids import GRIDS
from ldm.diffusion.schedule import Schedule

pytestmark = [
    pytest.mark.usefixtures("seed"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # in diffusers
]

SCHEDULE = Schedule.from_config(ScheduleConfig("linear"))
COND, NULL = Condition(vector=torch.ones(3, 1)), Condition(vector=torch.zeros(3, 1))
AT = torch.full((3,), 400)


class Counted:
    """A nonlinear model of any width that records the size of the batches and the conditions that it was asked with."""

    def __init__(self, outputs: int = 1) -> None:
        self.calls: list[list[float]] = []
        self.outputs = outputs

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        assert cond.vector is not None
        self.calls.append(cond.vector[:, 0].tolist())
        c = cond.vector.reshape(-1, *([1] * (x.ndim - 1)))
        said = torch.sin(3 * x) * (0.5 + c) + t.reshape(c.shape) / 700 + 0.3 * c
        return torch.cat([said * (1 + i) for i in range(self.outputs)], 1)


def weaker(x: Tensor, t: Tensor) -> Tensor:
    return 0.7 * torch.cos(x)


def stack(model: Any, **settings: Any) -> Guidance:
    return Guidance(model, COND, NULL, SCHEDULE, settings.pop("target", "v"), **settings)


def sample() -> Tensor:
    return torch.randn(3, 2, 4, 4)


# ---------------------------------------------------------------- classifier-free


@pytest.mark.parametrize(("scale", "which"), [(1.0, COND), (0.0, NULL)])
def test_one_and_zero_are_the_model_itself_in_one_evaluation(scale: float, which: Condition) -> None:
    model, x = Counted(), sample()
    out = stack(model, scale=scale, rescale=0.7, guide=weaker, guide_scale=1.0)(
        x, AT
    )  # rescale and a scale of 1 change nothing
    assert len(model.calls) == 1 and len(model.calls[0]) == 3 and torch.equal(out, model(x, AT, which))


@pytest.mark.parametrize("scale", [0.5, 3.0, 7.5])
def test_classifier_free_is_its_formula_in_one_batch(scale: float) -> None:
    model, x, t = Counted(), sample(), torch.tensor([1, 2, 3])
    out = stack(model, scale=scale)(x, t)
    assert model.calls == [[0, 0, 0, 1, 1, 1]]
    w = scale - 1  # Ho & Salimans' w
    torch.testing.assert_close(out, (1 + w) * model(x, t, COND) - w * model(x, t, NULL))


MIDDLE = Condition(vector=torch.full((3, 1), 0.25))  # the image of an instruction, without its text


@pytest.mark.parametrize(("image", "text"), [(1.5, 7.5), (0.4, 2.0), (3.0, 1.0)])
def test_two_scales_are_instruct_pix2pix_in_one_batch(image: float, text: float) -> None:
    model, x = Counted(), sample()
    out = stack(model, scale=image, away=((MIDDLE, text - image),))(x, AT)
    assert model.calls == [[0, 0, 0, 0.25, 0.25, 0.25, 1, 1, 1]]
    none, some, whole = (model(x, AT, cond) for cond in (NULL, MIDDLE, COND))
    torch.testing.assert_close(out, none + image * (some - none) + text * (whole - some))


@pytest.mark.parametrize(
    ("image", "text", "asked"),
    [
        (3.0, 3.0, [0, 1]),
        (1.0, 3.0, [0.25, 1]),
        (1.0, 1.0, [1]),
        (1.0, 0.0, [0.25]),
        (0.0, 0.0, [0]),
        (2.0, 0.0, [0, 0.25]),
        (0.0, 3.0, [0, 0.25, 1]),
    ],
)
def test_what_counts_nothing_is_not_evaluated(image: float, text: float, asked: list[float]) -> None:
    model, x = Counted(), sample()
    out = stack(model, scale=image, away=((MIDDLE, text - image),))(x, AT)
    assert model.calls == [[value for value in asked for _ in range(3)]]
    none, some, whole = (model(x, AT, cond) for cond in (NULL, MIDDLE, COND))
    torch.testing.assert_close(out, none + image * (some - none) + text * (whole - some))


def test_with_nothing_else_to_steer_away_from_not_a_bit_changes() -> None:
    model, x = Counted(), sample()
    with_, without = model(x, AT, COND), model(x, AT, NULL)
    assert torch.equal(stack(model, scale=7.5)(x, AT), without + 7.5 * (with_ - without))


def test_each_of_several_parts_is_guided_alone() -> None:
    """γ and one weight for each part: the sum of the differences, the whole condition last."""
    model, x = Counted(), sample()
    parts = [Condition(vector=torch.full((3, 1), value)) for value in (0.25, 0.5)]
    out = stack(model, scale=1.5, away=((parts[0], 2.0), (parts[1], -0.5)))(x, AT)
    none, first, second, whole = (model(x, AT, cond) for cond in (NULL, *parts, COND))
    expected = whole + 0.5 * (whole - none) + 2.0 * (whole - first) - 0.5 * (whole - second)
    torch.testing.assert_close(out, expected)
    assert model.calls[0] == [value for value in (0, 0.25, 0.5, 1) for _ in range(3)]


@pytest.mark.parametrize(("scale", "which"), [(0.0, COND), (1.0, COND), (2.0, COND)])
def test_outside_the_interval_the_whole_condition_is_called_alone(scale: float, which: Condition) -> None:
    model, x = Counted(), sample()
    out = stack(model, scale=scale, away=((MIDDLE, 2.0),), interval=(1e6, 1e7))(x, AT)
    assert len(model.calls) == 1 and torch.equal(out, model(x, AT, which))


def test_a_condition_without_weight_is_called_where_the_rescale_compares_with_it() -> None:
    model, x = Counted(), sample()
    out = stack(model, scale=1.0, away=((MIDDLE, -1.0),), rescale=1.0)(x, AT)
    some, whole = (model(x, AT, cond) for cond in (MIDDLE, COND))
    torch.testing.assert_close(out, rescaled(some, whole, 1.0))


def test_guidance_is_the_same_in_every_prediction() -> None:
    t, x = torch.tensor([100, 800]), torch.randn(2, 4, dtype=torch.float64)
    halves = [torch.randn(2, 4, dtype=torch.float64) for _ in range(2)]  # x̂_0 without and with the condition
    weak_x0, gradient = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)

    def guided(name: str) -> Tensor:
        def model(x_t: Tensor, at: Tensor, cond: Condition) -> Tensor:
            return from_x0(SCHEDULE, name, torch.cat(halves), x_t, at)

        def guide(x_t: Tensor, at: Tensor) -> Tensor:
            return from_x0(SCHEDULE, name, weak_x0, x_t, at)

        out = Guidance(
            model, Condition(), Condition(), SCHEDULE, name, scale=4.0, guide=guide, guide_scale=2.0,
            gradient=lambda x_t, at: gradient, threshold=0.9,
        )(x, t)  # fmt: skip
        return to_x0(SCHEDULE, name, out, x, t)

    torch.testing.assert_close(guided("eps"), guided("x0"))
    torch.testing.assert_close(guided("v"), guided("x0"))


# ---------------------------------------------------------------- refinements


def test_rescale_is_that_of_diffusers_on_the_networks_own_output() -> None:
    model, x = Counted(), sample()
    with_, without = model(x, AT, COND), model(x, AT, NULL)
    plain = without + 5.0 * (with_ - without)
    for phi in (0.0, 0.4, 1.0):
        expected = rescale_noise_cfg(plain, with_, phi)
        torch.testing.assert_close(stack(model, scale=5.0, rescale=phi)(x, AT), expected)
    full = rescaled(plain, with_, 1.0)
    torch.testing.assert_close(full.flatten(1).std(1), with_.flatten(1).std(1))  # over all but the batch
    assert (plain.flatten(1).std(1) > 1.5 * with_.flatten(1).std(1)).all()


def test_outside_the_interval_there_is_one_evaluation_and_no_guidance() -> None:
    ratio = SCHEDULE.sigma(torch.arange(1000)) / SCHEDULE.alpha(torch.arange(1000))
    interval, asked, gradients = (float(ratio[200]), float(ratio[600])), [], []

    def gradient(x: Tensor, t: Tensor) -> Tensor:
        gradients.append(int(t[0]))
        return torch.ones_like(x)

    def guide(x: Tensor, t: Tensor) -> Tensor:
        asked.append(int(t[0]))
        return weaker(x, t)

    for scale, alone in ((3.0, COND), (0.0, NULL)):
        model = Counted()
        guided = stack(
            model, scale=scale, interval=interval, rescale=0.5, guide=guide, guide_scale=2.0, gradient=gradient
        )
        for t in (0, 199, 200, 400, 600, 601, 999):
            x, inside = sample(), 200 <= t <= 600
            for calls in (model.calls, asked, gradients):
                calls.clear()
            out = guided(x, torch.full((3,), t))
            assert model.calls == [[0, 0, 0, 1, 1, 1] if inside and scale else [scale and 1] * 3]
            assert asked == gradients == ([t] if inside else [])
            assert torch.equal(out, model(x, torch.full((3,), t), alone)) != inside
    shift = mean_shift(gradient, SCHEDULE, interval)
    assert shift(x, torch.full((3,), 400)).min() == 1 and not shift(x, torch.full((3,), 601)).any()
    with pytest.raises(ValueError, match="needs one t for the whole batch"):
        guides(SCHEDULE, interval, torch.tensor([400, 700]))


def test_dynamic_thresholding_is_imagens() -> None:
    """Quantile by sorting, each sample its own; small samples are only clipped to ±1."""
    x0 = torch.cat([0.2 * torch.randn(1, 3, 4, 4), 3 * torch.randn(2, 3, 4, 4)]).double()
    x0[0, 0, 0, 0] = 1.7
    for p in (0.5, 0.9, 1.0):
        out = thresholded(x0, p)
        for one, was in zip(out, x0, strict=True):
            size = was.abs().flatten().sort().values
            at = p * (len(size) - 1)
            low = math.floor(at)
            q = max(1.0, float(size[low] + (at - low) * (size[min(low + 1, len(size) - 1)] - size[low])))
            torch.testing.assert_close(
                one, torch.tensor([[[min(max(v, -q), q) / q for v in r] for r in c] for c in was.tolist()]).double()
            )
    assert thresholded(x0, 0.9)[0].max() == 1 and thresholded(x0, 1.0).abs().amax((1, 2, 3)).tolist() == [1, 1, 1]


def test_dynamic_thresholding_is_diffusers() -> None:
    scheduler: Any = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value=100.0)
    x0 = 3 * torch.randn(3, 3, 4, 4)
    torch.testing.assert_close(thresholded(x0, 0.95), scheduler._threshold_sample(x0))


@pytest.mark.parametrize("target", TARGETS)
def test_thresholding_comes_last_and_answers_in_the_target(target: str) -> None:
    x, model = 2 * sample().double(), Counted()

    def gradient(x: Tensor, t: Tensor) -> Tensor:
        return 5 * torch.cos(x)

    plain = stack(model, target=target, scale=4.0, gradient=gradient)(x, AT)
    out = stack(model, target=target, scale=4.0, gradient=gradient, threshold=0.8)(x, AT)
    x0 = to_x0(SCHEDULE, target, plain, x, AT)
    assert x0.abs().amax() > 1.5
    torch.testing.assert_close(to_x0(SCHEDULE, target, out, x, AT), thresholded(x0, 0.8))
    bounded = to_x0(SCHEDULE, target, stack(model, target=target, threshold=0.8)(x, AT), x, AT)
    assert bounded.abs().max() <= 1 + 1e-9  # without guidance too


def test_autoguidance_takes_the_place_of_the_unconditional_model() -> None:
    x, model = sample(), Counted()
    strong, without, weak = model(x, AT, COND), model(x, AT, NULL), weaker(x, AT)
    torch.testing.assert_close(stack(model, guide=weaker, guide_scale=2.5)(x, AT), weak + 2.5 * (strong - weak))
    torch.testing.assert_close(
        stack(model, scale=0.0, guide=weaker, guide_scale=2.5)(x, AT), weak + 2.5 * (without - weak)
    )
    both = stack(model, scale=3.0, guide=weaker, guide_scale=2.5)(x, AT)
    torch.testing.assert_close(both, strong + 2.0 * (strong - without) + 1.5 * (strong - weak))
    kept = stack(model, scale=3.0, guide=weaker, guide_scale=2.5, rescale=1.0)(x, AT)
    torch.testing.assert_close(
        kept, both * strong.flatten(1).std(1).view(3, 1, 1, 1) / both.flatten(1).std(1).view(3, 1, 1, 1)
    )


def test_a_learned_variance_is_that_of_the_conditional_evaluation() -> None:
    x, model, half = sample(), Counted(outputs=2), Counted()
    settings: dict[str, Any] = {
        "rescale": 0.5,
        "guide": weaker,
        "guide_scale": 2.0,
        "gradient": lambda x, t: x,
        "threshold": 0.9,
    }
    for scale, variance_of in ((3.0, COND), (1.0, COND), (0.0, NULL)):
        out = stack(model, scale=scale, learned_variance=True, **settings)(x, AT)
        assert out.shape == (3, 4, 4, 4) and torch.equal(out[:, 2:], model(x, AT, variance_of)[:, 2:])
        torch.testing.assert_close(out[:, :2], stack(half, scale=scale, **settings)(x, AT))


# ---------------------------------------------------------------- classifier guidance


@pytest.mark.parametrize("target", TARGETS)
def test_the_classifier_moves_the_score(target: str) -> None:
    x, model, gradient = sample().double(), Counted(), torch.randn(3, 2, 4, 4, dtype=torch.float64)
    before = Denoiser(SCHEDULE, target, stack(model, target=target))(x, torch.tensor(400))
    after = Denoiser(SCHEDULE, target, stack(model, target=target, gradient=lambda x, t: 3 * gradient))(
        x, torch.tensor(400)
    )
    torch.testing.assert_close(after.score, before.score + 3 * gradient)
    torch.testing.assert_close(
        after.eps, before.eps - SCHEDULE.sigma(torch.tensor(400)) * 3 * gradient
    )  # G2 as printed


def test_no_signal_is_nothing_to_classify() -> None:
    schedule = Schedule.from_config(ScheduleConfig("cosine", zero_terminal_snr=True))
    for target in ("v", "x0"):
        at_end = moved_score(schedule, target, torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([999]))
        assert (
            not at_end.any()
            and moved_score(schedule, target, torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([998])).isfinite().all()
        )


def test_the_gradient_is_that_of_the_log_probability() -> None:
    """A linear classifier: ∇ log p(y|x) = W_y − Σ_k p_k W_k; inside no_grad, and each sample its own label."""
    weight, x = torch.randn(5, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    label = torch.tensor([0, 4, 2])
    with torch.no_grad():
        found = classifier_gradient(lambda x, t: x @ weight.T + t[:, None] * torch.arange(5), label, 2.5)(
            x, torch.tensor([1, 2, 0])
        )
    p = torch.softmax(x @ weight.T + torch.tensor([[1.0], [2.0], [0.0]]) * torch.arange(5), 1)
    torch.testing.assert_close(found, 2.5 * (weight[label] - p @ weight))
    assert not found.requires_grad


def one_step(beta: float, variance: str, form: str, target: str, weight: float = 2.0) -> tuple[float, float, float]:
    """By how much each form moves the mean of the last step of a constant schedule; with V a_s/a_t and σ² of P5."""
    schedule, w_gradient = Schedule(torch.full((10,), beta, dtype=torch.float64)), weight * 0.7
    x, t, s = torch.tensor([[0.3]], dtype=torch.float64), torch.tensor(9), torch.tensor(8)

    def model(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return torch.tanh(x)

    def gradient(x_t: Tensor, t: Tensor) -> Tensor:
        assert torch.equal(x_t, x) and t.tolist() == [9]
        return torch.full_like(x_t, w_gradient)

    def mean(**options: Any) -> float:
        guided = Guidance(
            model,
            Condition(),
            Condition(),
            schedule,
            target,
            gradient=gradient if form == "score" and options else None,
        )
        extra = {"mean_shift": mean_shift(gradient, schedule)} if form == "mean" and options else {}
        grid = torch.tensor([9.0, 8.0], dtype=torch.float64)
        return float(
            ddpm(Denoiser(schedule, target, guided), x, grid, lambda i: torch.zeros_like(x), variance=variance, **extra)
        )

    ratio, v = transition(schedule, s, t)
    small = v * (schedule.sigma(s) / schedule.sigma(t)).square()
    return (
        mean(guided=True) - mean(),
        w_gradient * float(v / ratio),
        w_gradient * float(v if variance == "beta" else small),
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_the_two_forms_are_their_formulas(variance: str, target: str) -> None:
    found, by_score, _ = one_step(0.1, variance, "score", target)
    assert found == pytest.approx(by_score, rel=1e-10)  # w V (a_s/a_t) ∇
    found, _, by_mean = one_step(0.1, variance, "mean", target)
    assert found == pytest.approx(by_mean, rel=1e-10)  # w σ² ∇


def test_the_two_forms_agree_to_first_order_in_beta_only() -> None:
    shares = []
    for beta in (0.02, 0.01, 0.005):
        score, mean = one_step(beta, "beta", "score", "eps")[0], one_step(beta, "beta", "mean", "eps")[0]
        assert score / beta == pytest.approx(1.4, rel=beta) and mean / beta == pytest.approx(1.4, rel=beta)
        shares.append((score - mean) / beta**2)
    assert shares[-1] == pytest.approx(
        1.4 / 2, rel=0.02
    )  # w ∇ (1/√(1−β) − 1) → w ∇ β/2: a second order that does not vanish


def test_the_shift_of_the_mean_takes_the_learned_variance_and_the_last_step() -> None:
    schedule = Schedule(torch.full((10,), 0.1, dtype=torch.float64))
    x = torch.tensor([[0.3, -0.8]], dtype=torch.float64)[..., None, None]

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.cat([torch.tanh(x_t), torch.cos(5 * x_t)], 1)

    said = Denoiser(schedule, "v", predict, True)(x, torch.tensor(9))
    for variance, learned in (("learned", True), ("beta", False)):
        denoiser = Denoiser(schedule, "v", predict if learned else lambda x_t, t: torch.tanh(x_t), learned)
        grid = torch.tensor([9.0, -1.0], dtype=torch.float64)
        plain, moved = (
            ddpm(denoiser, x, grid, lambda i: x, variance=variance, **extra)
            for extra in ({}, {"mean_shift": lambda x_t, t: 2 * x_t})
        )
        square = said.log_variance(torch.tensor(-1)).exp() if learned else schedule.sigma(torch.tensor(9)).square()
        torch.testing.assert_close(moved - plain, square * 2 * x)


# ---------------------------------------------------------------- exact scores: three Gaussians in the plane

WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[1.5, 0.0], [-1.0, 1.0], [-0.5, -1.5]], dtype=torch.float64)
SPREADS = torch.tensor([0.5, 0.35, 0.6], dtype=torch.float64)


def log_joint(x: Tensor, t: Tensor) -> Tensor:
    """log p(k) q(x_t | k), [b, 3]: each part stays Gaussian, with mean a m and variance a² v + s²."""
    a, s = SCHEDULE.alpha(t)[:, None], SCHEDULE.sigma(t)[:, None]
    variance = (a * SPREADS) ** 2 + s**2
    square = (x[:, None] - a[..., None] * MEANS).square().sum(-1)
    return WEIGHTS.log() - square / (2 * variance) - torch.log(2 * math.pi * variance)


def score_of(log_density: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(log_density(x).sum(), x)[0]


def exact(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """ε of the part named by the condition, of the whole mixture where it is −1."""
    assert cond.vector is not None
    k = cond.vector[:, 0].long()
    part = score_of(lambda x: log_joint(x, t).gather(1, k.clamp(min=0)[:, None]), x)
    whole = score_of(lambda x: log_joint(x, t).logsumexp(1), x)
    return -SCHEDULE.sigma(t)[:, None] * torch.where(k[:, None] < 0, whole, part)


def conditions(n: int, k: int) -> tuple[Condition, Condition]:
    return Condition(vector=torch.full((n, 1), float(k))), Condition(vector=torch.full((n, 1), -1.0))


@pytest.mark.parametrize("t", [5, 300, 700])
@pytest.mark.parametrize("k", [0, 2])
def test_the_exact_classifier_at_one_gives_the_conditional_score(t: int, k: int) -> None:
    n = 50
    x, at, (cond, null) = 1.5 * torch.randn(n, 2, dtype=torch.float64), torch.full((n,), t), conditions(n, k)
    gradient = classifier_gradient(
        log_joint, torch.full((n,), k), 1.0
    )  # softmax of the joint is the posterior of the class
    out = Guidance(exact, cond, null, SCHEDULE, "eps", scale=0.0, gradient=gradient)(x, at)
    torch.testing.assert_close(out, exact(x, at, cond))
    assert not torch.allclose(exact(x, at, null), exact(x, at, cond), atol=0.05)


@pytest.mark.parametrize("gamma", [0.5, 2.0, 5.0])
def test_exact_classifier_free_guidance_sharpens_the_class(gamma: float) -> None:
    """Its score is that of p(x) p(c|x)^γ, and with the exact classifier at w = γ from γ = 0 the same."""
    n = 40
    x, at, (cond, null) = 1.5 * torch.randn(n, 2, dtype=torch.float64), torch.full((n,), 250), conditions(n, 1)

    def log_sharpened(x: Tensor) -> Tensor:
        joint = log_joint(x, at)
        return joint.logsumexp(1) + gamma * joint.log_softmax(1)[:, 1]

    expected = -SCHEDULE.sigma(at)[:, None] * score_of(log_sharpened, x)
    torch.testing.assert_close(Guidance(exact, cond, null, SCHEDULE, "eps", scale=gamma)(x, at), expected)
    by_classifier = classifier_gradient(log_joint, torch.ones(n, dtype=torch.long), gamma)
    torch.testing.assert_close(
        Guidance(exact, cond, null, SCHEDULE, "eps", scale=0.0, gradient=by_classifier)(x, at), expected
    )


@pytest.mark.parametrize("kind", ["free", "score", "mean"])
def test_guidance_trades_spread_for_likelihood(kind: str) -> None:
    """G4: as the scale rises, p(c | x) of the samples rises and their spread falls, whatever the guidance."""
    n, k, steps = 200, 1, 25
    x, (cond, null) = torch.randn(n, 2, dtype=torch.float64), conditions(n, k)
    likelihood, spread = [], []
    for scale in (1.0, 3.0, 8.0):
        gradient = classifier_gradient(log_joint, torch.full((n,), k), scale)
        guided = Guidance(
            exact,
            cond,
            null,
            SCHEDULE,
            "eps",
            scale=scale if kind == "free" else 0.0,
            gradient=gradient if kind == "score" else None,
        )
        if kind == "mean":
            generator = torch.Generator().manual_seed(1)
            options: dict[str, Any] = {"mean_shift": mean_shift(gradient, SCHEDULE), "variance": "beta"}
            noise = [torch.randn(n, 2, dtype=torch.float64, generator=generator) for _ in range(steps)]
            out = ddpm(
                Denoiser(SCHEDULE, "eps", guided),
                x,
                GRIDS["trailing"](SCHEDULE, steps),
                lambda i, z=noise: z[i],
                **options,
            )
        else:
            out = ddim(Denoiser(SCHEDULE, "eps", guided), x, GRIDS["trailing"](SCHEDULE, steps), lambda i: x)
        likelihood.append(float(log_joint(out, torch.full((n,), -1)).log_softmax(1)[:, k].mean()))
        spread.append(float(out.std(0).mean()))
    assert likelihood == sorted(likelihood) and likelihood[-1] > likelihood[0], likelihood
    assert max(spread[1:]) < 0.95 * spread[0], spread


# ---------------------------------------------------------------- conditions


def test_conditions_join_and_map() -> None:
    a = Condition(
        torch.zeros(1, 2, 3), torch.zeros(1, 4), torch.zeros(1, 1, 2, 2), (torch.zeros(1, 5), torch.zeros(1, 6))
    )
    b = a.map(lambda v: torch.cat([v, v]) + 1)
    joined = concatenate(a, b)
    assert (
        joined.context is not None
        and joined.vector is not None
        and joined.concat is not None
        and joined.control is not None
    )
    for part, width in (
        (joined.context, 6),
        (joined.vector, 4),
        (joined.concat, 4),
        (joined.control[0], 5),
        (joined.control[1], 6),
    ):
        assert part.flatten(1).tolist() == [[0.0] * width, [1.0] * width, [1.0] * width]
    assert concatenate(Condition(), Condition()) == Condition()


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("context", torch.zeros(1, 2, 3)),
        ("vector", torch.zeros(1, 4)),
        ("concat", torch.zeros(1, 1, 2, 2)),
        ("control", (torch.zeros(1, 5),)),
    ],
)
def test_unequal_kinds_are_refused(kind: str, value: object) -> None:
    for pair in ((Condition(**{kind: value}), Condition()), (Condition(), Condition(**{kind: value}))):
        with pytest.raises(ValueError, match=f"only one of two conditions has {kind}"):
            concatenate(*pair)
