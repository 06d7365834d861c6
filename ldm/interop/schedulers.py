"""scheduler_config.json: the process, the target and the sampler of a model in diffusers' words, and back."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ldm.config import GIVEN, ConfigError, SampleConfig, ScheduleConfig
from ldm.diffusion.schedule import Schedule
from ldm.interop.unet import DIFFUSERS_VERSION

OUR_SCHEDULER = "LatentDiffusionScheduler"  # a score target, which their schedulers do not know
THEIR_SCHEDULER = "DDIMScheduler"

_PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction", "score": "score"}  # the last is ours alone
_BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}  # of their DDIMScheduler
_BETAS = {"scaled_linear": (0.00085, 0.012)}  # published values of schedule.py; the others' are (1e-4, 0.02), or they have none
_VARIANCES = {"posterior": "fixed_small", "beta": "fixed_large", "learned": "learned_range"}

_WHOLE = {"trailing": "trailing", "leading": "leading", "linspace": "linspace"}
_FRACTIONAL = _WHOLE | {"linspace": "linspace_fractional"}
_POSITIVE = {"trailing": "trailing", "leading": "leading_positive", "linspace": "linspace_positive"}


@dataclass(frozen=True)
class _Reading:
    """A scheduler class: our sampler of the same steps, how its spacings are called here, and its defaults.

    ``only``: values of its own keys with which its steps are ours.
    """

    sampler: str
    grids: Mapping[str, str]
    spacing: str = "linspace"
    betas: tuple[float, float] = (1e-4, 0.02)
    only: Mapping[str, Any] = field(default_factory=dict)
    ends_clean: bool = True


_MULTISTEP = {"thresholding": False, "euler_at_final": False, "lower_order_final": True, "lambda_min_clipped": -float("inf")}
_UNIPC = {"solver_order": 2, "predict_x0": True, "solver_type": "bh2", "disable_corrector": [], "solver_p": None}
_CLASSES = {
    "DDIMScheduler": _Reading("ddim", _WHOLE, "leading", only={"thresholding": False}),
    "DDPMScheduler": _Reading("ddpm", _WHOLE, "leading", only={"thresholding": False}),
    "PNDMScheduler": _Reading("plms", _WHOLE, "leading", only={"skip_prk_steps": True}, ends_clean=False),
    "EulerDiscreteScheduler": _Reading("euler", _FRACTIONAL, only={"interpolation_type": "linear", "timestep_type": "discrete"}),
    "EulerAncestralDiscreteScheduler": _Reading("euler_ancestral", _FRACTIONAL),
    "HeunDiscreteScheduler": _Reading("heun", _FRACTIONAL, betas=(0.00085, 0.012)),
    "KDPM2DiscreteScheduler": _Reading("dpm2", _FRACTIONAL, betas=(0.00085, 0.012)),
    "LMSDiscreteScheduler": _Reading("lms", _FRACTIONAL),
    "DPMSolverMultistepScheduler": _Reading("dpmpp_2m", _POSITIVE, only=_MULTISTEP | {"solver_type": "midpoint"}),
    "UniPCMultistepScheduler": _Reading("unipc", _POSITIVE, only=_UNIPC | {"thresholding": False, "lower_order_final": True}),
}
_MULTISTEP_SAMPLERS = {
    ("dpmsolver++", 2): "dpmpp_2m",
    ("dpmsolver++", 3): "dpmpp_3m_published",
    ("sde-dpmsolver++", 2): "dpmpp_2m_sde",
}
_NEVER = {
    name: False for name in ("use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas", "use_dynamic_shifting")
}
_NEVER |= dict.fromkeys(("sigma_min", "sigma_max", "shift_terminal"))
_DEFAULTS = {"skip_prk_steps": False}  # where their default is not the value of ``only``
# Other keys of those classes. Clipping of x̂_0 is among them: their StableDiffusionPipeline switches it off, whatever the file says.
_KNOWN = {
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type", "rescale_betas_zero_snr",
    "timestep_spacing", "steps_offset", "set_alpha_to_one", "final_sigmas_type", "variance_type", "solver_order", "algorithm_type",
    "use_karras_sigmas", "clip_sample", "clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value", "flow_shift",
    "time_shift_type", "noise_sampler_seed", "skip_prk_steps",
}.union(_NEVER, *(reading.only for reading in _CLASSES.values()))  # fmt: skip


def scheduler_to_diffusers(schedule: ScheduleConfig, target: str, sample: SampleConfig | None = None) -> dict[str, Any]:
    """`scheduler/scheduler_config.json` of a DDIMScheduler with the same process, target and grid (of ``sample``; trailing for others).

    A process that has no name there is written as the table of its β. A score target carries our own class name.
    """
    sample = sample or SampleConfig()
    start, end = _BETAS.get(schedule.name, (1e-4, 0.02))
    named = schedule.name in _BETA_SCHEDULES and schedule.shift == 1.0
    betas = None if named else Schedule.from_config(schedule).betas.tolist()
    return {
        "_class_name": OUR_SCHEDULER if target == "score" else THEIR_SCHEDULER,
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": schedule.num_steps,
        "beta_schedule": _BETA_SCHEDULES.get(schedule.name, "linear"),
        "beta_start": start if schedule.beta_start is None else schedule.beta_start,
        "beta_end": end if schedule.beta_end is None else schedule.beta_end,
        "trained_betas": betas,
        "prediction_type": _PREDICTIONS[target],
        "timestep_spacing": sample.grid if sample.grid in _WHOLE else "trailing",
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": sample.end_clean,
        "rescale_betas_zero_snr": named and schedule.zero_terminal_snr,
    }


def scheduler_from_diffusers(layout: Mapping[str, Any]) -> tuple[ScheduleConfig, str]:
    """The schedule and target of a scheduler_config.json. Raises ConfigError naming what is not offered."""
    known = layout.get("_class_name", THEIR_SCHEDULER) in (*_CLASSES, OUR_SCHEDULER)
    if not known and not {"beta_schedule", "trained_betas"} & layout.keys():
        raise ConfigError(f"scheduler: a {layout['_class_name']} has no β of a noise schedule: such a process is not offered")
    for key in layout:
        if known and not key.startswith("_") and key not in _KNOWN:
            near = difflib.get_close_matches(key, _KNOWN, n=1)
            raise ConfigError(f"scheduler: unknown key {key}" + (f": did you mean {near[0]}?" if near else ""))
    names = {theirs: ours for ours, theirs in _BETA_SCHEDULES.items()} | {"sigmoid": "sigmoid"}  # of their DDPMScheduler
    targets = {theirs: ours for ours, theirs in _PREDICTIONS.items()}
    prediction, zero_terminal = layout.get("prediction_type", "epsilon"), layout.get("rescale_betas_zero_snr", False)
    if prediction not in targets:
        raise ConfigError(f"scheduler: prediction_type {prediction!r} is not offered")
    if (given := layout.get("trained_betas")) is not None:
        if len(given) != (steps := layout.get("num_train_timesteps", len(given))):
            raise ConfigError(f"scheduler: {len(given)} trained_betas, but num_train_timesteps is {steps}: they must be equal")
        return ScheduleConfig(GIVEN, len(given), betas=tuple(given), zero_terminal_snr=zero_terminal), targets[prediction]
    beta_schedule = layout.get("beta_schedule", "linear")
    if beta_schedule not in names:
        raise ConfigError(f"scheduler: beta_schedule {beta_schedule!r} is not offered")
    name = names[beta_schedule]
    reading = _CLASSES.get(layout.get("_class_name", ""))
    first, last = reading.betas if reading else (1e-4, 0.02)
    start, end = (None, None) if name == "cosine" else (layout.get("beta_start", first), layout.get("beta_end", last))
    schedule = ScheduleConfig(name, layout.get("num_train_timesteps", 1000), start, end, zero_terminal_snr=zero_terminal)
    return schedule, targets[prediction]


def sampler_from_diffusers(layout: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The fields of SampleConfig that draw as this scheduler does; and what of it cannot be had here, or None.

    Where something cannot be had, the fields are empty: our own defaults hold. The offset of leading grids is 1 whatever the
    file says, as their StableDiffusionPipeline has it.
    """
    name = layout.get("_class_name", THEIR_SCHEDULER)
    if name == OUR_SCHEDULER:
        return {}, None
    if name not in _CLASSES:
        return {}, f"{name} is not offered"
    reading = _CLASSES[name]
    for key, value in {**_NEVER, **reading.only}.items():
        if layout.get(key, _DEFAULTS.get(key, value)) != value:
            return {}, f"{name} with {key} = {layout.get(key, _DEFAULTS.get(key))} is not offered"
    spacing = layout.get("timestep_spacing", reading.spacing)
    if spacing not in reading.grids:
        return {}, f"timestep_spacing {spacing!r} is not offered"
    end = layout.get("final_sigmas_type", "zero") == "zero" and layout.get("set_alpha_to_one", reading.ends_clean)
    fields: dict[str, Any] = {
        "sampler": reading.sampler,
        "grid": "karras" if layout.get("use_karras_sigmas", False) else reading.grids[spacing],
        "end_clean": end,
    }
    if name == "DPMSolverMultistepScheduler":
        kind = (layout.get("algorithm_type", "dpmsolver++"), layout.get("solver_order", 2))
        if kind not in _MULTISTEP_SAMPLERS:
            return {}, f"{name} with algorithm_type {kind[0]} and solver_order {kind[1]} is not offered"
        fields["sampler"] = _MULTISTEP_SAMPLERS[kind]
    if name == "DDPMScheduler":
        variances = {theirs: ours for ours, theirs in _VARIANCES.items()}
        if (variance := layout.get("variance_type", "fixed_small")) not in variances:
            return {}, f"{name} with variance_type {variance} is not offered"
        fields["variance"] = variances[variance]
    return fields, None
