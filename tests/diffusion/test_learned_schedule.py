"""The learned schedule: its table, its gradients against differences, exact denoisers, and whole runs."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.interrupts import PowerCut
from support.launches import started, torchrun
from support.ranks import Job, write
from torch import Tensor

from ldm import config as configuration
from ldm.cli.main import main
from ldm.config import ConfigError, DiffusionTrainingConfig, ObjectiveConfig, ScheduleConfig
from ldm.data.dataset import Stream, collate
from ldm.diffusion.condition import Condition
from ldm.diffusion.learned_schedule import RANGES, InputTap, LearnedSchedule, error_and_slope, schedule_loss
from ldm.diffusion.objective import Objective
from ldm.diffusion.schedule import Schedule
from ldm.pipeline import Pipeline
from ldm.runs.records import read_metrics
from ldm.training.stages.diffusion import DiffusionTask
from ldm.training.stages.learned_schedule import UNCLIPPED, LearnedScheduleTask

pytestmark = pytest.mark.usefixtures("seed")
Function = Callable[[Tensor, Tensor, Condition], Tensor]


def made(
    num_steps: int = 1000, start: str = "cosine", ends: tuple[float, float] = (-10.0, 10.0), scale: float = 0.0
) -> LearnedSchedule:
    """A table whose parameters are normal with standard deviation ``scale``, in float64 for finite differences."""
    learned = LearnedSchedule(ScheduleConfig("learned", num_steps, start=start, ends=ends)).double()
    for parameter in learned.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    return learned


def gammas(schedule: Schedule) -> Tensor:
    """γ from ᾱ, by its definition."""
    return torch.log((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod)


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("start", ["cosine", "linear"])
@pytest.mark.parametrize("num_steps", [2, 3, 32, 33, 1000])
def test_gamma_rises_whatever_the_parameters_are(start: str, num_steps: int) -> None:
    for scale in (0.0, 1.0, 10.0, 1000.0):
        for _ in range(5):
            learned = made(num_steps, start, scale=scale)
            schedule = learned.schedule()
            Schedule(schedule.betas)  # looks at the numbers
            assert bool((schedule.half_log_snr_table.diff() < 0).all())
            for gamma in learned():
                assert gamma.shape == (num_steps,) and bool((gamma.diff() > 0).all())
                for end, (lowest, highest) in zip((gamma[0], gamma[-1]), RANGES, strict=True):
                    assert lowest - 1e-9 <= end <= highest + 1e-9
                torch.testing.assert_close(-2 * schedule.half_log_snr_table, gamma.detach(), rtol=1e-6, atol=1e-6)


def test_it_starts_as_cosine_between_its_ends_or_linear_in_gamma() -> None:
    ends = (-9.0, 7.0)
    first, last = (math.acos(math.sqrt(1 / (1 + math.exp(gamma)))) for gamma in ends)
    cosine = torch.cos(torch.linspace(first, last, 961, dtype=torch.float64)).square()
    found = made(961, ends=ends).schedule().alphas_cumprod
    torch.testing.assert_close(found[::30], cosine[::30], rtol=1e-9, atol=0)  # at the knots
    torch.testing.assert_close(found, cosine, rtol=0, atol=3e-3)
    line = torch.linspace(*ends, 1000, dtype=torch.float64)
    torch.testing.assert_close(gammas(made(start="linear", ends=ends).schedule()), line, rtol=0, atol=1e-8)
    # between the first and the last steps, where its ends are cut, the published cosine schedule is the same curve
    published = Schedule.from_config(ScheduleConfig("cosine")).half_log_snr_table[100:900]
    torch.testing.assert_close(made().schedule().half_log_snr_table[100:900], published, rtol=0, atol=0.05)


def test_each_table_is_differentiable_in_its_own_parameters_alone() -> None:
    learned = made(50, scale=0.5)
    for table, mine, other in ((0, learned.ends, learned.increments), (1, learned.increments, learned.ends)):
        to_mine, to_other = torch.autograd.grad(learned()[table][20], (mine, other), allow_unused=True)
        assert to_other is None and bool((to_mine != 0).any())


# ---------------------------------------------------------------- the gradients

TARGETS = ("eps", "x0", "v", "score", "flow")


def network(channels: int, outputs: int) -> Function:
    """A fixed smooth function of x_t and t, float64."""
    generator = torch.Generator().manual_seed(3)
    inner, outer = (
        torch.randn(shape, generator=generator, dtype=torch.float64) / 2 for shape in ((channels, 16), (16, outputs))
    )
    return lambda x_t, t, cond: torch.tanh(x_t @ inner + t[:, None] / 100) @ outer


def watched(
    schedule: Schedule, model: Function, x0: Tensor, eps: Tensor, t: Tensor, target: str = "eps"
) -> tuple[Tensor, Tensor]:
    seen = InputTap(model)
    seen(schedule.add_noise(x0, eps, t), t, Condition())
    return error_and_slope(schedule, target, seen, x0, eps, t)


def error(gamma: Tensor, model: Function, target: str, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """mean ‖ε − ε̂‖² at γ [b], from the error of x_0: ‖Δε‖² = SNR ‖Δx_0‖²."""
    bar = 1 / (1 + gamma.exp()[:, None])
    a, s = bar.sqrt(), (1 - bar).sqrt()
    x_t = a * x0 + s * eps
    said = model(x_t, t, Condition())[:, : x0.shape[1]]
    guesses = {"eps": (x_t - s * said) / a, "x0": said, "v": a * x_t - s * said, "score": (x_t + s * s * said) / a}
    guess = (guesses | {"flow": (x_t - s * said) / (a + s)})[target]
    return (bar / (1 - bar) * (x0 - guess).square()).mean(1)


@pytest.mark.parametrize("outputs", [5, 10])  # 10: with a variance
@pytest.mark.parametrize("target", TARGETS)
def test_the_slope_of_the_error_is_its_derivative(target: str, outputs: int) -> None:
    schedule, model = made(40, ends=(-4.0, 4.0), scale=0.5).schedule(), network(5, outputs)
    t = torch.arange(40)
    x0, eps = torch.randn(2, 40, 5, dtype=torch.float64)
    value, slope = watched(schedule, model, x0, eps, t, target)
    gamma, h = gammas(schedule), 1e-5
    torch.testing.assert_close(value, error(gamma, model, target, x0, eps, t), rtol=1e-6, atol=1e-9)
    expected = (error(gamma + h, model, target, x0, eps, t) - error(gamma - h, model, target, x0, eps, t)) / (2 * h)
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-7)


def draws_of_the_terms(gamma: Tensor, model: Function, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """T · ½(SNR_{t−1} − SNR_t) · mean ‖x_0 − x̂_0‖² with an ε network, 0 at t = 0."""
    snr = torch.exp(-gamma)
    squared = error(gamma[t], model, "eps", x0, eps, t) / snr[t]
    return torch.where(t > 0, len(gamma) / 2 * (snr[t - 1] - snr[t]) * squared, 0)


def by_differences(function: Callable[[], Tensor], parameter: Tensor, h: float = 1e-4) -> Tensor:
    """Central differences of a scalar by each entry of a parameter."""
    gradient = torch.zeros_like(parameter)
    with torch.no_grad():
        for i in range(len(parameter)):
            parameter[i] += h
            above = function()
            parameter[i] -= 2 * h
            gradient[i] = (above - function()) / (2 * h)
            parameter[i] += h
    return gradient


def gradients(
    learned: LearnedSchedule, model: Function, x0: Tensor, eps: Tensor, t: Tensor, pixels: bool = False
) -> tuple[Tensor, Tensor]:
    """What training sends to the ends and to the interior."""
    loss, _ = schedule_loss(learned(), t, *watched(learned.schedule(), model, x0, eps, t), x0, eps, pixels)
    to_ends, to_interior = torch.autograd.grad(loss, (learned.ends, learned.increments))
    return to_ends, to_interior


@pytest.mark.parametrize("start", ["cosine", "linear"])
def test_the_interior_descends_the_second_moment_of_the_estimator(start: str) -> None:
    learned, model = made(40, start, (-5.0, 5.0), 0.5), network(5, 5)
    t = torch.arange(40).repeat(5)
    x0, eps = torch.randn(2, 200, 5, dtype=torch.float64)
    expected = by_differences(
        lambda: draws_of_the_terms(gammas(learned.schedule()), model, x0, eps, t).square().mean(),
        learned.increments.data,
    )
    torch.testing.assert_close(gradients(learned, model, x0, eps, t)[1], expected, rtol=1e-5, atol=1e-7)


def test_with_many_steps_that_is_the_gradient_of_the_variance() -> None:
    """For a network that knows x_t alone: the mean is then an integral over γ, whatever the interior."""
    learned, whole = made(1000, "linear", (-5.0, 5.0), 0.5), network(5, 5)

    def model(x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return whole(x_t, torch.zeros_like(t), cond)

    t = torch.arange(1000).repeat(8)
    x0, eps = (torch.randn(8, 5, dtype=torch.float64).repeat_interleave(1000, 0) for _ in range(2))
    expected = by_differences(
        lambda: draws_of_the_terms(gammas(learned.schedule()), model, x0, eps, t).var(), learned.increments.data
    )
    found = gradients(learned, model, x0, eps, t)[1]
    assert float((found - expected).norm()) < 0.02 * float(expected.norm())


@pytest.mark.parametrize("pixels", [False, True])
def test_the_ends_descend_the_bound(pixels: bool) -> None:
    learned, model = made(40, "cosine", (-6.0, 3.0), 0.5), network(5, 5)
    t = torch.arange(40).repeat(5)
    x0, eps = torch.randn(2, 200, 5, dtype=torch.float64)
    x0 = ((x0.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1 if pixels else x0
    assert not pixels or bool((x0 == 1).any() & (x0 == -1).any())

    def bound() -> Tensor:
        gamma = gammas(learned.schedule())
        bar = 1 / (1 + gamma.exp())
        prior = 0.5 * (bar[-1] * (x0.square() - 1) - torch.log(1 - bar[-1]))
        a, s = bar[0].sqrt(), (1 - bar[0]).sqrt()
        p = torch.distributions.Normal((a * x0 + s * eps) / a, s / a)
        if pixels:
            above, below = (
                torch.where(x0 > 0.999, 1.0, p.cdf(x0 + 1 / 255)),
                torch.where(x0 < -0.999, 0.0, p.cdf(x0 - 1 / 255)),
            )
            log_p = torch.log(above - below)
        else:
            log_p = p.log_prob(x0)
        return prior.mean() - log_p.mean() + draws_of_the_terms(gamma, model, x0, eps, t).mean()

    loss, figures = schedule_loss(learned(), t, *watched(learned.schedule(), model, x0, eps, t), x0, eps, pixels)
    torch.testing.assert_close(figures["bound"], bound(), rtol=1e-6, atol=1e-6)
    to_ends, to_increments = torch.autograd.grad(loss, (learned.ends, learned.increments))
    torch.testing.assert_close(to_ends, by_differences(bound, learned.ends.data), rtol=1e-5, atol=1e-6)
    assert bool((to_increments != 0).any())


# ---------------------------------------------------------------- the proof, with exact denoisers

MEANS = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
STD, STEPS = 0.3, 1000


def exact(a: Tensor, s: Tensor, x_t: Tensor) -> Tensor:
    """E[ε | x_t] of the equal mixture of N(MEANS, STD²): x_t mixes N(a·MEANS, a² STD² + s²). a and s: [b, 1]."""
    away, variance = x_t[:, None] - a[:, :, None] * MEANS, a.square() * STD**2 + s.square()
    weight = torch.softmax(-away.square().sum(2) / (2 * variance), 1)
    return s / variance * (weight[:, :, None] * away).sum(1)


def drawn(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x_0 of the mixture, and noise."""
    x0 = MEANS[torch.randint(4, (n,), generator=generator)]
    noise, eps = torch.randn(2, n, 8, generator=generator, dtype=torch.float64)
    return x0 + STD * noise, eps


def common_draws() -> tuple[Tensor, Tensor]:
    """100 draws for comparisons, whose noise has mean square 1 exactly.

    Half of any shortfall would count for each unit of γ_min.
    """
    x0, eps = drawn(100, torch.Generator().manual_seed(11))
    return x0, eps / eps.square().mean().sqrt()


def errors_at(gamma: Tensor) -> Tensor:
    """m of the common draws at each γ, [T, 100]."""
    a, s = (torch.sigmoid(sign * gamma).sqrt().repeat_interleave(100)[:, None] for sign in (-1, 1))
    x0, eps = (draws.repeat(len(gamma), 1) for draws in common_draws())
    return (exact(a, s, a * x0 + s * eps) - eps).square().mean(1).reshape(len(gamma), 100)


def variance_and_bound(gamma: Tensor) -> tuple[float, float]:
    """Variance of the estimator of the denoising terms, exact over t; and prior + decoder + their mean."""
    snr, squared = torch.exp(-gamma), errors_at(gamma[1:])
    terms = len(gamma) / 2 * ((snr[:-1] - snr[1:]) / snr[1:])[:, None] * squared
    mean, square = terms.sum(0).mean() / len(gamma), terms.square().sum(0).mean() / len(gamma)
    x0 = common_draws()[0]
    bar = 1 / (1 + gamma[-1].exp())
    prior = 0.5 * (bar * (x0.square() - 1) - torch.log(1 - bar)).mean()
    return float(square - mean.square()), float(mean + prior + 0.5 * (math.log(2 * math.pi) + gamma[0] + 1))


def optimum(first: float, last: float) -> Tensor:
    """γ at T steps with dγ/dt ∝ 1/√E[m²](γ), which makes the second moment the same at every t."""
    fine = torch.linspace(first, last, 500, dtype=torch.float64)
    root = errors_at(fine).square().mean(1).sqrt()
    way = torch.nn.functional.pad(torch.cumsum((root[1:] + root[:-1]) / 2, 0), (1, 0))
    wanted = torch.linspace(0, float(way[-1]), STEPS, dtype=torch.float64)
    upper = torch.searchsorted(way, wanted).clamp(1, 499)
    return torch.lerp(fine[upper - 1], fine[upper], (wanted - way[upper - 1]) / (way[upper] - way[upper - 1]))


def trained(updates: int) -> LearnedSchedule:
    """The schedule alone, beside an exact denoiser: independent t, small batches and a clip at 1, as in training."""
    learned, generator = made(STEPS), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(learned.parameters())
    for i in range(updates):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 + math.cos(math.pi * i / updates))
        schedule = learned.schedule()
        x0, eps = drawn(32, generator)
        t = (torch.rand(32, generator=generator) * STEPS).long()
        seen = watched(
            schedule,
            lambda x, t, c, held=schedule: exact(held.alpha(t)[:, None], held.sigma(t)[:, None], x),
            x0,
            eps,
            t,
        )
        optimizer.zero_grad()
        (UNCLIPPED * schedule_loss(learned(), t, *seen, x0, eps, False)[0]).backward()
        torch.nn.utils.clip_grad_norm_(learned.parameters(), 1.0)
        optimizer.step()
    return learned


def test_learning_lowers_the_variance_of_the_bound_below_cosine_and_near_its_optimum() -> None:
    learned = trained(450)
    gamma = gammas(learned.schedule())
    first, last = float(gamma[0]), float(gamma[-1])
    angle = torch.linspace(math.atan(math.exp(first / 2)), math.atan(math.exp(last / 2)), STEPS, dtype=torch.float64)
    variance, bound = variance_and_bound(gamma)
    cosine_variance, cosine_bound = variance_and_bound(2 * torch.log(torch.tan(angle)))
    best_variance, best_bound = variance_and_bound(optimum(first, last))
    print(f"variance {variance:.3f}, cosine {cosine_variance:.3f}, optimum {best_variance:.3f}")
    print(f"bound {bound:.4f}, cosine {cosine_bound:.4f}, optimum {best_bound:.4f}")
    print(
        f"before: variance and bound {variance_and_bound(gammas(made(STEPS).schedule()))}, "
        f"ends now {first:.2f}, {last:.2f}"
    )
    assert variance < 0.2 * cosine_variance and variance < 2.5 * best_variance
    assert bound < cosine_bound and bound < best_bound + 0.01
    assert bound < variance_and_bound(gammas(made(STEPS).schedule()))[1] - 0.12  # the ends have moved for the better


# ---------------------------------------------------------------- in training

TREE: dict[str, Any] = {
    "data": {"source": "digits", "image_size": 8, "image_channels": 1},
    "autoencoder": "none",
    "text": "none",
    "unet": {"channels": [8, 8], "layers_per_level": 1, "attention_levels": [], "groups": 4},
    "schedule": {"name": "learned", "num_steps": 100, "lr": 0.1},
    "objective": {"target": "v"},
    "sample": {"steps": 2},
    "train": {
        "steps": 4, "batch_size": 8, "micro_batch": 4, "lr": 1e-3, "warmup": 1, "ema_decay": 0.9, "log_every": 1,
        "validate_every": 4,
        "validation_size": 4, "sample_every": 4, "checkpoint_every": 2, "trackers": [],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, trained without interruption; its configuration is beside it."""
    folder = tmp_path_factory.mktemp("learned")
    (folder / "ldm.yaml").write_text(yaml.safe_dump({"run": str(folder / "run"), **TREE}))
    assert main(["train-ldm", str(folder / "ldm.yaml")]) == 0
    return folder / "run"


def settings(run: Path, *overrides: str) -> DiffusionTrainingConfig:
    return configuration.load(DiffusionTrainingConfig, run.parent / "ldm.yaml", list(overrides))


def saved(run: Path) -> LearnedSchedule:
    """The schedule of the last checkpoint."""
    learned = LearnedSchedule(settings(run).schedule)
    learned.load_state_dict(load_file(run / "checkpoints/step-00000004/model_schedule.safetensors"))
    return learned


def test_a_run_exports_the_table_that_it_learned(run: Path) -> None:
    learned = saved(run).schedule()
    start = LearnedSchedule(settings(run).schedule).schedule()
    assert float((learned.half_log_snr_table - start.half_log_snr_table).abs().max()) > 0.05
    pipe = Pipeline.from_pretrained(run, "cpu")
    assert pipe.schedule_config.name == "given"
    torch.testing.assert_close(pipe.schedule.alphas_cumprod, learned.alphas_cumprod, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pipe.schedule.half_log_snr_table, learned.half_log_snr_table, rtol=1e-6, atol=1e-6)
    theirs: Any = diffusers.DDIMScheduler.from_pretrained(run / "model/scheduler")
    torch.testing.assert_close(theirs.alphas_cumprod.double(), learned.alphas_cumprod, rtol=0, atol=1e-6)
    logged = read_metrics(run)[-1]
    assert {"bound", "denoising_square", "gamma_min", "gamma_max", "grad_norm_schedule"} <= logged.keys()


def test_a_run_cut_off_ends_as_if_nothing_had_happened(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Stream.read

    def cut(self: Stream, position: int) -> Any:
        if not self.validation and position == 8 * 3 + 5:
            raise PowerCut
        return read(self, position)

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "read", cut)
        with pytest.raises(PowerCut):
            main(["train-ldm", str(run.parent / "ldm.yaml"), f"run={tmp_path}/run"])
    assert main(["train-ldm", str(run.parent / "ldm.yaml"), f"run={tmp_path}/run"]) == 0
    files = [*(run / "checkpoints/step-00000004").glob("*.safetensors"), *(run / "model").rglob("*.*")]
    assert len(files) >= 8
    for file in files:
        assert (tmp_path / "run" / file.relative_to(run)).read_bytes() == file.read_bytes(), file


def gradients_of_the_network(task: DiffusionTask) -> dict[str, Tensor]:
    task.to(torch.device("cpu"))
    for start in (0, 4):
        task.micro_step(
            task.networks, collate([task.stream[i] for i in range(start, start + 4)]), 0, lambda loss: loss.backward()
        )
    return {name: p.grad for name, p in task.trained.unet.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("target", TARGETS)
def test_the_network_is_trained_as_with_the_same_table_fixed(run: Path, target: str) -> None:
    chosen = settings(run, f"objective.target={target}")
    task = LearnedScheduleTask.from_config(chosen, lambda _: None)
    table = configuration.to_dict(saved(run).given())
    fixed = DiffusionTask.from_config(
        configuration.build(DiffusionTrainingConfig, {**configuration.to_dict(chosen), "schedule": table}),
        lambda _: None,
    )
    assert list(task.networks) == ["unet", "schedule"] and list(fixed.networks) == ["unet"]
    task.learned.load_state_dict(saved(run).state_dict())
    mine, theirs = gradients_of_the_network(task), gradients_of_the_network(fixed)
    assert mine.keys() == theirs.keys() and len(mine) > 20
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=0)
    assert task.learned.ends.grad is not None and bool((task.learned.ends.grad != 0).all())
    assert task.learned.increments.grad is not None and bool((task.learned.increments.grad != 0).any())


def test_training_validation_and_samples_use_the_table_as_it_stands(run: Path) -> None:
    task = LearnedScheduleTask.from_config(settings(run), lambda _: None)
    task.to(torch.device("cpu"))
    assert task.lr_scale("schedule") * task.config.train.lr == pytest.approx(0.1)
    assert task.lr_scale("unet") == 1.0 and task.averaged == "unet"
    one = collate([task.stream[i] for i in range(4)])

    @torch.no_grad()
    def validate() -> None:
        task.validate(0, lambda x: x, 0, 1)

    for use in (validate, lambda: task.micro_step(task.networks, one, 0, lambda loss: None)):
        with torch.no_grad():
            task.learned.ends.add_(0.1)
        use()
        torch.testing.assert_close(task.schedule.betas, task.learned.schedule().betas, rtol=0, atol=0)
        torch.testing.assert_close(task.objective.schedule.betas, task.learned.schedule().betas, rtol=0, atol=0)
    with torch.no_grad():
        task.learned.ends.add_(0.1)
    torch.testing.assert_close(task.pipeline().schedule.betas, task.learned.schedule().betas, rtol=0, atol=0)


@pytest.mark.slow
def test_two_processes_learn_the_table_that_one_learns(run: Path, tmp_path: Path) -> None:
    config = tmp_path / "longer.yaml"
    config.write_text(yaml.safe_dump({"run": str(run), **TREE, "train": {**TREE["train"], "steps": 8}}))
    for name, launcher in (("one", [sys.executable]), ("two", torchrun(2))):
        job = Job(str(tmp_path / name), "ldm", str(config), str(run), at=4, micro_batch=None, gradients=(4,))
        started(launcher, "train", str(write([job], tmp_path / f"{name}.json")))
    expected, found = (load_file(tmp_path / name / "gradients.safetensors") for name in ("one", "two"))
    assert found.keys() == expected.keys() and {"4.schedule.ends", "4.schedule.increments"} <= found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    first, second = (
        load_file(tmp_path / f"{name}/run/checkpoints/step-00000008/model_schedule.safetensors")
        for name in ("one", "two")
    )
    assert bool((first["increments"] != saved(run).increments).any())
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["schedule.shift=2.0"], "schedule.shift has no meaning for a learned schedule"),
        (["schedule.zero_terminal_snr=true"], "schedule.zero_terminal_snr has no meaning for a learned schedule"),
        (["schedule.beta_start=0.001"], "schedule.beta_start has no meaning for a learned schedule"),
        (["schedule.name=cosine"], "schedule.lr has no meaning for any but a learned schedule"),
        (
            ["schedule.name=cosine", "schedule.lr=0.003", "schedule.start=linear"],
            "schedule.start has no meaning for any but a learned",
        ),
        (["schedule.start=sine"], "schedule.start"),
        (["schedule.ends=[10.0,-10.0]"], "schedule.ends must be"),
        (["schedule.lr=0.0"], "schedule.lr"),
        (["schedule.betas=[0.1,0.2]"], "betas go with name: given"),
        (["objective.timesteps=importance"], "objective.timesteps importance"),
        (["train.compile=true"], "train.compile=false"),
        (["train.mixed_precision=fp16"], "no fp16"),
    ],
)
def test_what_makes_no_sense_is_refused(run: Path, changes: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        settings(run, *changes)
    assert expected in str(refused.value) and "\n" not in str(refused.value)


def test_a_learned_schedule_has_no_table_in_its_settings() -> None:
    with pytest.raises(ValueError, match="in the model that learned it"):
        Schedule.from_config(ScheduleConfig("learned"))
    assert Objective(ObjectiveConfig(), made().schedule()).schedule.num_steps == 1000
