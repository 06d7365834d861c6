"""The keys of a scheduler_config.json that its class reads, with their defaults and types.

``X.from_config(other.config)`` leaves the other class's keys in the file that X writes, but X does
not read them: a key that is not in the table of a class has no effect. A test compares the tables
with the classes' ``__init__``.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from ldm.config import ConfigError

MOST_STEPS = 1_000_000  # upper limit for the forward process
DEFAULT_CLASS = "DDIMScheduler"

_PROCESS = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
    "steps_offset": 0,
}
_ZERO = {"rescale_betas_zero_snr": False}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_RANGE = {"sigma_min": None, "sigma_max": None}  # some classes read these keys though their __init__ lacks them
_SOLVER = {
    "solver_order": 2,
    "lower_order_final": True,
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "final_sigmas_type": "zero",
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}
_LARGER_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}

READS: dict[str, dict[str, Any]] = {  # classes with a sampler here
    "DDIMScheduler": {
        **_PROCESS, **_ZERO, **_CLIP, **_THRESHOLD, "timestep_spacing": "leading", "set_alpha_to_one": True,
    },
    "DDPMScheduler": {
        **_PROCESS, **_ZERO, **_CLIP, **_THRESHOLD, "timestep_spacing": "leading", "variance_type": "fixed_small",
    },
    "PNDMScheduler": {**_PROCESS, "timestep_spacing": "leading", "set_alpha_to_one": False, "skip_prk_steps": False},
    "EulerDiscreteScheduler": {
        **_PROCESS, **_ZERO, **_SIGMAS, **_RANGE,
        "interpolation_type": "linear", "timestep_type": "discrete", "final_sigmas_type": "zero",
    },
    "EulerAncestralDiscreteScheduler": {**_PROCESS, **_ZERO},
    "HeunDiscreteScheduler": {**_PROCESS, **_LARGER_BETAS, **_SIGMAS, **_RANGE, **_CLIP, "clip_sample": False},
    "KDPM2DiscreteScheduler": {**_PROCESS, **_LARGER_BETAS, **_SIGMAS, **_RANGE},
    "LMSDiscreteScheduler": {**_PROCESS, **_SIGMAS, **_RANGE},
    "DPMSolverMultistepScheduler": {
        **_PROCESS, **_ZERO, **_THRESHOLD, **_SIGMAS, **_RANGE, **_SOLVER,
        "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "euler_at_final": False, "use_lu_lambdas": False,
        "lambda_min_clipped": -float("inf"), "variance_type": None,
    },
    "UniPCMultistepScheduler": {
        **_PROCESS, **_ZERO, **_THRESHOLD, **_SIGMAS, **_RANGE, **_SOLVER,
        "solver_type": "bh2", "predict_x0": True, "disable_corrector": [], "solver_p": None, "shift_terminal": None,
    },
    "LCMScheduler": {
        **_PROCESS, **_ZERO, **_CLIP, **_THRESHOLD, **_LARGER_BETAS,
        "beta_schedule": "scaled_linear", "clip_sample": False, "timestep_spacing": "leading", "set_alpha_to_one": True,
        "original_inference_steps": 50, "timestep_scaling": 10.0,
    },
}  # fmt: skip
PROCESSES: dict[str, dict[str, Any]] = {  # other classes, of which only the process is read
    "DEISMultistepScheduler": _PROCESS,
    "DPMSolverSinglestepScheduler": _PROCESS,
    "SASolverScheduler": _PROCESS,
    "RePaintScheduler": _PROCESS,
    "KDPM2AncestralDiscreteScheduler": {**_PROCESS, **_LARGER_BETAS},
    "DPMSolverSDEScheduler": {**_PROCESS, **_LARGER_BETAS},
    "TCDScheduler": {**_PROCESS, **_ZERO, **_LARGER_BETAS, "beta_schedule": "scaled_linear"},
    "UnCLIPScheduler": {**_PROCESS, "beta_schedule": "squaredcos_cap_v2"},
}
_ANY_PROCESS = {**_PROCESS, **_ZERO}
_OTHERS = {  # further keys of diffusers' classes with a β schedule
    "sigma_data", "sigma_schedule", "rho", "noise_sampler_seed", "eta",
    "predictor_order", "corrector_order", "tau_func", "variance_type", "snr_shift_scale", "set_alpha_to_one",
    "clip_sample", "invert_sigmas",
}  # fmt: skip
KEYS = _OTHERS.union(*READS.values())

_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a name",
    list: "a list of numbers",
}
_NONE_FOR = {
    "trained_betas": list,
    "sigma_min": float,
    "sigma_max": float,
    "shift_terminal": float,
    "variance_type": str,
    "solver_p": str,
}


def class_name(layout: Mapping[str, Any]) -> str:
    """The scheduler's class. Raises ConfigError if the file has something else than a name."""
    return _typed("_class_name", layout.get("_class_name", DEFAULT_CLASS), DEFAULT_CLASS)


def settings(layout: Mapping[str, Any]) -> dict[str, Any]:
    """Every key that the scheduler's class reads, from the file or by default.

    Raises ConfigError for a wrong type.
    """
    name = class_name(layout)
    table = READS.get(name) or PROCESSES.get(name) or _ANY_PROCESS
    values = {key: _typed(key, layout[key], default) if key in layout else default for key, default in table.items()}
    if not 2 <= (steps := values["num_train_timesteps"]) <= MOST_STEPS:
        raise ConfigError(f"scheduler: num_train_timesteps must lie between 2 and {MOST_STEPS}, got {str(steps)[:20]}")
    return values


def unread(layout: Mapping[str, Any]) -> list[str]:
    """Keys of the file that its class does not read, left over from another class."""
    table = READS.get(class_name(layout))
    return [] if table is None else [key for key in layout if key not in table and not key.startswith("_")]


def check_keys(layout: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key that no scheduler has, with the most similar one."""
    for key in layout:
        if key not in KEYS and not key.startswith("_"):
            near = difflib.get_close_matches(key, KEYS, n=1)
            raise ConfigError(f"scheduler: unknown key {key}" + (f": did you mean {near[0]}?" if near else ""))


def _typed(key: str, value: Any, default: Any) -> Any:
    """The value, of the type of its default. Raises ConfigError for another type.

    Null is accepted where diffusers accepts it: as false, and for keys that may be None.
    """
    kind = _NONE_FOR.get(key) or type(default)
    if value is None and (kind is bool or key in _NONE_FOR):
        return False if kind is bool else None
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits or (isinstance(value, list) and not all(type(item) in (int, float) for item in value)):
        raise ConfigError(f"scheduler: {key} must be {_KINDS[kind]}, got {str(value)[:60]!r}")
    return value
