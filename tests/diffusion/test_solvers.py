"""Every solver against diffusers' schedulers and against each other, its order, calls and refusals."""

import copy
import functools
import inspect
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from support.denoisers import gaussian_denoiser, network, their_scheduler
from torch import Tensor

from ldm.config import SCHEDULES, ConfigError, SampleConfig, ScheduleConfig
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.process import from_x0
from ldm.diffusion.samplers.ancestral import ddim, ddpm
from ldm.diffusion.samplers.dpm_solver import dpmpp_2m, dpmpp_2m_sde, dpmpp_2s, dpmpp_3m, dpmpp_3m_published, dpmpp_sde
from ldm.diffusion.samplers.edm import adams_weights, dpm2, euler, euler_ancestral, heun, lms
from ldm.diffusion.samplers.grids import GRIDS
from ldm.diffusion.samplers.nodes import Nodes
from ldm.diffusion.samplers.pndm import plms
from ldm.diffusion.samplers.registry import SAMPLERS
from ldm.diffusion.samplers.unipc import unipc
from ldm.diffusion.schedule import Schedule
from ldm.pipeline.checks import check_sampling

pytestmark = [
    pytest.mark.usefixtures("seed"),
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),  # in diffusers
]

KINDS = ("linear", "scaled_linear", "cosine")


@functools.cache
def process(kind: str, zero_terminal: bool = False) -> Schedule:
    return Schedule.from_config(ScheduleConfig(kind, zero_terminal_snr=zero_terminal))


def drawn(steps: int, x: Tensor) -> Callable[[int], Tensor]:
    noise = torch.randn(steps, *x.shape, dtype=x.dtype)
    return lambda i: noise[i]


# ---------------------------------------------------------------- diffusers


def grid_of(theirs: Any, schedule: Schedule, spacing: str, steps: int, end: float) -> Tensor:
    """Our grid for a scheduler after set_timesteps: its whole t; with Karras' levels, whose t it may round, ours."""
    t = theirs.timesteps.double()
    nodes = GRIDS[spacing](schedule, steps)[:-1]
    if isinstance(
        theirs, diffusers.HeunDiscreteScheduler | diffusers.KDPM2DiscreteScheduler
    ):  # they list a middle or an end as well
        t = torch.cat([t[:1], t[2::2]])
    if spacing == "karras":
        assert (t - nodes).abs().max() < 1
    elif spacing == "trailing" or isinstance(
        theirs, VARIANCE_EXPLODING
    ):  # the others space S + 1 nodes and leave out one
        assert t.tolist() == nodes.tolist()
    else:
        nodes = t
    return torch.cat([nodes, nodes.new_tensor([end])])


VARIANCE_EXPLODING = (  # they hold x/α
    diffusers.EulerDiscreteScheduler, diffusers.EulerAncestralDiscreteScheduler, diffusers.HeunDiscreteScheduler,
    diffusers.KDPM2DiscreteScheduler, diffusers.LMSDiscreteScheduler,
)  # fmt: skip


def in_float64(theirs: Any, nodes: Nodes) -> Tensor:
    """Replace a scheduler's float32 levels by float64, equal to rounding. Returns the level of each call."""
    levels = expanded = nodes.level
    if isinstance(theirs, diffusers.HeunDiscreteScheduler):
        expanded = torch.cat([levels[:1], levels[1:-1].repeat_interleave(2), levels[-1:]])
    if isinstance(theirs, diffusers.KDPM2DiscreteScheduler):
        expanded = torch.cat([levels[:1], levels[1:].repeat_interleave(2), levels[-1:]])
        middle = torch.cat([levels.new_zeros(1), (levels[:-1] * levels[1:]).sqrt()])
        middle = torch.cat([middle[:1], middle[1:].repeat_interleave(2), middle[-1:]])
        torch.testing.assert_close(theirs.sigmas_interpol.double()[1:], middle[1:], rtol=3e-6, atol=0)
        theirs.sigmas_interpol = middle
    torch.testing.assert_close(theirs.sigmas.double(), expanded, rtol=3e-6, atol=0)
    theirs.sigmas = expanded
    called = expanded[: len(theirs.timesteps)].clone()
    if isinstance(theirs, diffusers.KDPM2DiscreteScheduler):
        called[1::2] = theirs.sigmas_interpol[1 : len(called) : 2]
    return called


class InFloat64:
    """torch for a module of theirs that casts the sample to float32 whatever it is given."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def followed(theirs: Any, schedule: Schedule, target: str, grid: Tensor, x: Tensor, **step: Any) -> Tensor:
    """Where their loop ends from x; the network is asked at the t of their level, unrounded."""
    denoise, nodes = network(schedule, target), Nodes.of(schedule, grid, x)
    if hasattr(theirs, "sigmas"):
        asked = [schedule.time(-torch.log(level)) for level in in_float64(theirs, nodes)]
    else:
        asked = list(theirs.timesteps)
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(0)  # or they look for the first of rounded t, which may be there twice
    explodes = isinstance(theirs, VARIANCE_EXPLODING)
    sample = x / nodes.alpha[0].to(x.dtype) if explodes else x
    for i, t in enumerate(theirs.timesteps):
        model_input = theirs.scale_model_input(sample, t)
        more = {name: value(i) for name, value in step.items()}
        sample = theirs.step(denoise(model_input, asked[i].expand(len(x))), t, sample, **more).prev_sample
    return sample * nodes.alpha[-1].to(x.dtype) if explodes else sample


ALL = ("eps", "x0", "v")
DPM = diffusers.DPMSolverMultistepScheduler
SDE = {"algorithm_type": "sde-dpmsolver++"}
# ours, its options, theirs, their settings, the predictions they offer, whether they have Karras' levels
PAIRS: dict[str, tuple[Any, dict[str, Any], Any, dict[str, Any], tuple[str, ...], bool]] = {
    "2M": (dpmpp_2m, {}, DPM, {"solver_order": 2}, ALL, True),
    "3M": (dpmpp_3m_published, {}, DPM, {"solver_order": 3}, ALL, True),
    "2S": (dpmpp_2s, {}, diffusers.DPMSolverSinglestepScheduler, {"solver_order": 2}, ALL, True),
    "SDE-1": (dpmpp_sde, {}, DPM, {"solver_order": 1, **SDE}, ALL, True),
    "SDE-2M": (dpmpp_2m_sde, {}, DPM, {"solver_order": 2, **SDE}, ALL, True),
    **{
        f"UniPC-{p}-{kind}": (
            unipc, {"order": p, "solver": kind},
            diffusers.UniPCMultistepScheduler, {"solver_order": p, "solver_type": kind}, ALL, True,
        )
        for p in (1, 2, 3) for kind in ("bh1", "bh2")
    },
    "UniP-3": (
        unipc, {"order": 3, "corrector": False}, diffusers.UniPCMultistepScheduler,
        {"solver_order": 3, "disable_corrector": list(range(100))}, ALL, False,
    ),
    "Euler": (euler, {}, diffusers.EulerDiscreteScheduler, {}, ALL, True),
    "Euler ancestral": (euler_ancestral, {}, diffusers.EulerAncestralDiscreteScheduler, {}, ("eps", "v"), False),
    "Heun": (heun, {}, diffusers.HeunDiscreteScheduler, {}, ALL, True),
    "DPM2": (dpm2, {}, diffusers.KDPM2DiscreteScheduler, {}, ("eps", "v"), True),
    "LMS": (lms, {}, diffusers.LMSDiscreteScheduler, {}, ALL, True),
}  # fmt: skip


@functools.cache
def constructed(pair: str, kind: str, zero_terminal: bool) -> Any:
    """Their scheduler. Three of them work out a thousand steps when constructed, in seconds and for nothing."""
    cls, fixed = PAIRS[pair][2:4]
    with mock.patch.object(cls, "set_timesteps", lambda self, *_: setattr(self, "sigmas", torch.zeros(1))):
        return their_scheduler(
            cls, process(kind, zero_terminal), ScheduleConfig(kind, zero_terminal_snr=zero_terminal), "eps", **fixed
        )


def compare(
    pair: str, kind: str, target: str, spacing: str, steps: int, monkeypatch: pytest.MonkeyPatch,
    zero_terminal: bool = False, options: dict[str, Any] | None = None, **settings: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Results of ours (with ``options``) and theirs (with further ``settings``), from the same start and noise."""
    ours, chosen, cls, fixed, _, _ = PAIRS[pair]
    schedule, theirs = process(kind, zero_terminal), copy.deepcopy(constructed(pair, kind, zero_terminal))
    prediction = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[target]
    layout = (
        {"timestep_spacing": spacing}
        if spacing != "karras"
        else {"use_karras_sigmas": True, "timestep_spacing": "linspace"}
    )
    theirs.register_to_config(prediction_type=prediction, steps_offset=1, **layout, **settings)
    if zero_terminal:
        theirs.alphas_cumprod[-1] = schedule.least_signal
    if (
        cls is diffusers.DPMSolverSinglestepScheduler and spacing != "karras"
    ):  # it has one spacing of its own, and takes any
        theirs.set_timesteps(timesteps=GRIDS[spacing](schedule, steps)[:-1].long().tolist())
    else:
        theirs.set_timesteps(steps)
    monkeypatch.setattr(f"{cls.__module__}.torch", InFloat64())
    end = 0.0 if settings.get("final_sigmas_type") == "sigma_min" else -1.0
    grid = grid_of(theirs, schedule, spacing, steps, end)
    x = torch.randn(3, 8, dtype=torch.float64)
    noise, step = drawn(steps, x), {}
    if cls is diffusers.EulerAncestralDiscreteScheduler:
        fresh = iter(range(steps))
        monkeypatch.setattr(f"{cls.__module__}.randn_tensor", lambda *_, **__: noise(next(fresh)))
    elif fixed.get("algorithm_type") == "sde-dpmsolver++":
        step = {"variance_noise": noise}
    expected = followed(theirs, schedule, target, grid, x, **step)
    return ours(
        Denoiser(schedule, target, network(schedule, target)), x, grid, noise, **chosen, **(options or {})
    ), expected


def assert_same(found: tuple[Tensor, Tensor]) -> None:
    assert found[1].abs().max() > 0.1
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


# schedule: spacing and steps; linspace where its nodes are whole: 9 steps, except for those that hold x/α
CASES = {
    "linear": (("trailing", 5), ("trailing", 2)),
    "scaled_linear": (("karras", 6), ("trailing", 1), ("leading", 10), ("linspace", 10)),
    "cosine": (("trailing", 16), ("karras", 9)),
}


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("pair", PAIRS)
def test_a_solver_is_that_of_diffusers(pair: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps and many, their spacings and Karras' levels; every prediction that they offer, in its first case."""
    _, _, cls, _, predictions, has_karras = PAIRS[pair]
    compared = False
    for i, (spacing, steps) in enumerate(CASES[kind]):
        if spacing == "karras" and not has_karras:
            continue
        steps = 9 if spacing == "linspace" and cls not in VARIANCE_EXPLODING else steps
        end = {"final_sigmas_type": "sigma_min"} if "bh1" in pair else {}  # theirs is NaN at clean data
        if spacing == "karras" and end:
            continue  # theirs then takes a last step of no length
        for target in predictions if not compared else predictions[i % len(predictions) :][:1]:
            compared = True
            assert_same(compare(pair, kind, target, spacing, steps, monkeypatch, **end))


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("pair", ["2M", "3M", "2S", "SDE-2M", "UniPC-2-bh2", "UniPC-3-bh1", "UniPC-3-bh2"])
def test_the_end_above_clean_data_is_that_of_diffusers(pair: str, lower: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the smallest level of the schedule, with and without lower last orders, on both sides of 15 steps."""
    for steps in (6, 14, 15):
        settings = {"final_sigmas_type": "sigma_min", "lower_order_final": lower}
        assert_same(
            compare(
                pair, "scaled_linear", "v", "trailing", steps, monkeypatch, options={"lower_final": lower}, **settings
            )
        )


def test_euler_ends_above_clean_data_as_in_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same(compare("Euler", "linear", "eps", "trailing", 6, monkeypatch, final_sigmas_type="sigma_min"))


@pytest.mark.parametrize("pair", ["2M", "3M", "SDE-2M", "UniPC-2-bh2", "Euler"])
def test_zero_terminal_snr_is_that_of_diffusers(pair: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """x_0 predictions; from v theirs takes x̂_0 with the stand-in for no signal, ours with none, 2⁻¹² of x_T apart."""
    assert_same(compare(pair, "scaled_linear", "x0", "trailing", 10, monkeypatch, zero_terminal=True))
    ours, theirs = compare(pair, "scaled_linear", "v", "trailing", 10, monkeypatch, zero_terminal=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clean", [True, False])
def test_plms_is_that_of_diffusers(kind: str, clean: bool) -> None:
    """ε predictions: of v, theirs combines the raw outputs of different steps, ours what they say of ε."""
    schedule = process(kind)
    for spacing, steps in (("trailing", 2), ("trailing", 5), ("leading", 20), ("trailing", 25)):
        theirs = their_scheduler(
            diffusers.PNDMScheduler,
            schedule,
            ScheduleConfig(kind),
            "eps",
            skip_prk_steps=True,
            timestep_spacing=spacing,
        )
        theirs.final_alpha_cumprod = schedule.alphas_cumprod[0] if not clean else torch.tensor(1.0, dtype=torch.float64)
        theirs.set_timesteps(steps)
        grid = GRIDS[spacing](schedule, steps)
        grid[-1] = -1 if clean else 0
        x = torch.randn(3, 8, dtype=torch.float64)
        expected, denoise = x, network(schedule, "eps")
        for t in theirs.timesteps:
            expected = theirs.step(denoise(expected, t.expand(3)), int(t), expected).prev_sample
        assert len(theirs.timesteps) == SAMPLERS["plms"].calls(steps)
        torch.testing.assert_close(
            plms(Denoiser(schedule, "eps", denoise), x, grid, drawn(steps, x)), expected, rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize("kind", KINDS)
def test_ddim_ends_where_stable_diffusion_does(kind: str) -> None:
    """set_alpha_to_one false: at ᾱ[0], for us a grid that ends at t = 0."""
    schedule = process(kind)
    theirs = their_scheduler(
        diffusers.DDIMScheduler,
        schedule,
        ScheduleConfig(kind),
        "v",
        set_alpha_to_one=False,
        timestep_spacing="leading",
        steps_offset=1,
    )
    theirs.final_alpha_cumprod = schedule.alphas_cumprod[0]
    theirs.set_timesteps(20)
    grid = GRIDS["leading"](schedule, 20)
    grid[-1] = 0
    x, denoise = torch.randn(3, 8, dtype=torch.float64), network(schedule, "v")
    expected = x
    for t in theirs.timesteps:
        expected = theirs.step(denoise(expected, t.expand(3)), t, expected).prev_sample
    torch.testing.assert_close(
        ddim(Denoiser(schedule, "v", denoise), x, grid, drawn(20, x)), expected, rtol=1e-6, atol=1e-7
    )


# ---------------------------------------------------------------- each other


GRID_OF = {
    "trailing 1": lambda s: GRIDS["trailing"](s, 1),
    "trailing 12": lambda s: GRIDS["trailing"](s, 12),
    "karras 7": lambda s: GRIDS["karras"](s, 7),
    "uneven, above clean data": lambda s: torch.tensor([980.0, 700.5, 699.0, 420.0, 60.25, 3.0], dtype=torch.float64),
}
IDENTITIES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "Euler is DDIM": (euler, ddim),
    "Euler ancestral is DDIM with eta 1": (euler_ancestral, functools.partial(ddim, eta=1.0)),
    "SDE-1 is DDIM with eta 1": (dpmpp_sde, functools.partial(ddim, eta=1.0)),
    "SDE-1 is DDPM": (dpmpp_sde, functools.partial(ddpm, variance="posterior")),
    "UniP-1 is DDIM": (functools.partial(unipc, order=1, corrector=False), ddim),
    "UniP-2 with bh2 is 2M": (
        functools.partial(unipc, order=2, corrector=False, lower_final=False),
        functools.partial(dpmpp_2m, lower_final=False),
    ),
    "UniP-3 is 3M": (
        functools.partial(unipc, order=3, corrector=False, lower_final=False),
        functools.partial(dpmpp_3m, lower_final=False),
    ),
}


@pytest.mark.parametrize("where", GRID_OF)
@pytest.mark.parametrize("identity", IDENTITIES)
def test_solvers_that_must_agree(identity: str, where: str) -> None:
    for kind in ("scaled_linear", "cosine"):
        schedule, x = process(kind), torch.randn(2, 5, dtype=torch.float64)
        grid, denoiser = GRID_OF[where](schedule), Denoiser(schedule, "v", network(schedule, "v"))
        noise = drawn(len(grid) - 1, x)
        one, two = (solver(denoiser, x, grid, noise) for solver in IDENTITIES[identity])
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", sorted(SCHEDULES))
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_result_does_not_depend_on_the_words_of_the_network(name: str, kind: str) -> None:
    """ε, x_0 and v predictions that say the same give the same sample; the same noise gives the very same."""
    schedule, x = process(kind), torch.randn(2, 5, dtype=torch.float64)
    grid, noise = GRIDS["trailing"](schedule, 5), drawn(30, x)  # Langevin samplers draw several a step

    def end(target: str) -> Tensor:
        return SAMPLERS[name].function(Denoiser(schedule, target, network(schedule, target)), x, grid, noise)

    said = end("v")
    assert torch.equal(said, end("v"))
    for target in ("eps", "x0"):
        torch.testing.assert_close(end(target), said, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("target", ["x0", "v"])
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_sampler_starts_without_signal(name: str, target: str) -> None:
    """Zero terminal SNR, float32: finite, and where x̂_0 is always the same image, that image."""
    image = torch.linspace(-1, 1, 5).expand(2, 5)
    for kind in ("scaled_linear", "cosine"):
        schedule, x = process(kind, True), torch.randn(2, 5)
        sure = functools.partial(from_x0, schedule, target, image)
        for steps in (SAMPLERS[name].fewest, 7):
            grid = GRIDS["trailing"](schedule, steps)
            assert schedule.alpha(grid[0]) == 0
            for denoise in (network(schedule, target), sure):
                out = SAMPLERS[name].function(Denoiser(schedule, target, denoise), x, grid, drawn(6 * steps, x))
                assert out.isfinite().all()
            torch.testing.assert_close(out, image, rtol=1e-3, atol=2e-3)


# ---------------------------------------------------------------- order

ORDERS: dict[str, tuple[Callable[..., Tensor], float]] = {
    **{name: (s.function, s.order) for name, s in SAMPLERS.items() if not s.stochastic},
    "UniPC-1": (functools.partial(unipc, order=1), 2),
    "UniPC-3": (functools.partial(unipc, order=3), 4),
    "UniPC-3 bh1": (functools.partial(unipc, order=3, solver="bh1"), 4),
    **{f"UniP-{p}": (functools.partial(unipc, order=p, corrector=False), p) for p in (2, 3)},
}


@pytest.mark.parametrize("name", ORDERS)
def test_a_solver_is_of_its_order(name: str) -> None:
    """The error on Gaussian data as steps double, between two finite levels, with exact samples at the first nodes."""
    solver, order = ORDERS[name]
    schedule = process("scaled_linear")
    lam, errors = schedule.half_log_snr_table, []
    parameters = inspect.signature(solver).parameters
    for steps in (80, 160) if "start" in parameters else (20, 40):
        grid = schedule.time(torch.linspace(lam[600], lam[20], steps + 1, dtype=torch.float64))
        std = ((0.1 * schedule.alpha(grid)).square() + schedule.sigma(grid).square()).sqrt()
        exact = 2 * std / std[0]  # the flow keeps x in proportion to the marginal's deviation
        options = {"lower_final": False} if "lower_final" in parameters else {}
        if "start" in parameters:
            options["start"] = [exact[i].reshape(1, 1) for i in (1, 2, 3)]
        denoiser = Denoiser(schedule, "x0", gaussian_denoiser(schedule, 0.0, 0.1, "x0"))
        out = solver(denoiser, exact[0].reshape(1, 1), grid, drawn(steps, exact[:1]), **options)
        errors.append(abs(out.item() - exact[-1].item()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


def test_weights_of_adams_are_integrals() -> None:
    """Against the antiderivative of each Lagrange polynomial."""
    for count in (1, 2, 3, 4):
        levels = torch.tensor([0.3, 1.1, 2.7, 3.0, 7.4][: count + 1], dtype=torch.float64)
        nodes = levels[1:].numpy()
        for j, weight in enumerate(adams_weights(levels).tolist()):
            others = np.delete(nodes, j)
            integral = np.polynomial.Polynomial(np.atleast_1d(np.poly(others))[::-1]).integ()
            expected = (integral(0.3) - integral(1.1)) / np.prod(nodes[j] - others)
            assert weight == pytest.approx(expected, rel=1e-9)


# ---------------------------------------------------------------- callbacks, starts and refusals


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_sample_does_not_depend_on_those_beside_it(name: str) -> None:
    """Each alone, from its own noise, and all in one batch, one of them a hundred times as large."""
    schedule = process("linear")
    x, noise = (
        torch.randn(3, 2, dtype=torch.float64) * torch.tensor([[1.0], [100.0], [0.01]]),
        torch.randn(60, 3, 2, dtype=torch.float64),
    )
    denoiser, grid = Denoiser(schedule, "v", network(schedule, "v")), GRIDS["trailing"](schedule, 6)
    together = SAMPLERS[name].function(denoiser, x, grid, lambda i: noise[i])
    for k in range(3):
        alone = SAMPLERS[name].function(denoiser, x[k : k + 1], grid, lambda i, k=k: noise[i, k : k + 1])
        torch.testing.assert_close(alone, together[k : k + 1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_process_of_two_steps_is_drawn_from(name: str) -> None:
    """The fewest that a process has: on every grid, with every number of steps, also with no signal at the last."""
    for betas in ([0.1, 0.6], [0.1, 1.0]):
        schedule = Schedule(torch.tensor(betas))
        for spacing in GRIDS:
            for steps in range(SAMPLERS[name].fewest, 3):
                x = torch.randn(2, 3, dtype=torch.float64)
                denoiser = Denoiser(schedule, "v", network(schedule, "v"))
                assert (
                    SAMPLERS[name].function(denoiser, x, GRIDS[spacing](schedule, steps), drawn(12, x)).isfinite().all()
                )


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_sampler_goes_on_with_what_the_callback_returns(name: str) -> None:
    """The network is asked about it next; and where it always sees the same image, what follows depends on it alone."""
    schedule, grid = process("linear"), GRIDS["trailing"](process("linear"), 5)
    grid[-1] = 0
    nodes, x = Nodes.of(schedule, grid, torch.zeros(1)), torch.randn(2, 3, dtype=torch.float64)
    image, noise, given = torch.full_like(x, 0.3), drawn(30, x), torch.randn_like(x)
    told: list[tuple[int, Tensor, Tensor]] = []
    asked: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        asked.append(x)
        return image

    def callback(step: int, sample: Tensor, x0: Tensor) -> Tensor | None:
        told.append((step, sample, x0))
        if step == replaced:
            asked.clear()
            return given
        return None

    for replaced in range(5):
        told.clear()
        out = SAMPLERS[name].function(Denoiser(schedule, "x0", denoise), x, grid, noise, callback=callback)
        assert [step for step, _, _ in told] == [0, 1, 2, 3, 4] and all(torch.equal(x0, image) for _, _, x0 in told)
        if name != "annealed_langevin" or replaced == 4:  # it scales what it continues with
            assert (asked[0] is given) if replaced < 4 else (out is given)
        expected = given
        if not SAMPLERS[name].stochastic and name not in (
            "lms",
            "plms",
        ):  # these two remember the slopes of what was replaced
            for i in range(replaced + 1, 5):
                expected = (
                    nodes.alpha[i + 1] * image
                    + nodes.sigma[i + 1] * (expected - nodes.alpha[i] * image) / nodes.sigma[i]
                )
                torch.testing.assert_close(told[i][1], expected)


@pytest.mark.parametrize("solver", [dpmpp_2m, dpmpp_3m, dpmpp_3m_published, unipc, lms])
def test_exact_samples_take_the_place_of_the_first(solver: Callable[..., Tensor]) -> None:
    """The network is called on them, and they are not corrected: what follows depends on the last one alone."""
    schedule, x = process("linear"), torch.randn(2, 3, dtype=torch.float64)
    grid, start, image = (
        GRIDS["trailing"](schedule, 5),
        [torch.randn_like(x) for _ in range(2)],
        torch.full_like(x, 0.3),
    )
    asked: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        asked.append(x)
        return image

    solver(Denoiser(schedule, "x0", denoise), x, grid, drawn(5, x), start=start)
    assert len(asked) == 5 and all(torch.equal(a, b) for a, b in zip(asked[:3], [x, *start], strict=True))
    if solver is not lms:  # it remembers the slopes at the first two
        nodes = Nodes.of(schedule, grid, x)
        expected = nodes.alpha[3] * image + nodes.sigma[3] * (start[1] - nodes.alpha[2] * image) / nodes.sigma[2]
        torch.testing.assert_close(asked[3], expected)
    with pytest.raises(ValueError, match="start must hold at most 5 samples, one for each node after the first, got 6"):
        solver(Denoiser(schedule, "x0", denoise), x, grid, drawn(5, x), start=[x] * 6)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_bad_grid_is_refused(name: str) -> None:
    schedule, x = process("linear"), torch.zeros(1, 2)
    for nodes in (
        [math.nan, 5.0, -1.0],
        [9.0, math.nan, -1.0],
        [9.0, 5.0, math.nan],
        [5.0, 9.0, -1.0],
        [1000.0, 3.0, -1.0],
        [3.0],
    ):
        with pytest.raises(ValueError, match="a grid must fall from at most 999 to at least −1, got"):
            SAMPLERS[name].function(
                Denoiser(schedule, "v", network(schedule, "v")), x, torch.tensor(nodes), drawn(3, x)
            )


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        (ddim, {"eta": 1.1}, "eta must lie between 0 and 1, got 1.1"),
        (ddim, {"eta": -0.1}, "eta must lie between 0 and 1, got -0.1"),
        (ddim, {"eta": math.nan}, "eta must lie between 0 and 1, got nan"),
        (ddpm, {"variance": "small"}, "variance must be one of posterior, beta, learned, got 'small'"),
        (unipc, {"order": 4}, "order must be one of 1, 2, 3 and solver one of bh1, bh2, got 4 and 'bh2'"),
        (unipc, {"solver": "bh3"}, "order must be one of 1, 2, 3 and solver one of bh1, bh2, got 2 and 'bh3'"),
        (plms, {}, "plms needs at least 2 steps, got 1"),
    ],
)
def test_a_bad_option_is_refused(solver: Callable[..., Tensor], options: dict[str, Any], message: str) -> None:
    schedule, x = process("linear"), torch.zeros(1, 2)
    with pytest.raises(ValueError, match=message):
        solver(
            Denoiser(schedule, "v", network(schedule, "v")), x, GRIDS["trailing"](schedule, 1), drawn(1, x), **options
        )


def test_too_few_steps_for_a_sampler_are_refused_before_sampling() -> None:
    for name, sampler in SAMPLERS.items():
        check_sampling(SampleConfig(name, sampler.fewest), (64, 64), 1000, 8)
    with pytest.raises(ConfigError, match="steps must be at least 2 for the plms sampler, got 1"):
        check_sampling(SampleConfig("plms", 1), (64, 64), 1000, 8)


def check_ddim_calls(numbers: Iterable[int], schedule: Schedule) -> None:
    calls = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        return x

    for steps in numbers:
        calls.clear()
        ddim(
            Denoiser(schedule, "x0", denoise),
            torch.zeros(1, 1),
            GRIDS["trailing"](schedule, steps),
            drawn(0, torch.zeros(1)),
        )
        assert len(calls) == steps


def test_ddim_makes_as_many_calls_as_steps() -> None:
    check_ddim_calls((*range(1, 12), 37, 333), process("scaled_linear"))


@pytest.mark.slow
def test_ddim_makes_as_many_calls_as_steps_for_every_number() -> None:
    """Half a million steps, in a process without the type checks, which make them ten times slower."""
    here = os.path.dirname(os.path.abspath(__file__))
    code = "import test_solvers as t; t.check_ddim_calls(range(1, 1001), t.process('scaled_linear')); print('all')"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([os.path.dirname(os.path.dirname(here)), os.path.dirname(here), here]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "all\n", done.stderr
