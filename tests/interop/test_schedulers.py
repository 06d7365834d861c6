"""scheduler_config.json of a foreign folder: read as our sampler, which then draws what diffusers draws with it."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from support.pipelines import LATENT, PROMPTS, array, make, noise, theirs

from ldm.cli.main import main
from ldm.config import GRIDS, SAMPLERS, ConfigError, SampleConfig, ScheduleConfig
from ldm.diffusion.schedule import Schedule
from ldm.interop.diffusers.schedulers import sampler_from_diffusers, scheduler_from_diffusers, scheduler_to_diffusers
from ldm.pipeline import Pipeline

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # of diffusers with numpy 2
STEPS = 12
PUBLISHED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
DETERMINISTIC: dict[str, dict[str, Any]] = {  # class and settings → sampler, grid and end that they mean here
    "DDIMScheduler": {"clip_sample": False, "set_alpha_to_one": False},
    "PNDMScheduler": {"skip_prk_steps": True},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
}
NOISY_END = {"trained_betas": [0.03] + [1e-3] * 999, "set_alpha_to_one": False}  # noise of t = 0 that shows
VARIANCE_EXPLODING = (
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as others write it: without our own file."""
    folder = tmp_path_factory.mktemp("foreign") / "model"
    make("eps").save_pretrained(folder)
    (folder / "ldm.json").unlink()
    return folder


def give(folder: Path, name: str, settings: dict[str, Any]) -> Any:
    """Put a scheduler of that class into the folder; returns it."""
    scheduler = getattr(diffusers, name)(**settings)
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", name]}))
    return scheduler


def difference(folder: Path, name: str, settings: dict[str, Any], **call: Any) -> int:
    """The largest difference of a pixel, 0 to 255, between diffusers' pictures and ours of one folder."""
    give(folder, name, settings)
    ours, pipeline = Pipeline.from_pretrained(folder), theirs(folder)
    start = noise(3, len(PROMPTS))
    if name in VARIANCE_EXPLODING and pipeline.scheduler.config.timestep_spacing != "leading":
        pipeline.scheduler.set_timesteps(
            STEPS
        )  # they start from σ times noise, which is less than their own marginal, √(σ² + 1)
        start = start * float((pipeline.scheduler.sigmas.max() ** 2 + 1) ** 0.5 / pipeline.scheduler.init_noise_sigma)
    expected = array(pipeline(PROMPTS, latents=start, num_inference_steps=STEPS, guidance_scale=2.0).images)
    return int(abs(array(ours(PROMPTS, steps=STEPS, guidance_scale=2.0, seed=3, **call)) - expected).max())


# but for linspace of the first two: theirs then step to t − T//S, which is not a node of their grid
SPACINGS = [
    (name, s)
    for i, name in enumerate(DETERMINISTIC)
    for s in ("leading", "trailing", "linspace")
    if i > 1 or s != "linspace"
]


@pytest.mark.parametrize(("name", "spacing"), SPACINGS)
@pytest.mark.filterwarnings("ignore:heun on the|plms on the")
def test_a_folder_draws_as_its_scheduler_says(written: Path, name: str, spacing: str) -> None:
    settings = {**PUBLISHED, **DETERMINISTIC[name], "timestep_spacing": spacing}
    assert difference(written, name, settings) <= 1


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (
            "DDIMScheduler",
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        ),
        ("DDIMScheduler", {"trained_betas": np.linspace(1e-4, 0.03, 600).tolist(), "num_train_timesteps": 600}),
        ("DDIMScheduler", {"prediction_type": "sample", "timestep_spacing": "leading"}),
        ("DDIMScheduler", {"clip_sample": False, **NOISY_END}),
        ("PNDMScheduler", {"skip_prk_steps": True, **NOISY_END}),
        ("DDIMScheduler", {"steps_offset": 0, "clip_sample": True}),  # which their pipeline sets to 1 and False
        ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True, "prediction_type": "epsilon"}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "timestep_spacing": "leading"}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "prediction_type": "v_prediction"}),
        ("UniPCMultistepScheduler", {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    ],
)
def test_settings_of_a_scheduler_are_honoured(written: Path, name: str, settings: dict[str, Any]) -> None:
    rounded = settings.get("use_karras_sigmas") and name.startswith("DPM")  # they give the network the nearest whole t
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what their pipeline rewrites
        assert difference(written, name, {**PUBLISHED, **settings}) <= (3 if rounded else 1)


@pytest.mark.parametrize("steps", [1, 2, 4, 6])
def test_a_model_for_lcm_draws_in_diffusers_as_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """From the same noise, at the start and at each step, by the scheduler of the folder that is written."""
    few = SampleConfig("lcm", steps, 1.0, grid="lcm", seed=3)
    model = dataclasses.replace(make("v"), defaults=few)
    model.save_pretrained(tmp_path / "model", for_diffusers=True)
    pipeline = theirs(tmp_path / "model")
    assert type(pipeline.scheduler).__name__ == "LCMScheduler"
    drawn = (noise(3, len(PROMPTS), f"step {i}") for i in range(steps))
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: next(drawn))
    call = {"latents": noise(3, len(PROMPTS)), "num_inference_steps": steps, "guidance_scale": 1.0}
    expected = array(pipeline(PROMPTS, **call).images)
    assert abs(array(Pipeline.from_pretrained(tmp_path / "model")(PROMPTS)) - expected).max() <= 1
    (tmp_path / "model/ldm.json").unlink()  # as others write it
    read = Pipeline.from_pretrained(tmp_path / "model")
    assert (read.defaults.sampler, read.defaults.grid, read.defaults.end_clean) == ("lcm", "lcm", True)
    assert abs(array(read(PROMPTS, steps=steps, guidance_scale=1.0, seed=3)) - expected).max() <= 1


def test_the_settings_matter(written: Path) -> None:
    """The comparison would see another sampler, another grid, another end."""
    settings = {**PUBLISHED, **DETERMINISTIC["DDIMScheduler"]}
    for other in ({"sampler": "dpmpp_2m"}, {"grid": "trailing"}, {"grid_offset": 40}, {"sampler": "heun"}):
        assert difference(written, "DDIMScheduler", settings, **other) > 1, other
    assert difference(written, "DDIMScheduler", {**settings, "prediction_type": "v_prediction"}) <= 1
    assert difference(written, "DDIMScheduler", {**settings, **NOISY_END}, end_clean=True) > 1


@pytest.mark.parametrize(
    ("name", "settings", "sampler"),
    [
        (
            "DDPMScheduler",
            {"variance_type": "fixed_large", "timestep_spacing": "linspace"},
            {"sampler": "ddpm", "variance": "beta"},
        ),
        (
            "EulerAncestralDiscreteScheduler",
            {"timestep_spacing": "trailing"},
            {"sampler": "euler_ancestral", "grid": "trailing"},
        ),
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver++"},
            {"sampler": "dpmpp_2m_sde", "grid": "linspace_positive"},
        ),
        ("UniPCMultistepScheduler", {"final_sigmas_type": "sigma_min"}, {"sampler": "unipc", "end_clean": False}),
        ("EulerDiscreteScheduler", {}, {"sampler": "euler", "grid": "linspace_fractional", "end_clean": True}),
        ("DDPMScheduler", {"timestep_spacing": "linspace"}, {"sampler": "ddpm", "grid": "linspace"}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, {"sampler": "dpmpp_3m_published"}),
    ],
)
def test_random_and_other_schedulers(name: str, settings: dict[str, Any], sampler: dict[str, Any]) -> None:
    fields, missing = sampler_from_diffusers(dict(getattr(diffusers, name)(**settings).config) | {"_class_name": name})
    assert missing is None and sampler.items() <= fields.items()
    SampleConfig(**fields)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"_class_name": "LCMScheduler", "original_inference_steps": 40}, "original_inference_steps = 40"),
        ({"_class_name": "LCMScheduler", "num_train_timesteps": 99}, "num_train_timesteps = 99"),
        ({"_class_name": "TCDScheduler"}, "TCDScheduler is not offered"),
        ({"_class_name": "PNDMScheduler"}, "skip_prk_steps = False"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_lu_lambdas": True}, "use_lu_lambdas = True"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, "algorithm_type dpmsolver"),
        ({"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True}, "use_beta_sigmas = True"),
        ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding = True"),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "other"}, "timestep_spacing = other"),
    ],
)
def test_what_is_not_offered_is_said(written: Path, layout: dict[str, Any], message: str) -> None:
    fields, missing = sampler_from_diffusers(layout)
    assert fields == {} and missing is not None and message in missing
    file = written / "scheduler/scheduler_config.json"
    before = file.read_text()
    file.write_text(json.dumps({**PUBLISHED, **layout}))
    try:
        with pytest.warns(UserWarning, match="drawn with ddim instead"):
            assert Pipeline.from_pretrained(written).defaults == SampleConfig()
    finally:
        file.write_text(before)


def test_an_unknown_key_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown key predictoin_type: did you mean prediction_type"):
        scheduler_from_diffusers({"predictoin_type": "v_prediction"})
    with pytest.raises(ConfigError, match="prediction_type 'flow_prediction' is not offered"):
        scheduler_from_diffusers({"prediction_type": "flow_prediction"})
    with pytest.raises(ConfigError, match="FlowMatchEulerDiscreteScheduler has no β of a noise schedule"):
        scheduler_from_diffusers(
            dict(diffusers.FlowMatchEulerDiscreteScheduler().config)
            | {"_class_name": "FlowMatchEulerDiscreteScheduler"}
        )
    with pytest.raises(ConfigError, match="3 trained_betas, but num_train_timesteps is 1000"):
        scheduler_from_diffusers({"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 1000})


def test_every_class_of_diffusers_that_is_read_knows_its_own_keys() -> None:
    """No default configuration of theirs is refused for its keys."""
    for name in (*DETERMINISTIC, "DDPMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverSinglestepScheduler"):
        layout = {key: value for key, value in getattr(diffusers, name)().config.items() if not key.startswith("_")}
        for given in (
            layout,
            {"beta_schedule": layout["beta_schedule"]},
        ):  # absent keys take the defaults of their class
            schedule, _ = scheduler_from_diffusers({"_class_name": name, **given})
            table = Schedule.from_config(schedule).alphas_cumprod
            assert torch.allclose(table.float(), getattr(diffusers, name)().alphas_cumprod, rtol=1e-4), name


def test_our_defaults_are_written_so_that_diffusers_takes_them() -> None:
    sample = SampleConfig(grid="leading", end_clean=False)
    layout = scheduler_to_diffusers(ScheduleConfig("scaled_linear"), "v", sample)
    fields, _ = sampler_from_diffusers(layout)
    assert SampleConfig(**fields) == sample
    assert (
        set(fields) <= {"sampler", "grid", "grid_offset", "end_clean"}
        and fields["sampler"] in SAMPLERS
        and fields["grid"] in GRIDS
    )
    assert LATENT[0] == 4


NO_SIGNAL = [
    {"rescale_betas_zero_snr": True, **PUBLISHED},
    {"trained_betas": [*np.linspace(1e-4, 0.03, 999).tolist(), 1.0]},
]


@pytest.mark.parametrize("settings", NO_SIGNAL)
def test_a_prediction_of_noise_is_not_asked_where_no_signal_is_left(
    written: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """x̂_0 would be a division by 0: refused where the grid starts there; grids below draw finite pictures."""
    file, sampling = written / "scheduler/scheduler_config.json", {"steps": STEPS, "guidance_scale": 2.0}
    before = file.read_text()
    file.write_text(json.dumps({"_class_name": "DDIMScheduler", **settings, "timestep_spacing": "trailing"}))
    message = (
        "predicts eps, which says nothing of the image where its schedule leaves no signal,"
        " and grid trailing starts there: take grid"
    )
    try:
        pipe = Pipeline.from_pretrained(written)
        with pytest.raises(ConfigError, match=message):
            pipe(PROMPTS, **sampling)
        with pytest.raises(ConfigError, match="grid karras starts there"):
            pipe.check(SampleConfig(grid="karras"))
        out = ["--prompt", "a", "--out", str(tmp_path / "images")]
        assert main(["sample", str(written), *out]) == 2 and message in capsys.readouterr().err
        assert main(["plot", "reverse", str(written), "--prompt", "a", "--out", str(tmp_path / "a.png")]) == 2
        assert message in capsys.readouterr().err
        for command in (
            ["inspect", str(written), "--no-hashes"],
            ["convert", str(written), str(tmp_path / "copy.safetensors")],
        ):
            assert main(command) == 0
            assert "predicts eps where its schedule leaves no signal" in capsys.readouterr().out, command
        pictures = pipe(PROMPTS, grid="leading", **sampling)
        assert all(np.asarray(picture).std() > 0 for picture in pictures)
        pipe.target = "v"
        pipe.check(SampleConfig(**sampling))
    finally:
        file.write_text(before)
