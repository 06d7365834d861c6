"""scheduler_config.json: process, target and sampler in diffusers' keys, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm.config import GIVEN, ConfigError, SampleConfig, ScheduleConfig
from ldm.diffusion.consistency import TIMESTEP_SCALING
from ldm.diffusion.samplers.grids import LCM_NODES
from ldm.diffusion.schedule import Schedule
from ldm.interop.diffusers.scheduler_keys import PROCESSES, READS, check_keys, class_name, settings
from ldm.interop.diffusers.unet import DIFFUSERS_VERSION

OUR_SCHEDULER = "LatentDiffusionScheduler"  # the class name with one of OWN_TARGETS
DIFFUSERS_SCHEDULER = "DDIMScheduler"
LCM_SCHEDULER = "LCMScheduler"  # written where `lcm` is the model's sampler

OWN_TARGETS = ("score", "flow")  # diffusers lacks them, or has them with another process
_PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"} | {name: name for name in OWN_TARGETS}
_TARGETS = {name: target for target, name in _PREDICTIONS.items()}
_TARGETS["original_sample"] = "x0"  # EulerDiscreteScheduler's name
_BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
_SCHEDULES = {key: name for name, key in _BETA_SCHEDULES.items()}
_SCHEDULES["sigmoid"] = "sigmoid"  # read by DDPMScheduler, not by the DDIMScheduler that is written
_BETAS = {"scaled_linear": (0.00085, 0.012)}  # default ends in diffusion/schedule.py; (1e-4, 0.02) for the others
# As diffusers computes them: fixed_small_log equals fixed_small, and None has no effect.
_VARIANCES = {"fixed_small": "posterior", None: "posterior", "fixed_small_log": "posterior",
              "fixed_large": "beta", "learned_range": "learned"}  # fmt: skip

_WHOLE = {"trailing": "trailing", "leading": "leading", "linspace": "linspace"}
# With linspace, DDIM and PNDM step to t − T//S, which is not a node of that grid.
_ON_THE_GRID = {"trailing": "trailing", "leading": "leading"}
_FRACTIONAL = _WHOLE | {"linspace": "linspace_fractional"}
_SUBSET = dict.fromkeys(_WHOLE, "lcm")  # it does not read the key
_POSITIVE = {"trailing": "trailing", "leading": "leading_positive", "linspace": "linspace_positive"}


@dataclass(frozen=True)
class _Reading:
    """A scheduler class as it is read here.

    Attributes:
        sampler: our sampler with the same steps.
        grids: its timestep_spacing to the name of our grid.
        only: key to the values with which its steps equal ours.
    """

    sampler: str
    grids: Mapping[str, str]
    only: Mapping[str, tuple[Any, ...]]


_ANY = ("epsilon", "sample", "v_prediction")
_SIGMAS = {"use_exponential_sigmas": (False,), "use_beta_sigmas": (False,)}
_UNCLIPPED = {"thresholding": (False,), "prediction_type": _ANY}
_MULTISTEP = {**_SIGMAS, **_UNCLIPPED, "use_flow_sigmas": (False,), "final_sigmas_type": ("zero", "sigma_min")}
_CLASSES = {
    "DDIMScheduler": _Reading("ddim", _ON_THE_GRID, _UNCLIPPED),
    "DDPMScheduler": _Reading("ddpm", _WHOLE, {**_UNCLIPPED, "variance_type": tuple(_VARIANCES)}),
    # With v it averages v over steps with different α and σ, which is of first order; ours is of second.
    "PNDMScheduler": _Reading("plms", _ON_THE_GRID, {"skip_prk_steps": (True,), "prediction_type": ("epsilon",)}),
    "EulerDiscreteScheduler": _Reading(
        "euler", _FRACTIONAL,
        {**_SIGMAS, "prediction_type": (*_ANY, "original_sample"), "interpolation_type": ("linear",),
         "final_sigmas_type": ("zero",)},
    ),
    "EulerAncestralDiscreteScheduler": _Reading(
        "euler_ancestral", _FRACTIONAL, {"prediction_type": ("epsilon", "v_prediction")},
    ),
    "HeunDiscreteScheduler": _Reading("heun", _FRACTIONAL, {**_SIGMAS, "prediction_type": _ANY}),
    "KDPM2DiscreteScheduler": _Reading(
        "dpm2", _FRACTIONAL, {**_SIGMAS, "prediction_type": ("epsilon", "v_prediction")},
    ),
    "LMSDiscreteScheduler": _Reading("lms", _FRACTIONAL, {**_SIGMAS, "prediction_type": _ANY}),
    "DPMSolverMultistepScheduler": _Reading(
        "dpmpp_2m", _POSITIVE,
        {**_MULTISTEP, "use_lu_lambdas": (False,), "lambda_min_clipped": (-float("inf"),),
         "solver_type": ("midpoint", "logrho", "bh1", "bh2")},  # all but heun mean midpoint
    ),
    "UniPCMultistepScheduler": _Reading(
        "unipc", _POSITIVE,
        {**_MULTISTEP, "solver_order": (2,), "predict_x0": (True,), "disable_corrector": ([],), "solver_p": (None,),
         "lower_order_final": (True,), "use_dynamic_shifting": (False,),
         "solver_type": ("bh2", "midpoint", "heun", "logrho")},  # all but bh1 mean bh2
    ),
    LCM_SCHEDULER: _Reading(
        "lcm", _SUBSET, {**_UNCLIPPED, "timestep_scaling": (TIMESTEP_SCALING,)},
    ),
}  # fmt: skip
_MULTISTEP_SAMPLERS = {
    ("dpmsolver++", 1): "ddim",
    ("dpmsolver++", 2): "dpmpp_2m",
    ("dpmsolver++", 3): "dpmpp_3m_published",
    ("sde-dpmsolver++", 1): "dpmpp_sde",
    ("sde-dpmsolver++", 2): "dpmpp_2m_sde",
}


def scheduler_to_diffusers(schedule: ScheduleConfig, target: str, sample: SampleConfig | None = None) -> dict[str, Any]:
    """`scheduler/scheduler_config.json` of a DDIMScheduler with the same process and target.

    Of an LCMScheduler where the sampler of ``sample`` is lcm: its grid is always ``lcm``. The grid
    is else that of ``sample``, or trailing where DDIMScheduler lacks it. A process without a
    name in diffusers is written as its table of β, OWN_TARGETS under our own class name.
    """
    sample = sample or SampleConfig()
    start, end = _BETAS.get(schedule.name, (1e-4, 0.02))
    named = schedule.name in _BETA_SCHEDULES and schedule.shift == 1.0
    betas = None if named else Schedule.from_config(schedule).betas.tolist()
    lcm = sample.sampler == "lcm"
    name = LCM_SCHEDULER if lcm else DIFFUSERS_SCHEDULER
    return {
        "_class_name": OUR_SCHEDULER if target in OWN_TARGETS else name,
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": schedule.num_steps,
        "beta_schedule": _BETA_SCHEDULES.get(schedule.name, "linear"),
        "beta_start": start if schedule.beta_start is None else schedule.beta_start,
        "beta_end": end if schedule.beta_end is None else schedule.beta_end,
        "trained_betas": betas,
        "prediction_type": _PREDICTIONS[target],
        "timestep_spacing": sample.grid if sample.grid in _ON_THE_GRID else "trailing",
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": sample.end_clean,
        "rescale_betas_zero_snr": named and schedule.zero_terminal_snr,
        **({"original_inference_steps": min(LCM_NODES, schedule.num_steps)} if lcm else {}),
    }


def scheduler_from_diffusers(layout: Mapping[str, Any]) -> tuple[ScheduleConfig, str]:
    """The schedule and target of a scheduler_config.json.

    Raises ConfigError naming what is wrong or not offered.
    """
    name = class_name(layout)
    if name in (*READS, OUR_SCHEDULER):
        check_keys(layout)
    elif "snr_shift_scale" in layout or (
        name not in PROCESSES and not {"beta_schedule", "trained_betas"} & layout.keys()
    ):
        raise ConfigError(f"scheduler: a {name} has no β of a noise schedule: such a process is not offered")
    values = settings(layout)
    if (prediction := values["prediction_type"]) not in _TARGETS:
        raise ConfigError(f"scheduler: prediction_type {prediction!r} is not offered")
    try:
        schedule = _schedule(values, "num_train_timesteps" in layout)
        Schedule.from_config(schedule)
    except ValueError as error:
        message = str(error)
        raise ConfigError(message if message.startswith("scheduler: ") else f"scheduler: {message}") from None
    return schedule, _TARGETS[prediction]


def _schedule(values: Mapping[str, Any], counted: bool) -> ScheduleConfig:
    """The schedule of a file's settings. ``counted``: true if the file gives the number of steps.

    Raises ConfigError.
    """
    steps, betas = values["num_train_timesteps"], values["trained_betas"]
    zero_terminal = values.get("rescale_betas_zero_snr", False)
    if betas is not None:
        if counted and len(betas) != steps:
            raise ConfigError(
                f"scheduler: {len(betas)} trained_betas, but num_train_timesteps is {steps}: they must be equal"
            )
        return ScheduleConfig(GIVEN, len(betas), betas=tuple(betas), zero_terminal_snr=zero_terminal)
    if (name := _SCHEDULES.get(values["beta_schedule"])) is None:
        raise ConfigError(f"scheduler: beta_schedule {values['beta_schedule']!r} is not offered")
    start, end = (None, None) if name == "cosine" else (values["beta_start"], values["beta_end"])
    return ScheduleConfig(name, steps, start, end, zero_terminal_snr=zero_terminal)


def blind_end(layout: Mapping[str, Any]) -> str | None:
    """A remark on a model that predicts ε or the score where no signal is left, or None.

    Raises ConfigError.
    """
    schedule, target = scheduler_from_diffusers(layout)
    if not schedule.blind_at_the_end(target):
        return None
    return (
        f"predicts {target} where its schedule leaves no signal:"
        " nothing can be drawn from the last step, only from grids below it"
    )


def sampler_from_diffusers(layout: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The SampleConfig fields that draw as this scheduler does, or {} and why it is not offered.

    Keys that diffusers' StableDiffusionPipeline overrides are not read: the offset of leading grids
    is 1, and x̂_0 is not clipped. Raises ConfigError for a value of a wrong type.
    """
    if (name := class_name(layout)) == OUR_SCHEDULER:
        return {}, None
    if name not in _CLASSES:
        return {}, f"{name} is not offered"
    reading, values = _CLASSES[name], settings(layout)

    # Values with which its steps are not ours.
    grids = {"timestep_spacing": tuple(reading.grids)}
    for key, allowed in {**grids, **reading.only, **_with_others(name, values)}.items():
        if values[key] not in allowed:
            return {}, f"{name} with {key} = {values[key]} is not offered (the nearest is sampler {reading.sampler})"

    # Our settings.
    fields: dict[str, Any] = {
        "sampler": reading.sampler,
        "grid": "karras" if values.get("use_karras_sigmas") else reading.grids[values["timestep_spacing"]],
        "end_clean": values.get("final_sigmas_type", "zero") == "zero" and values.get("set_alpha_to_one", True),
    }
    if name == "DPMSolverMultistepScheduler":
        kind = (values["algorithm_type"].replace("deis", "dpmsolver++"), values["solver_order"])
        if kind not in _MULTISTEP_SAMPLERS:
            return {}, f"{name} with algorithm_type {kind[0]} and solver_order {kind[1]} is not offered"
        fields["sampler"] = _MULTISTEP_SAMPLERS[kind]
    if name == LCM_SCHEDULER:
        fields["end_clean"] = True
    if name == "DDPMScheduler":
        fields["variance"] = _VARIANCES[values["variance_type"]]
    return fields, None


def _with_others(name: str, values: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Key to the values with which steps equal ours, where that depends on other keys."""
    only: dict[str, tuple[Any, ...]] = {}
    multistep = "solver_order" in values
    if values.get("use_karras_sigmas"):
        only |= {"sigma_min": (None,), "sigma_max": (None,)}
        if multistep:
            only["final_sigmas_type"] = ("zero",)  # otherwise their last step has length 0
        else:
            only["timestep_spacing"] = ("linspace",)  # otherwise their Karras levels span that grid's ends
    if values.get("timestep_type") == "continuous":
        only["prediction_type"] = ("epsilon", "sample")  # with v they give the network log σ instead of t
    if name == LCM_SCHEDULER:
        t = values["num_train_timesteps"]
        nodes = min(LCM_NODES, t)
        only |= {"original_inference_steps": (nodes,), "num_train_timesteps": (t - t % nodes,)}
    if name == "DDPMScheduler" and values["variance_type"] in ("fixed_large", "learned_range"):
        only["timestep_spacing"] = ("linspace",)  # otherwise they add noise in the last step too
    if name == "DPMSolverMultistepScheduler":
        # With a learned variance they cut off all but three channels.
        only["variance_type"] = tuple({values["variance_type"]} - {"learned", "learned_range"})
        if values["final_sigmas_type"] == "sigma_min":  # the last step to clean data is of first order in any case
            only |= {"lower_order_final": (True,), "euler_at_final": (False,)}
        elif values["solver_order"] > 2:
            only["lower_order_final"] = (True,)
    return only
