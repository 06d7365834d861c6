"""A scheduler exchanged by X.from_config(pipe.scheduler.config) draws as in diffusers, or is refused by name.

Compared with diffusers' classes: their steps with a closed-form network, from one start and noise, and our sampler with
the fields that are read from the file that X writes.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
from support.denoisers import network
from torch import Tensor

from ldm.config import ConfigError, SampleConfig
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.samplers.registry import SAMPLERS
from ldm.diffusion.schedule import Schedule
from ldm.interop.diffusers.scheduler_keys import KEYS, PROCESSES, READS, settings, unread
from ldm.interop.diffusers.schedulers import sampler_from_diffusers, scheduler_from_diffusers
from ldm.pipeline.checks import grid_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of diffusers
STEPS = 10  # a divisor of T: with others, DDIM's and PNDM's trailing steps end beside their own grid
# Stable Diffusion's schedule with a quarter of its steps: KDPM2DiscreteScheduler needs seconds to set up 1000.
PUBLISHED = {
    "num_train_timesteps": 250, "beta_start": 0.0034, "beta_end": 0.048, "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}  # fmt: skip
SOURCES: dict[str, dict[str, Any]] = {  # what is exchanged: with keys that the other classes must not obey, or must
    "DDIMScheduler": {"set_alpha_to_one": False, "clip_sample": True, "timestep_spacing": "trailing"},
    "DDPMScheduler": {
        "variance_type": "fixed_small_log",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
    },
    "PNDMScheduler": {"skip_prk_steps": True, "set_alpha_to_one": False},
    "EulerDiscreteScheduler": {
        "timestep_spacing": "leading",
        "final_sigmas_type": "sigma_min",
        "timestep_type": "continuous",
    },
    "EulerAncestralDiscreteScheduler": {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "HeunDiscreteScheduler": {"use_karras_sigmas": True, "clip_sample": True},
    "KDPM2DiscreteScheduler": {"prediction_type": "v_prediction"},
    "LMSDiscreteScheduler": {"prediction_type": "sample", "timestep_spacing": "leading"},
    "DPMSolverMultistepScheduler": {
        "solver_order": 3,
        "final_sigmas_type": "sigma_min",
        "algorithm_type": "sde-dpmsolver++",
    },
    "UniPCMultistepScheduler": {"solver_type": "bh2", "lower_order_final": True, "timestep_spacing": "trailing"},
}


def written(scheduler: Any, folder: Path) -> dict[str, Any]:
    """The file that a scheduler writes."""
    scheduler.save_pretrained(folder)
    return json.loads((folder / "scheduler_config.json").read_text())


def theirs(layout: dict[str, Any], target: str, start: Tensor, noise: Tensor, schedule: Schedule) -> Tensor:
    """The sample of diffusers' scheduler in its pipeline, in units of the variance-preserving process."""
    pipeline = {"steps_offset": 1, "clip_sample": False}
    scheduler = getattr(diffusers, layout["_class_name"]).from_config({**layout, **pipeline})
    scheduler.set_timesteps(STEPS)
    predict, drawn = network(schedule, target), iter(noise)
    exploding = hasattr(scheduler, "sigmas") and float(scheduler.init_noise_sigma) != 1.0
    x = start * (scheduler.sigmas.max() ** 2 + 1).sqrt() if exploding else start
    module = sys.modules[type(scheduler).__module__]
    with mock.patch.object(module, "randn_tensor", lambda *_, **__: next(drawn), create=True):
        for t in scheduler.timesteps:
            said = predict(scheduler.scale_model_input(x, t), t.double().expand(len(x)))
            x = scheduler.step(said, t, x).prev_sample
    return x


def ours(fields: dict[str, Any], target: str, start: Tensor, noise: Tensor, schedule: Schedule, whole: str) -> Tensor:
    """Our sample. ``whole``: of all calls or of those at nodes, the network is asked at the nearest whole t."""
    config = SampleConfig(**fields, steps=STEPS)
    sampler, predict = SAMPLERS[config.sampler], network(schedule, target)
    grid, options = grid_of(schedule, config), {name: getattr(config, name) for name in sampler.options}

    def asked(t: Tensor) -> Tensor:
        return t.round() if whole == "all" or (whole == "nodes" and bool(torch.isin(t, grid).all())) else t

    denoiser = Denoiser(schedule, target, lambda x, t: predict(x, asked(t)))
    return sampler.function(denoiser, start, grid, lambda i: noise[i], **options)


def whole_times(layout: dict[str, Any]) -> str:
    """At which calls the class asks the network at whole t on Karras' levels."""
    if not settings(layout).get("use_karras_sigmas"):
        return "none"
    name = layout["_class_name"]
    return {
        "KDPM2DiscreteScheduler": "nodes",
        "DPMSolverMultistepScheduler": "all",
        "UniPCMultistepScheduler": "all",
    }.get(name, "none")


def compare(layout: dict[str, Any]) -> str | None:
    """Compare both samples of a scheduler_config.json; returns what is not offered, then nothing is compared."""
    fields, missing = sampler_from_diffusers(layout)
    if missing is not None:
        assert fields == {}
        return missing
    config, target = scheduler_from_diffusers(layout)
    schedule = Schedule.from_config(config)
    generator = torch.Generator().manual_seed(0)
    start, noise = torch.randn(4, 3, generator=generator), torch.randn(STEPS, 4, 3, generator=generator)
    mine = ours(fields, target, start, noise, schedule, whole_times(layout))
    assert torch.allclose(mine, theirs(layout, target, start, noise, schedule), rtol=2e-4, atol=2e-4), (layout, fields)
    return None


REFUSED = {  # (class, key) → the values with which its steps are none of ours
    ("DDIMScheduler", "timestep_spacing"): ("linspace",),  # steps to t − T//S, which is not a node of that grid
    ("PNDMScheduler", "timestep_spacing"): ("linspace",),
    ("PNDMScheduler", "skip_prk_steps"): (False,),
    ("PNDMScheduler", "prediction_type"): ("v_prediction",),  # averages v
    ("EulerDiscreteScheduler", "final_sigmas_type"): ("sigma_min",),  # gives x/α, at the noise of t = 0
    ("EulerAncestralDiscreteScheduler", "prediction_type"): ("sample",),  # not implemented there, nor in the next
    ("KDPM2DiscreteScheduler", "prediction_type"): ("sample",),
    ("UniPCMultistepScheduler", "solver_order"): (3,),
    ("DPMSolverMultistepScheduler", "solver_order"): (3,),  # of the stochastic one
}


@pytest.mark.parametrize("target", READS)
@pytest.mark.parametrize("source", SOURCES)
def test_an_exchanged_scheduler_draws_as_diffusers_does(source: str, target: str, tmp_path: Path) -> None:
    """With the published settings, and with others that a folder spells out after it was written and read."""
    first, second = (getattr(diffusers, source)(**PUBLISHED, **settings) for settings in ({}, SOURCES[source]))
    second = type(second).from_config(written(second, tmp_path))
    for scheduler in (first, second):
        layout = written(getattr(diffusers, target).from_config(scheduler.config), tmp_path)
        refused = {key for (name, key), values in REFUSED.items() if name == target and layout[key] in values}
        if target == "DPMSolverMultistepScheduler" and layout["algorithm_type"] == "dpmsolver++":
            refused.clear()
        missing = compare(layout)
        assert (missing is None) == (not refused), missing
        assert missing is None or (missing.startswith(target) and any(f"{key} " in missing for key in refused)), missing


@pytest.mark.parametrize(
    "name", [name for name in READS if name != "PNDMScheduler"]
)  # its default has a start of Runge and Kutta
def test_what_a_file_leaves_out_is_the_default_of_its_class(name: str) -> None:
    for layout in ({"_class_name": name}, {"_class_name": name, **PUBLISHED}):
        assert compare(layout) is None


@pytest.mark.parametrize("name", READS)
def test_the_tables_of_keys_are_those_of_the_classes(name: str) -> None:
    cls = getattr(diffusers, name)
    signature = {key: p.default for key, p in inspect.signature(cls.__init__).parameters.items() if key != "self"}
    hidden = {
        key
        for key in ("sigma_min", "sigma_max")
        if key in READS[name] and f"self.config.{key}" in inspect.getsource(cls)
    }
    assert READS[name] == signature | dict.fromkeys(hidden - signature.keys())


def test_no_default_of_a_class_with_a_beta_schedule_is_refused_for_its_keys() -> None:
    """Of all schedulers of diffusers: the process is read, or none is offered, and that is said."""
    for name in sorted(dir(diffusers)):
        signature = (
            inspect.signature(getattr(diffusers, name).__init__).parameters if name.endswith("Scheduler") else {}
        )
        if name.startswith("Flax") or "beta_schedule" not in signature:
            continue
        layout = {
            "_class_name": name,
            **{key: p.default for key, p in signature.items() if key not in ("self", "kwargs")},
        }
        if "snr_shift_scale" in signature:
            with pytest.raises(ConfigError, match=f"a {name} has no β of a noise schedule"):
                scheduler_from_diffusers(layout)
            continue
        assert {key for key in layout if not key.startswith("_")} <= KEYS, name
        betas = signature["beta_start"].default if "beta_start" in signature else None
        for given in (layout, {key: layout[key] for key in ("_class_name", "beta_schedule")}):
            schedule, _ = scheduler_from_diffusers(given)
            assert schedule.num_steps == 1000 and schedule.beta_start in (betas, None), name


@pytest.mark.parametrize(
    ("name", "changes", "refused"),
    [
        (
            "EulerDiscreteScheduler",
            {"use_karras_sigmas": True, "timestep_spacing": "leading"},
            "timestep_spacing = leading",
        ),
        ("HeunDiscreteScheduler", {"use_karras_sigmas": True, "sigma_max": 9.0}, "sigma_max = 9.0"),
        ("HeunDiscreteScheduler", {"use_karras_sigmas": True}, None),
        ("KDPM2DiscreteScheduler", {"use_karras_sigmas": True}, None),
        ("LMSDiscreteScheduler", {"use_karras_sigmas": True, "sigma_min": None}, None),
        ("UniPCMultistepScheduler", {"use_karras_sigmas": True, "timestep_spacing": "leading"}, None),
        (
            "UniPCMultistepScheduler",
            {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
            "final_sigmas_type = sigma_min",
        ),
        ("UniPCMultistepScheduler", {"final_sigmas_type": "sigma_min"}, None),
        ("UniPCMultistepScheduler", {"solver_type": "midpoint"}, None),  # taken for bh2
        ("UniPCMultistepScheduler", {"solver_type": "bh1"}, "solver_type = bh1"),
        (
            "DPMSolverMultistepScheduler",
            {"solver_type": "bh2", "algorithm_type": "deis", "final_sigmas_type": "sigma_min"},
            None,
        ),
        ("DPMSolverMultistepScheduler", {"solver_order": 1}, None),
        ("DPMSolverMultistepScheduler", {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}, None),
        (
            "DPMSolverMultistepScheduler",
            {"euler_at_final": True, "lower_order_final": False},
            None,
        ),  # it ends at clean data
        (
            "DPMSolverMultistepScheduler",
            {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
            "euler_at_final = True",
        ),
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "lower_order_final": False}, "lower_order_final = False"),
        ("DPMSolverMultistepScheduler", {"variance_type": "learned_range"}, "variance_type = learned_range"),
        ("DDPMScheduler", {"variance_type": "fixed_large"}, "timestep_spacing = leading"),
        ("DDPMScheduler", {"variance_type": "fixed_large", "timestep_spacing": "linspace"}, None),
        ("DDPMScheduler", {"variance_type": None}, None),  # as exchanged for a DPMSolverMultistepScheduler
        ("DDPMScheduler", {"variance_type": "fixed_large_log"}, "variance_type = fixed_large_log"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, None),
        (
            "EulerDiscreteScheduler",
            {"timestep_type": "continuous", "prediction_type": "v_prediction"},
            "prediction_type = v_prediction",
        ),
        ("EulerDiscreteScheduler", {"prediction_type": "original_sample"}, None),
        ("EulerAncestralDiscreteScheduler", {"use_karras_sigmas": True}, None),  # does not read it
        ("DDIMScheduler", {"timestep_spacing": "linspace"}, "timestep_spacing = linspace"),
        (
            "PNDMScheduler",
            {"prediction_type": "v_prediction", "skip_prk_steps": True},
            "prediction_type = v_prediction",
        ),
    ],
)
def test_a_key_is_obeyed_where_its_class_reads_it(name: str, changes: dict[str, Any], refused: str | None) -> None:
    missing = compare({"_class_name": name, **PUBLISHED, **changes})
    assert (
        missing is None
        if refused is None
        else missing is not None and f"{name} with {refused} is not offered" in missing
    )


def test_zero_terminal_snr_is_that_of_classes_that_rescale() -> None:
    for name in READS:
        layout = {"_class_name": name, **PUBLISHED, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
        scheduler = getattr(diffusers, name).from_config(layout)
        schedule = Schedule.from_config(scheduler_from_diffusers(layout)[0])
        assert (schedule.alphas_cumprod[-1] == 0) == bool(scheduler.alphas_cumprod[-1] < 1e-4), name
        assert ("rescale_betas_zero_snr" in unread(layout)) == bool(schedule.alphas_cumprod[-1] > 0), name


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("beta_start", "0.00085", "beta_start must be a number, got '0.00085'"),
        ("beta_end", None, "beta_end must be a number, got 'None'"),
        ("beta_end", 1.5, "beta_end must lie between"),
        ("beta_start", float("nan"), "beta_start must lie between"),
        ("num_train_timesteps", 1000.0, "num_train_timesteps must be a whole number, got '1000.0'"),
        ("num_train_timesteps", True, "num_train_timesteps must be a whole number"),
        ("num_train_timesteps", 10**30, "num_train_timesteps must lie between 2 and 1000000"),
        ("num_train_timesteps", -5, "num_train_timesteps must lie between 2 and 1000000"),
        ("beta_schedule", ["linear"], "beta_schedule must be a name"),
        ("beta_schedule", "other", "beta_schedule 'other' is not offered"),
        ("prediction_type", {"a": 1}, "prediction_type must be a name"),
        ("trained_betas", "0.1", "trained_betas must be a list of numbers"),
        ("trained_betas", [0.1, "0.2"], "trained_betas must be a list of numbers"),
        ("trained_betas", [0.1, 1.2], "betas must lie strictly between 0 and 1"),
        ("trained_betas", [], "num_steps must lie between 2"),
        ("timestep_spacing", 3, "timestep_spacing must be a name"),
        ("_class_name", ["DDIMScheduler"], "_class_name must be a name"),
    ],
)
def test_values_of_wrong_types_are_one_line(key: str, value: Any, message: str) -> None:
    for name in (*READS, "TCDScheduler", "SomeScheduler"):
        with pytest.raises(ConfigError, match=r"^scheduler: ") as caught:
            layout = {"_class_name": name, "beta_schedule": "linear", key: value}
            sampler_from_diffusers(layout)
            scheduler_from_diffusers(layout)
        assert message in str(caught.value) and "\n" not in str(caught.value), name


def test_switches_are_true_or_false() -> None:
    with pytest.raises(ConfigError, match="set_alpha_to_one must be true or false, got 'false'"):
        sampler_from_diffusers({"_class_name": "DDIMScheduler", "set_alpha_to_one": "false"})
    assert (
        sampler_from_diffusers({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": None})[0]["grid"]
        == "linspace_fractional"
    )


def test_processes_of_classes_without_our_steps_are_those_of_diffusers() -> None:
    for name in PROCESSES:
        if hasattr(diffusers, name) and name not in (
            "UnCLIPScheduler",
            "DPMSolverSDEScheduler",
        ):  # the latter needs torchsde
            schedule = Schedule.from_config(
                scheduler_from_diffusers({"_class_name": name, "beta_schedule": "linear"})[0]
            )
            theirs = getattr(diffusers, name)(beta_schedule="linear").alphas_cumprod
            assert torch.allclose(schedule.alphas_cumprod.float(), theirs, rtol=1e-4), name
