"""The pipeline: its folder opened by diffusers, its pictures beside theirs, and broken folders and settings named."""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.model_folders import folder, forget_hashes  # noqa: F401
from support.pipelines import LATENT, PROMPTS, array, make, noise, pipe, theirs, written  # noqa: F401
from torch import Tensor

from autoencoder.posterior import DiagonalGaussian
from ldm.config import ConfigError, SampleConfig, ScheduleConfig
from ldm.data import rng as streams
from ldm.diffusion.samplers.registry import SAMPLERS
from ldm.errors import FolderError
from ldm.models.unet import UNet
from ldm.pipeline import Pipeline
from ldm.pipeline.codec import LatentCodec, load_codec
from ldm.pipeline.guides import Guides

# ---------------------------------------------------------------- the folder is diffusers' folder


@pytest.mark.parametrize(
    ("part", "cls"),
    [
        ("unet", diffusers.UNet2DConditionModel),
        ("vae", diffusers.AutoencoderKL),
        ("text_encoder", transformers.CLIPTextModel),
    ],
)
def test_diffusers_finds_every_tensor_and_no_other(written: Path, part: str, cls: Any) -> None:
    _, info = cls.from_pretrained(written / part, output_loading_info=True)
    assert {key: list(value) for key, value in info.items() if value} == {}


def test_the_index_is_a_stable_diffusion_pipeline(written: Path) -> None:
    index = json.loads((written / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    vae = json.loads((written / "vae/config.json").read_text())
    assert vae["scaling_factor"] == 1.0 and vae["sample_size"] == 16
    opened = theirs(written)
    assert isinstance(opened.scheduler, diffusers.DDIMScheduler)
    assert opened.scheduler.config.prediction_type == "v_prediction"
    assert opened.scheduler.config.timestep_spacing == "trailing"
    assert len(opened.tokenizer) == opened.text_encoder.config.vocab_size
    # nothing is rewritten on opening
    mine = json.loads((written / "scheduler/scheduler_config.json").read_text())
    assert {key: opened.scheduler.config[key] for key in mine if not key.startswith("_")} == {
        key: value for key, value in mine.items() if not key.startswith("_")
    }


@pytest.mark.parametrize("target", ["v", "eps", "x0"])
@pytest.mark.parametrize(("steps", "scale", "negative"), [(5, 3.0, ""), (10, 7.5, "two red circles"), (4, 1.0, "")])
def test_diffusers_draws_the_same_pictures(
    written: Path, pipe: Pipeline, tmp_path: Path, target: str, steps: int, scale: float, negative: str
) -> None:
    ours, folder = pipe, written
    if target != "v":
        ours, folder = dataclasses.replace(pipe, target=target), tmp_path / "model"
        ours.save_pretrained(folder)
    expected = theirs(folder)(
        PROMPTS,
        latents=noise(7, 4),
        num_inference_steps=steps,
        guidance_scale=scale,
        negative_prompt=[negative] * 4 if negative else None,
    )
    actual = ours(PROMPTS, steps=steps, guidance_scale=scale, negative_prompt=negative, seed=7, sampler="ddim")
    a, b = array(actual), array(expected.images)
    assert a.shape == (4, 16, 16, 3) and abs(a - b).max() <= 1
    assert ((a > 0) & (a < 255)).mean() > 0.5 and a.std() > 10  # pictures, no saturation that would hide a difference


def test_prompt_guidance_and_negative_prompt_matter(pipe: Pipeline) -> None:
    plain = array(pipe(PROMPTS[:1]))
    for other in (
        pipe(PROMPTS[1:2]),
        pipe(PROMPTS[:1], guidance_scale=6.0),
        pipe(PROMPTS[:1], negative_prompt="blue stars"),
        pipe(PROMPTS[:1], seed=1),
        pipe(PROMPTS[:1], steps=6),
        pipe(PROMPTS[:1], eta=1.0),
    ):
        assert abs(array(other) - plain).max() > 1
    negative_as_guidance_zero = pipe([""], guidance_scale=0.0, negative_prompt="blue stars")
    assert abs(array(negative_as_guidance_zero) - array(pipe(["blue stars"], guidance_scale=1.0))).max() <= 1


def test_reading_gives_the_model_that_was_written(pipe: Pipeline, written: Path) -> None:
    again = Pipeline.from_pretrained(written)
    assert array(again(PROMPTS, seed=3)).tolist() == array(pipe(PROMPTS, seed=3)).tolist()
    assert again.defaults == pipe.defaults and again.caption_dropout == 0.1
    assert again.target == "v" and again.sample_size == 16
    assert again.schedule_config.num_steps == 1000 and again.hash == pipe.hash != ""
    of_a_run = Pipeline.from_pretrained(written.parent)
    assert array(of_a_run(PROMPTS[:1])).tolist() == array(pipe(PROMPTS[:1])).tolist()


def test_a_folder_written_by_diffusers_opens_here(pipe: Pipeline, written: Path, tmp_path: Path) -> None:
    theirs(written).save_pretrained(tmp_path / "foreign")
    again = Pipeline.from_pretrained(tmp_path / "foreign")
    assert not (tmp_path / "foreign/ldm.json").exists() and again.sample_size == 16 and again.caption_dropout is None
    assert again.defaults == SampleConfig()
    settings = {"steps": 5, "guidance_scale": 3.0}
    assert abs(array(again(PROMPTS, **settings)) - array(pipe(PROMPTS, **settings))).max() <= 1


def test_half_precision_is_the_unet_alone(pipe: Pipeline, written: Path) -> None:
    half = Pipeline.from_pretrained(written, dtype=torch.bfloat16)
    assert half.codec is not None and half.codec.autoencoder.quant_conv.weight.dtype == torch.float32
    assert {p.dtype for p in half.unet.parameters()} == {torch.bfloat16}
    difference = abs(array(half(PROMPTS[:2], guidance_scale=1.0)) - array(pipe(PROMPTS[:2], guidance_scale=1.0)))
    assert 0 < difference.mean() < 8


# ---------------------------------------------------------------- the noise of a picture


def spy(monkeypatch: pytest.MonkeyPatch, name: str) -> list[list[Tensor]]:
    """What each call of a sampler was given: x_T, then the noise of each step."""
    seen, sampler = [], SAMPLERS[name]

    def watched(denoiser: Any, x: Tensor, grid: Tensor, noise: Callable[[int], Tensor], **options: Any) -> Tensor:
        drawn = [x]
        seen.append(drawn)

        def kept(i: int) -> Tensor:
            drawn.append(noise(i))
            return drawn[-1]

        return sampler.function(denoiser, x, grid, kept, **options)

    monkeypatch.setitem(SAMPLERS, name, dataclasses.replace(sampler, function=watched))
    return seen


def test_a_picture_depends_on_its_number_alone(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy(monkeypatch, "ddpm")
    settings = SampleConfig("ddpm", 4, 3.0, seed=11)

    def draw(numbers: list[int], batch_size: int) -> tuple[np.ndarray, list[Tensor]]:
        seen.clear()
        prompts = [PROMPTS[i] for i in numbers]
        images = torch.cat(list(pipe.sample(prompts, settings, batch_size=batch_size, indices=numbers)))
        noises = [torch.cat(parts) for parts in zip(*seen, strict=True)]
        return ((images.clamp(-1, 1) + 1) * 127.5).round().int().numpy(), noises

    whole, noises = draw([0, 1, 2, 3], 16)
    assert len(noises) == 4 and torch.equal(noises[0][1], torch.from_numpy(streams.normal(11, "sample/x_T", 1, LATENT)))
    flat = torch.stack(noises).flatten(0, 1).flatten(1)  # every draw of every picture
    assert len(torch.unique(flat, dim=0)) == 16 and flat.std() == pytest.approx(1, abs=0.03)
    for numbers, batch_size in (([0, 1, 2, 3], 1), ([0, 1, 2, 3], 3), ([1, 3], 16), ([2], 5), ([3, 0], 2)):
        pictures, drawn = draw(numbers, batch_size)
        for mine, its in zip(drawn, noises, strict=True):
            assert torch.equal(mine, its[numbers])
        assert abs(pictures - whole[numbers]).max() <= 1


def test_progress_is_reported_and_one_prompt_may_be_a_string(pipe: Pipeline) -> None:
    calls: list[tuple[int, int]] = []
    pictures = pipe(PROMPTS[:3], steps=1, batch_size=2, callback=lambda done, total: calls.append((done, total)))
    assert calls == [(2, 3), (3, 3)] and [p.size for p in pictures] == [(16, 16)] * 3
    assert [p.size for p in pipe("a circle", steps=1, size=24)] == [(24, 24)]
    assert pipe([]) == []


# ---------------------------------------------------------------- kinds of model


def test_a_first_step_too_long_for_a_sampler_is_warned_of() -> None:
    """heun and plms on the cosine schedule's trailing grid; no other sampler, nor on a grid that begins gently."""
    model = make(steps=1000)
    cosine = dataclasses.replace(model, schedule_config=ScheduleConfig("cosine"))
    gentle = dataclasses.replace(model, schedule_config=ScheduleConfig("scaled_linear"))
    for sampler in ("heun", "plms"):
        with pytest.warns(UserWarning, match=f"{sampler} on the trailing grid.*too much for it; take grid karras"):
            list(cosine.sample(PROMPTS[:1], SampleConfig(sampler, 5)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(cosine.sample(PROMPTS[:1], SampleConfig("heun", 5, grid="karras")))
        list(cosine.sample(PROMPTS[:1], SampleConfig("dpmpp_2m", 5)))
        list(gentle.sample(PROMPTS[:1], SampleConfig("heun", 5)))


KINDS = [(True, True), (True, False), (False, True), (False, False)]


@pytest.mark.parametrize(("codec", "text"), KINDS)
def test_every_kind_of_model_draws_with_every_sampler(codec: bool, text: bool, tmp_path: Path) -> None:
    model = make(codec=codec, text=text, steps=12)
    for sampler in SAMPLERS:
        for steps in (SAMPLERS[sampler].fewest, 3):
            eta = 0.5 if "eta" in SAMPLERS[sampler].options else 0.0
            images = torch.cat(list(model.sample(PROMPTS[:2], SampleConfig(sampler, steps, 2.0, eta))))
            assert images.shape == (2, 3, 16, 16) and images.isfinite().all()
    model.save_pretrained(tmp_path / "model")
    again = Pipeline.from_pretrained(tmp_path / "model")
    assert array(again(PROMPTS)).tolist() == array(model(PROMPTS)).tolist()
    assert ((again.codec is None), (again.text is None)) == (not codec, not text)


@pytest.mark.parametrize(
    "extra", [{"vector_dim": 3}, {"num_labels": 3}, {"sinusoidal_labels": True}, {"concat_channels": 2}]
)
def test_a_further_condition_carries_our_name(extra: dict[str, Any], tmp_path: Path) -> None:
    plain = make(codec=True, text=True, steps=12)
    config, spec = dataclasses.replace(plain.unet.config, **extra), plain.unet.spec
    unet = UNet(config, spec.in_channels, spec.out_channels, spec.context_dim)
    model = dataclasses.replace(plain, unet=unet)
    with pytest.raises(ConfigError, match=r"with a vector, label or concatenated condition cannot be expressed"):
        model.save_pretrained(tmp_path / "refused", for_diffusers=True)
    model.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model/model_index.json").read_text())["_class_name"] == "LatentDiffusionPipeline"


@pytest.mark.parametrize(
    ("codec", "text", "lacking"), [(False, True, "pixel"), (True, False, "unconditional"), (False, False, "pixel")]
)
def test_what_diffusers_cannot_express_says_so(codec: bool, text: bool, lacking: str, tmp_path: Path) -> None:
    model = make(codec=codec, text=text, steps=12)
    with pytest.raises(
        ConfigError, match=rf"without .*{lacking}.* cannot be expressed as a diffusers StableDiffusionPipeline"
    ):
        model.save_pretrained(tmp_path / "refused", for_diffusers=True)
    assert not (tmp_path / "refused").exists()
    model.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    assert index["_class_name"] == "LatentDiffusionPipeline"
    assert (index["vae"] == [None, None]) == (not codec) and (index["text_encoder"] == [None, None]) == (not text)


def test_an_unconditional_model_ignores_guidance() -> None:
    model, evaluated = make(text=False, steps=12), []
    model.unet.register_forward_pre_hook(lambda _, inputs: evaluated.append(len(inputs[0])))
    assert array(model(["", ""], guidance_scale=9.0)).tolist() == array(model(["a", "b"], guidance_scale=1.0)).tolist()
    assert evaluated == [2] * 10  # 5 steps, twice; never both halves


@pytest.mark.parametrize("negative", ["", "blue stars"])
def test_autoguidance_starts_where_classifier_free_guidance_does(written: Path, negative: str) -> None:
    """The weaker model takes the captions, or the null caption where the scale is 0: then captions change nothing."""
    pipe, weak = Pipeline.from_pretrained(written, "cpu"), Guides()
    for scale, captions in ((0.0, [negative] * 2), (1.0, PROMPTS[:2]), (3.0, PROMPTS[:2])):
        settings = dataclasses.replace(pipe.defaults, guidance_scale=scale, negative_prompt=negative)
        x_t, t = torch.randn(2, *LATENT), torch.full((2,), 500)
        with torch.no_grad():
            pred = weak.guide(pipe, str(written), PROMPTS[:2], settings, None)(x_t, t)
            expected, other = (
                pipe.unet(x_t, t, pipe.condition(given)) for given in (captions, ["a green square on white"] * 2)
            )
        torch.testing.assert_close(pred, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(pred, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("argument", ["autoguidance", "classifier", "lora"])
def test_the_argument_whose_file_is_missing_is_named(pipe: Pipeline, argument: str) -> None:
    with pytest.raises((FolderError, ConfigError), match=f"(?i){argument}.*nowhere"):
        pipe(PROMPTS[:1], steps=1, **{argument: ["nowhere"] if argument == "lora" else "nowhere"})


def test_guidance_without_caption_dropout_warns(pipe: Pipeline) -> None:
    never_dropped = dataclasses.replace(pipe, caption_dropout=0.0)
    with pytest.warns(UserWarning, match="trained without caption dropout"):
        never_dropped(PROMPTS[:1], steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        never_dropped(PROMPTS[:1], steps=1, guidance_scale=1.0)
        pipe(PROMPTS[:1], steps=1)
        dataclasses.replace(pipe, caption_dropout=None)(PROMPTS[:1], steps=1)


@pytest.mark.parametrize(("scale", "shift"), [(0.18215, None), (0.3611, 0.1159)])
def test_a_foreign_autoencoder_keeps_its_scale_and_shift(
    pipe: Pipeline, folder: Path, scale: float, shift: float | None
) -> None:
    torch.manual_seed(5)
    vae: Any = diffusers.AutoencoderKL(
        3, 3, ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2, (16, 32), 1, latent_channels=4,
        norm_num_groups=8, sample_size=16, scaling_factor=scale, shift_factor=shift,
    )  # fmt: skip
    vae.save_pretrained(forget_hashes(folder) / "vae")
    codec, z, x = load_codec(folder), torch.randn(2, *LATENT), torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        close = torch.testing.assert_close
        close(codec.decode(z), vae.decode(z / scale + (shift or 0)).sample, rtol=1e-4, atol=1e-5)
        encoded = codec.latent(codec.autoencoder.encode(x), torch.zeros(2, *LATENT))
        close(encoded, (vae.encode(x).latent_dist.mean - (shift or 0)) * scale, rtol=1e-4, atol=1e-5)
        ones = codec.latent(DiagonalGaussian(torch.zeros(1, *LATENT), torch.zeros(1, *LATENT)), torch.ones(1, *LATENT))
        close(ones, torch.full_like(ones, (1 - (shift or 0)) * scale))
    opened = Pipeline.from_pretrained(folder)
    if shift is None:  # a StableDiffusionPipeline leaves the shift out
        expected = theirs(folder)(PROMPTS, latents=noise(0, 4), num_inference_steps=5, guidance_scale=3.0).images
        drawn = array(opened(PROMPTS))
        unscaled = dataclasses.replace(opened, codec=LatentCodec(codec.autoencoder))
        assert abs(drawn - array(expected)).max() <= 1 < abs(drawn - array(unscaled(PROMPTS))).max()
    opened.save_pretrained(folder.parent / "again")
    written_out = json.loads((folder.parent / "again/vae/config.json").read_text())
    assert (written_out["scaling_factor"], written_out["shift_factor"]) == (scale, shift)
    again = load_codec(folder.parent / "again")
    assert (again.scale, again.shift) == (scale, shift or 0.0)


# ---------------------------------------------------------------- faults are named


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("guidance_scale", float("nan")),
        ("guidance_scale", -1.0),
        ("steps", 0),
        ("steps", 1001),
        ("sampler", "eulr"),
        ("size", 15),
        ("size", 0),
        ("size", -2),
        ("eta", 1.5),
        ("seed", -1),
        ("batch_size", 0),
        ("batch_size", -3),
    ],
)
def test_an_argument_out_of_range_is_named(pipe: Pipeline, argument: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{argument} must .*got '?{value}"):
        pipe(PROMPTS[:1], **{argument: value})


def test_numbers_must_fit_the_prompts(pipe: Pipeline) -> None:
    with pytest.raises(ConfigError, match="indices must number the 2 prompts, got 3"):
        next(pipe.sample(PROMPTS[:2], pipe.defaults, indices=[0, 1, 2]))


UNET, VAE = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae"))
TEXT = "text_encoder/model.safetensors"


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (UNET, "mid_block.attentions.0.proj_in.bias"),
        (VAE, "quant_conv.weight"),
        (TEXT, "text_model.final_layer_norm.weight"),
    ],
)
@pytest.mark.parametrize("fault", ["missing", "extra", "shape"])
def test_tensors_that_do_not_fit_are_named(folder: Path, file: str, name: str, fault: str) -> None:
    tensors = load_file(folder / file)
    tensor = tensors.pop(name)
    if fault == "shape":
        tensors[name] = torch.cat([tensor, tensor])
    elif fault == "extra":
        tensors[name] = tensor
        name = name.replace(".weight", ".wait").replace(".bias", ".buyers")
        tensors[name] = tensor.clone()
    save_file(tensors, folder / file, metadata={"format": "pt"})
    with pytest.raises(FolderError) as caught:
        Pipeline.from_pretrained(folder)
    assert name.removeprefix("text_model.") in str(caught.value) and file.split("/")[0] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json", "scheduler/scheduler_config.json", "unet/config.json", UNET, "vae/config.json", VAE,
        "text_encoder/config.json", TEXT, "tokenizer",
    ],
)  # fmt: skip
def test_a_missing_file_is_named(folder: Path, file: str) -> None:
    path = folder / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FolderError) as caught:
        Pipeline.from_pretrained(folder)
    assert path.name in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "file", [UNET, VAE, TEXT, "model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "ldm.json"]
)
def test_a_file_cut_short_is_named(folder: Path, file: str) -> None:
    path = folder / file
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FolderError) as caught:
        Pipeline.from_pretrained(folder)
    assert path.parent.name in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_of_another_kind_is_refused(folder: Path, tmp_path: Path) -> None:
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "FluxPipeline"))
    with pytest.raises(ConfigError, match="a FluxPipeline cannot be opened"):
        Pipeline.from_pretrained(folder)
    with pytest.raises(FolderError, match="no run or model folder"):
        Pipeline.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").touch()
    with pytest.raises(FolderError, match="without a diffusion model yet"):
        Pipeline.from_pretrained(tmp_path / "run")


def test_unknown_defaults_are_named(folder: Path) -> None:
    extra = json.loads((folder / "ldm.json").read_text())
    extra["defaults"]["stepz"] = 3
    (folder / "ldm.json").write_text(json.dumps(extra))
    with pytest.raises(ConfigError, match=r"unknown key defaults\.stepz: did you mean defaults\.steps"):
        Pipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("beta_schedule", "laplace"), ("prediction_type", "flow_prediction")],
)
def test_a_process_that_is_not_offered_is_refused(folder: Path, key: str, value: Any) -> None:
    file = folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ConfigError, match=f"scheduler: .*{key}"):
        Pipeline.from_pretrained(folder)
