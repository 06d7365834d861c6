"""Every solver against diffusers' schedulers, against each other where they must agree, and its order, calls and refusals."""

import copy
import functools
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
from denoisers import gaussian_denoiser, network, their_scheduler
from torch import Tensor

from ldm.config import SCHEDULES, TARGETS, ConfigError, SampleConfig, ScheduleConfig
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.samplers.ancestral import ddim, ddpm
from ldm.diffusion.samplers.dpm_solver import dpmpp_2m, dpmpp_2m_sde, dpmpp_2s, dpmpp_3m, dpmpp_3m_published, dpmpp_sde
from ldm.diffusion.samplers.edm import adams_weights, dpm2, euler, euler_ancestral, heun, lms
from ldm.diffusion.samplers.grids import GRIDS
from ldm.diffusion.samplers.path import Path
from ldm.diffusion.samplers.pndm import plms
from ldm.diffusion.samplers.registry import SAMPLERS
from ldm.diffusion.samplers.unipc import unipc
from ldm.diffusion.schedule import Schedule
from ldm.pipeline import check_sampling

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
    """Our grid of a scheduler after set_timesteps: its whole t, or where it has Karras' levels, whose t it may round, ours."""
    t = theirs.timesteps.double()
    nodes = GRIDS[spacing](schedule, steps)[:-1]
    if isinstance(theirs, diffusers.HeunDiscreteScheduler | diffusers.KDPM2DiscreteScheduler):  # they list a middle or an end as well
        t = torch.cat([t[:1], t[2::2]])
    if spacing == "karras":
        assert (t - nodes).abs().max() < 1
    elif spacing == "trailing" or isinstance(theirs, VARIANCE_EXPLODING):  # the others space S + 1 nodes and leave out one
        assert t.tolist() == nodes.tolist()
    else:
        nodes = t
    return torch.cat([nodes, nodes.new_tensor([end])])


VARIANCE_EXPLODING = (  # they hold x/α
    diffusers.EulerDiscreteScheduler, diffusers.EulerAncestralDiscreteScheduler, diffusers.HeunDiscreteScheduler,
    diffusers.KDPM2DiscreteScheduler, diffusers.LMSDiscreteScheduler,
)  # fmt: skip


def in_float64(theirs: Any, path: Path) -> Tensor:
    """Put float64 in place of a scheduler's float32 levels, which must be equal to rounding. Returns the level of each call."""
    levels = expanded = path.level
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
    denoise, path = network(schedule, target), Path.of(schedule, grid, x)
    if hasattr(theirs, "sigmas"):
        asked = [schedule.time(-torch.log(level)) for level in in_float64(theirs, path)]
    else:
        asked = list(theirs.timesteps)
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(0)  # or they look for the first of rounded t, which may be there twice
    explodes = isinstance(theirs, VARIANCE_EXPLODING)
    sample = x / path.alpha[0].to(x.dtype) if explodes else x
    for i, t in enumerate(theirs.timesteps):
        model_input = theirs.scale_model_input(sample, t)
        more = {name: value(i) for name, value in step.items()}
        sample = theirs.step(denoise(model_input, asked[i].expand(len(x))), t, sample, **more).prev_sample
    return sample * path.alpha[-1].to(x.dtype) if explodes else sample


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
            unipc, {"order": p, "solver": kind}, diffusers.UniPCMultistepScheduler, {"solver_order": p, "solver_type": kind}, ALL, True
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
        return their_scheduler(cls, process(kind, zero_terminal), ScheduleConfig(kind, zero_terminal_snr=zero_terminal), "eps", **fixed)


def compare(
    pair: str, kind: str, target: str, spacing: str, steps: int, monkeypatch: pytest.MonkeyPatch, zero_terminal: bool = False,
    options: dict[str, Any] | None = None, **settings: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What ours and theirs end with, from the same start and noise; theirs with further ``settings``, ours with ``options``."""
    ours, chosen, cls, fixed, _, _ = PAIRS[pair]
    schedule, theirs = process(kind, zero_terminal), copy.deepcopy(constructed(pair, kind, zero_terminal))
    prediction = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[target]
    layout = {"timestep_spacing": spacing} if spacing != "karras" else {"use_karras_sigmas": True, "timestep_spacing": "linspace"}
    theirs.register_to_config(prediction_type=prediction, steps_offset=1, **layout, **settings)
    if zero_terminal:
        theirs.alphas_cumprod[-1] = schedule.least_signal
    if cls is diffusers.DPMSolverSinglestepScheduler and spacing != "karras":  # it has one spacing of its own, and takes any
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
    return ours(Denoiser(schedule, target, network(schedule, target)), x, grid, noise, **chosen, **(options or {})), expected


def assert_same(found: tuple[Tensor, Tensor]) -> None:
    assert found[1].abs().max() > 0.1
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


CASES = {  # schedule: spacing and steps; linspace is where its nodes are whole, which is for others than those that hold x/α 9 steps
    "linear": (("trailing", 2), ("trailing", 20)),
    "scaled_linear": (("trailing", 1), ("leading", 10), ("linspace", 10), ("karras", 6)),
    "cosine": (("trailing", 5), ("karras", 16)),
}


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("pair", PAIRS)
def test_a_solver_is_that_of_diffusers(pair: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps and many, their three spacings and Karras' levels, every prediction they offer."""
    _, _, cls, _, predictions, has_karras = PAIRS[pair]
    for spacing, steps in CASES[kind]:
        if spacing == "karras" and not has_karras:
            continue
        steps = 9 if spacing == "linspace" and cls not in VARIANCE_EXPLODING else steps
        for target in predictions:
            end = {}
            if "bh1" in pair:  # theirs is NaN at clean data
                end = {"final_sigmas_type": "sigma_min"}
                if spacing == "karras":
                    continue  # theirs then takes a last step of no length
            assert_same(compare(pair, kind, target, spacing, steps, monkeypatch, **end))


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("pair", ["2M", "3M", "2S", "SDE-2M", "UniPC-2-bh2", "UniPC-3-bh1", "UniPC-3-bh2"])
def test_the_end_above_clean_data_is_that_of_diffusers(pair: str, lower: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the smallest level of the schedule, with and without lower last orders, on both sides of 15 steps."""
    for steps in (6, 16):
        settings = {"final_sigmas_type": "sigma_min", "lower_order_final": lower}
        assert_same(compare(pair, "scaled_linear", "v", "trailing", steps, monkeypatch, options={"lower_final": lower}, **settings))


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
            diffusers.PNDMScheduler, schedule, ScheduleConfig(kind), "eps", skip_prk_steps=True, timestep_spacing=spacing
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
        torch.testing.assert_close(plms(Denoiser(schedule, "eps", denoise), x, grid, drawn(steps, x)), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_ddim_ends_where_stable_diffusion_does(kind: str) -> None:
    """set_alpha_to_one false: at ᾱ[0], for us a grid that ends at t = 0."""
    schedule = process(kind)
    theirs = their_scheduler(
        diffusers.DDIMScheduler, schedule, ScheduleConfig(kind), "v", set_alpha_to_one=False, timestep_spacing="leading", steps_offset=1
    )
    theirs.final_alpha_cumprod = schedule.alphas_cumprod[0]
    theirs.set_timesteps(20)
    grid = GRIDS["leading"](schedule, 20)
    grid[-1] = 0
    x, denoise = torch.randn(3, 8, dtype=torch.float64), network(schedule, "v")
    expected = x
    for t in theirs.timesteps:
        expected = theirs.step(denoise(expected, t.expand(3)), t, expected).prev_sample
    torch.testing.assert_close(ddim(Denoiser(schedule, "v", denoise), x, grid, drawn(20, x)), expected, rtol=1e-6, atol=1e-7)
