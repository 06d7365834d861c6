"""Habits of diffusers' users: a call of a StableDiffusionPipeline draws the same here, or is answered in one line."""

import inspect
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from support.model_folders import folder  # noqa: F401
from support.pipelines import PROMPTS, array, make, noise, pipe, theirs, written  # noqa: F401
from torch import Tensor

from ldm.config import ConfigError, SampleConfig
from ldm.errors import FolderError
from ldm.pipeline import Pipeline, habits
from ldm.pipeline.habits import Pictures

ROOT = Path(__file__).resolve().parents[2]
THEIRS = diffusers.StableDiffusionPipeline


def one_line(error: pytest.ExceptionInfo[Any]) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 200
    return message


# ---------------------------------------------------------------- arguments of a call


def test_every_argument_of_theirs_is_taken_or_answered() -> None:
    pipelines = (THEIRS, diffusers.StableDiffusionImg2ImgPipeline, diffusers.StableDiffusionInpaintPipeline)
    their_arguments = {name for one in pipelines for name in inspect.signature(one.__call__).parameters}
    their_arguments -= {"self", "kwargs"}
    same = their_arguments & {*inspect.signature(Pipeline.__call__).parameters, *SampleConfig.__dataclass_fields__}
    assert their_arguments == same | set(habits.RENAMED) | set(habits.TAKEN) | set(habits.ANSWERS) - {"callback_steps"}
    assert not same & set(habits.RENAMED) and not set(habits.TAKEN) & set(habits.ANSWERS)


@pytest.mark.parametrize("name", habits.ANSWERS)
def test_an_argument_that_is_answered(pipe: Pipeline, name: str) -> None:
    value = torch.Generator().manual_seed(0) if name == "generator" else 1
    with pytest.raises(ConfigError) as raised:
        pipe(PROMPTS[:1], **{name: value})
    assert one_line(raised) == f"{name}: {habits.ANSWERS[name]}"
    assert len(pipe(PROMPTS[:1], steps=1, **{name: None})) == 1  # as left out there


def test_a_call_of_theirs_draws_what_it_draws_there(pipe: Pipeline, written: Path) -> None:
    call: dict[str, Any] = {
        "prompt": PROMPTS[:2], "height": 24, "width": 24, "num_inference_steps": 4, "guidance_scale": 3.0, "eta": 0.0,
        "num_images_per_prompt": 2, "return_dict": True, "guidance_rescale": 0.4, "output_type": "np",
    }  # fmt: skip
    side = np.stack([pipe_noise(0, i, 12) for i in range(4)])
    expected = theirs(written)(latents=torch.from_numpy(side), **call).images
    drawn = pipe(**call, seed=0)
    assert drawn.images.shape == expected.shape == (4, 24, 24, 3) and drawn.images.dtype == expected.dtype
    assert np.abs(drawn.images - expected).max() < 2e-4 < drawn.images.std()
    ours = pipe([p for p in PROMPTS[:2] for _ in "12"], size=24, steps=4, guidance_scale=3.0, guidance_rescale=0.4)
    assert np.abs((drawn.images * 255) - array(ours)).max() <= 0.5 + 1e-3


def pipe_noise(seed: int, number: int, side: int) -> np.ndarray:
    from ldm.data import rng

    return rng.normal(seed, "sample/x_T", number, (4, side, side))


def test_the_pictures_are_their_own_images(pipe: Pipeline) -> None:
    drawn = pipe(PROMPTS, steps=2)
    assert isinstance(drawn, list) and drawn.images is drawn and len(drawn) == 4
    assert (np.asarray(pipe(PROMPTS, num_inference_steps=2).images[0]) == array(drawn)[0]).all()
    assert pipe([], output_type="np").images == [] == Pictures()


def test_types_of_output(pipe: Pipeline, written: Path) -> None:
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0}
    opened = theirs(written)
    for kind in habits.OUTPUTS:
        found = pipe(PROMPTS[:3], output_type=kind, batch_size=2, **settings)
        expected = opened(PROMPTS[:3], latents=noise(0, 3), output_type=kind, **settings).images
        if kind == "pil":
            assert np.abs(array(found) - array(expected)).max() <= 1
        else:
            assert type(found.images) is type(expected) and found.images.shape == expected.shape
            np.testing.assert_allclose(np.asarray(found.images), np.asarray(expected), rtol=0, atol=1 / 255)
            assert len(found) == 3 and (found[1] == found.images[1]).all()
    with pytest.raises(ConfigError) as raised:
        pipe(PROMPTS[:1], output_type="tensor")
    assert one_line(raised) == "output_type must be one of pil, np, pt, latent, got 'tensor'"


def test_the_callback_after_each_step_is_theirs(pipe: Pipeline, written: Path) -> None:
    """Called at the same steps with the same t and latents, and what it returns replaces them."""
    calls: dict[str, list[tuple[int, float, Tensor]]] = {}

    def tracked(who: str) -> Any:
        def on_step_end(model: Any, step: int, t: Any, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
            assert model is owners[who] and list(kwargs) == ["latents"]
            calls.setdefault(who, []).append((step, float(t), kwargs["latents"]))
            return {"latents": kwargs["latents"] * 0.5} if step == 1 else kwargs

        return on_step_end

    owners: dict[str, Any] = {"ours": pipe, "theirs": theirs(written)}
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "callback_on_step_end_tensor_inputs": ["latents"]}
    expected = owners["theirs"](
        PROMPTS[:2], latents=noise(0, 2), callback_on_step_end=tracked("theirs"), **settings
    ).images
    drawn = pipe(PROMPTS[:2], callback_on_step_end=tracked("ours"), **settings)
    assert np.abs(array(drawn) - array(expected)).max() <= 1 < np.abs(array(drawn) - array(pipe(PROMPTS[:2]))).max()
    assert [call[:2] for call in calls["ours"]] == [call[:2] for call in calls["theirs"]] and len(calls["ours"]) == 4
    for (_, _, x), (_, _, y) in zip(calls["ours"], calls["theirs"], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)
    unchanged = pipe(PROMPTS[:2], callback_on_step_end=lambda *_: None, batch_size=1)
    assert np.abs(array(unchanged) - array(pipe(PROMPTS[:2]))).max() <= 1
    for wrong, got in ((torch.zeros(1), "[1]"), (3, "3")):
        with pytest.raises(ConfigError) as raised:
            pipe(PROMPTS[:1], steps=1, callback_on_step_end=lambda *_, wrong=wrong: {"latents": wrong})
        assert one_line(raised) == f"callback_on_step_end must return latents [1, 4, 8, 8], got {got}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 3, "steps": 3}, "num_inference_steps is steps: give one of them"),
        ({"prompt": "a"}, "prompt is prompts: give one of them"),
        ({"height": 16, "size": 16}, "height is size: give one of them"),
        ({"width": 23}, "size must be a positive multiple of 2 (the autoencoder's factor), got 23"),
        ({"height": "16"}, "size[0] must be an integer, got '16'"),
        ({"height": 15, "width": 15}, "size must be a positive multiple of 2 (the autoencoder's factor), got 15"),
        ({"num_inference_steps": "3"}, "steps must be an integer, got '3'"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1, got 0"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt must be an integer, got 1.5"),
        (
            {"return_dict": False},
            "return_dict: a call returns the list of pictures, which is its own .images: leave it",
        ),
        ({"callback_on_step_end": 3}, "callback_on_step_end must be a function, got 3"),
        (
            {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
            "callback_on_step_end_tensor_inputs must be ['late",
        ),
        ({"num_inference_step": 3}, "unknown key num_inference_step: did you mean num_inference_steps?"),
        ({"num_images": 3}, "unknown key num_images: did you mean num_images_per_prompt?"),
        ({"batchsize": 3}, "unknown key batchsize: did you mean batch_size?"),
        ({"guidance_scal": 3}, "unknown key guidance_scal: did you mean guidance_scale?"),
        ({"classifier_free": 3}, "unknown key classifier_free: did you mean classifier_form?"),
    ],
)
def test_what_is_wrong_is_named(pipe: Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        pipe(PROMPTS[:1], **arguments)
    assert one_line(raised).startswith(message)


def test_a_height_that_is_the_models_own_may_stand_alone(pipe: Pipeline) -> None:
    assert pipe("a", height=16, steps=1)[0].size == (16, 16) == pipe(prompt="a", width=16, steps=1)[0].size
    assert pipe("a", height=16, width=24, steps=1)[0].size == (24, 16) == pipe("a", size=(16, 24), steps=1)[0].size


# ---------------------------------------------------------------- attributes and methods


@pytest.mark.parametrize("name", habits.ATTRIBUTES)
def test_an_attribute_that_is_answered(pipe: Pipeline, name: str) -> None:
    with pytest.raises(AttributeError) as raised:
        getattr(pipe, name)
    assert one_line(raised) == f"Pipeline.{name}: {habits.ATTRIBUTES[name]}" and not hasattr(pipe, name)
    with pytest.raises(AttributeError) as raised:
        setattr(pipe, name, None)
    assert one_line(raised).startswith(f"Pipeline.{name} = …: ")


def test_the_attributes_are_theirs_and_not_ours(written: Path) -> None:
    opened = theirs(written)
    torch_habits = {"half", "float", "bfloat16", "double", "cuda", "cpu", "eval", "train", "requires_grad_"}
    earlier = {"enable_vae_slicing", "enable_vae_tiling", "disable_freeu"}  # of releases that differ
    during_a_call = {"guidance_scale", "_guidance_scale", "num_timesteps", "_interrupt", "interrupt"}
    for name in habits.ATTRIBUTES.keys() - torch_habits - earlier - during_a_call:
        assert hasattr(opened, name) or hasattr(THEIRS, name), name
    assert not (habits.ATTRIBUTES.keys() | habits.PARTS.keys()) & set(dir(Pipeline))


def test_parts_by_their_names(pipe: Pipeline, written: Path) -> None:
    opened = theirs(written)
    assert pipe.codec is not None and pipe.vae is pipe.codec.autoencoder  # type: ignore[attr-defined]
    tokens: Any = {"padding": "max_length", "max_length": 16, "return_tensors": "pt"}
    ids = pipe.tokenizer("a small red circle", **tokens).input_ids  # type: ignore[attr-defined]
    assert torch.equal(ids, opened.tokenizer("a small red circle", **tokens).input_ids)
    states = [model.text_encoder(ids).last_hidden_state for model in (pipe, opened)]  # type: ignore[attr-defined]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)
    plain: Any = make(codec=False, text=False)
    assert plain.vae is plain.text_encoder is plain.tokenizer is None
    for name in habits.PARTS:
        with pytest.raises(AttributeError, match=f"Pipeline.{name} = …: "):
            setattr(plain, name, None)
    with pytest.raises(AttributeError, match="object has no attribute 'schedular'"):
        plain.schedular  # noqa: B018
    plain.unet = torch.nn.Linear(1, 1)
    with pytest.raises(AttributeError, match="'Linear' object has no attribute 'conv_in'"):
        plain.device  # noqa: B018


@pytest.mark.parametrize("name", habits.OPENING)
def test_an_argument_of_opening_that_is_answered(written: Path, name: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Pipeline.from_pretrained(written, "cpu", **{name: None})
    assert one_line(raised) == f"{name}: {habits.OPENING[name]}"


def test_opening_as_they_do(written: Path) -> None:
    half = Pipeline.from_pretrained(written, "cpu", torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    expected = Pipeline.from_pretrained(written, "cpu", torch.bfloat16)
    assert (array(half(PROMPTS)) == array(expected(PROMPTS))).all()
    with pytest.raises(ConfigError, match="dtype must be a floating-point type of torch"):
        Pipeline.from_pretrained(written, "cpu", torch_dtype="float16")
    single = Pipeline.from_single_file(written, device="cpu")
    assert (array(single(PROMPTS)) == array(Pipeline.from_pretrained(written, "cpu")(PROMPTS))).all()
    with pytest.raises(FolderError):
        Pipeline.from_single_file("nowhere.safetensors")


# ---------------------------------------------------------------- device and precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_network_is_cast_and_pictures_stay_pictures(dtype: torch.dtype) -> None:
    exact = make()
    expected = array(exact(PROMPTS))
    cast = make().to("cpu", dtype)
    assert cast.codec is not None and cast.text is not None
    for network in (cast.unet, cast.codec.autoencoder, cast.text.model):
        assert {tensor.dtype for tensor in network.parameters()} == {dtype}
    assert cast.dtype == dtype and cast.schedule.betas.dtype == torch.float64
    assert torch.equal(cast.schedule.betas, exact.schedule.betas)
    found = array(cast(PROMPTS))
    assert 0 < np.abs(found - expected).mean() < 12
    assert cast.to(dtype=torch.float32, device="cpu") is cast and cast.dtype == torch.float32
    assert array(cast(PROMPTS)).tolist() != expected.tolist()  # what was rounded away stays away


def test_decoding_is_in_float32_whatever_the_weights_are() -> None:
    """A decoder whose states overflow in float16, as those of published autoencoders do."""
    model = make()
    assert model.codec is not None
    decoder = model.codec.autoencoder.decoder
    decoder.conv_in.weight.data *= 1e4  # the group norm behind takes it back
    expected = array(model(PROMPTS))
    found = array(model.to(torch.float16)(PROMPTS))
    assert np.abs(found - expected).mean() < 12
    assert decoder.conv_in.weight.dtype == torch.float16  # a copy was computed with


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (("gpu",), "device must be one that torch has here, such as cpu or cuda, got 'gpu': "),
        ((torch.int64,), "dtype must be a floating-point type of torch, such as torch.bfloat16, got torch.int64"),
        (("cpu", torch.bool), "dtype must be a floating-point type of torch"),
    ],
)
def test_a_place_that_is_none_changes_nothing(pipe: Pipeline, place: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        pipe.to(*place)
    assert str(raised.value).startswith(message) and pipe.dtype == torch.float32


def test_guides_move_and_are_cast_with_their_pipeline(written: Path) -> None:
    model = Pipeline.from_pretrained(written, "cpu")
    settings = {"autoguidance": str(written), "autoguidance_scale": 2.0, "steps": 2}
    model(PROMPTS[:1], **settings)
    model.to(torch.bfloat16)
    (weak,) = model._guides.models.values()
    assert weak.dtype == torch.bfloat16 and not isinstance(weak, Pipeline)
    assert len(model(PROMPTS[:1], **settings)) == 1


# ---------------------------------------------------------------- the bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("terminal", "config", "progress", "shown"),
    [
        (True, {}, None, True), (False, {}, None, False), (True, {"disable": True}, None, False),
        (True, {}, False, False), (False, {}, True, True), (True, {"disable": True}, True, True),
        (False, {"disable": False}, None, True),
    ],
)  # fmt: skip
def test_a_bar_is_shown_in_a_terminal(
    terminal: bool, config: dict[str, Any], progress: bool | None, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, stream = make(), Terminal() if terminal else io.StringIO()
    model.set_progress_bar_config(**config)
    monkeypatch.setattr(sys, "stderr", stream)
    model(PROMPTS[:3], steps=3, batch_size=2, progress=progress)
    assert ("6/6" in stream.getvalue()) == shown and (stream.getvalue() != "") == shown
    before = stream.getvalue()
    list(model.sample(PROMPTS[:1], model.defaults))
    assert stream.getvalue() == before  # a caller of `sample` has a bar of its own, or none


# ---------------------------------------------------------------- where warnings point


SCRIPT = """
import dataclasses, sys, warnings
from pathlib import Path
from ldm import Pipeline
from ldm.config import ScheduleConfig
warnings.simplefilter("always")
opened = Pipeline.from_pretrained(sys.argv[1], "cpu")
pipe = dataclasses.replace(opened, caption_dropout=0.0, schedule_config=ScheduleConfig("cosine"))
settings = dataclasses.replace(pipe.defaults, sampler="heun", steps=2)
with warnings.catch_warnings(record=True) as caught:
    pipe("long " * 99, sampler="heun", steps=2)
    drawn = pipe.sample(["short", "longer " * 99], settings)
    list(drawn)
for warning in caught:
    print(Path(warning.filename).name, warning.lineno, str(warning.message)[:16])
"""
SAID = ["this model was t", "the text encoder", "heun on the trai"]


def test_warnings_point_at_the_line_that_calls(written: Path, tmp_path: Path) -> None:
    """In a process of its own, where no checker of types stands between the calls."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, str(script), str(written)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines() == [f"script.py {line} {said}" for line in (11, 12) for said in SAID], done.stderr
