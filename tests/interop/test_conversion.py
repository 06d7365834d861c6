"""From layout to layout: other people's folders to single files and back, the commands, and what they refuse."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.model_folders import forget_hashes
from support.pipelines import PROMPTS, array, make, noise, text_encoder, theirs
from torch import nn

from ldm.cli.main import main
from ldm.config import ConfigError
from ldm.errors import FolderError
from ldm.files.tensors.archive import tensor_hash, write_tensors
from ldm.interop.bundle import TEXT, UNET, VAE
from ldm.interop.compvis.layout import to_compvis
from ldm.interop.convert import cast, write_model
from ldm.interop.diffusers.folder import FILES
from ldm.interop.diffusers.lora_folder import Reference
from ldm.interop.open import read_any, read_model
from ldm.interop.text import read_text, text_of
from ldm.pipeline import Pipeline
from ldm.pipeline import verify_conversion as conversion
from ldm.pipeline.codec import autoencoder_config, load_codec
from ldm.pipeline.info import ModelInfo, load_unet

ROOT = Path(__file__).resolve().parents[2]
LOADERS: dict[str, Any] = {
    UNET: diffusers.UNet2DConditionModel,
    VAE: diffusers.AutoencoderKL,
    TEXT: transformers.CLIPTextModel,
}


def stirred(module: Any, dtype: torch.dtype = torch.float32) -> Any:
    """With every weight moved from its initial value, in ``dtype``."""
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module.to(dtype).eval()


def random_unet(draw: random.Random, context: int, latent: int) -> Any:
    """A small UNet2DConditionModel of any shape that Stable Diffusion's family can have."""
    levels = draw.choice([1, 2, 3])
    attends = [draw.random() < 0.6 for _ in range(levels)]
    channels = [8 * draw.randint(1, 3) for _ in range(levels)]
    heads = [draw.choice([1, 2, 4]) for _ in range(levels)]
    label: dict[str, Any] = draw.choice(
        [{}, {"num_class_embeds": 5}, {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 6}]
    )
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=latent + draw.choice([0, 0, latent + 1]), out_channels=latent,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        block_out_channels=channels, layers_per_block=draw.choice([1, 2]), cross_attention_dim=context,
        attention_head_dim=draw.choice([heads, heads[0]]), norm_num_groups=draw.choice([2, 4]),
        use_linear_projection=draw.random() < 0.5, transformer_layers_per_block=draw.choice([1, 2]),
        resnet_time_scale_shift=draw.choice(["default", "scale_shift"]), **label,
    )  # fmt: skip


def random_vae(draw: random.Random, latent: int) -> Any:
    levels = draw.choice([2, 3])
    attends = [draw.random() < 0.3 for _ in range(levels)]
    return diffusers.AutoencoderKL(
        block_out_channels=[4 * draw.randint(1, 3) for _ in range(levels)], latent_channels=latent,
        norm_num_groups=draw.choice([2, 4]),
        down_block_types=["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends],
        up_block_types=["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attends)],
        layers_per_block=draw.choice([1, 2]), mid_block_add_attention=draw.random() < 0.8,
        scaling_factor=draw.choice([0.18215, 1.0, 0.7]),
    )  # fmt: skip


def random_folder(seed: int, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Write a random small model by diffusers and transformers; returns its tensors."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    encoder = text_encoder()
    config = encoder.model.config
    config.num_hidden_layers, config.hidden_act = draw.choice([1, 2]), draw.choice(["gelu", "quick_gelu"])
    dtype, latent = draw.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16]), draw.choice([2, 4])
    parts = {
        UNET: stirred(random_unet(draw, encoder.width, latent), dtype),
        VAE: stirred(random_vae(draw, latent), draw.choice([dtype, torch.float32])),
        TEXT: stirred(transformers.CLIPTextModel(config), dtype),
    }
    schedule = draw.choice(["scaled_linear", "linear", "squaredcos_cap_v2"])
    scheduler = getattr(diffusers, draw.choice(["DDIMScheduler", "EulerDiscreteScheduler"]))(
        beta_schedule=schedule,
        prediction_type=draw.choice(["epsilon", "v_prediction"]),
        timestep_spacing=draw.choice(["leading", "trailing"]),
    )
    for name, part in {**parts, "scheduler": scheduler, "tokenizer": encoder.tokenizer}.items():
        part.save_pretrained(folder / name)
    names = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": type(scheduler).__name__}
    index = {name: ["diffusers", cls] for name, cls in names.items()}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **index}))
    return {name: dict(part.state_dict()) for name, part in parts.items()}


OFTEN = 12  # of the 50; the others under `make slow`


@pytest.mark.parametrize("seed", [pytest.param(i, marks=[pytest.mark.slow] * (i >= OFTEN)) for i in range(50)])
def test_round_trips_are_bit_equal(seed: int, tmp_path: Path) -> None:
    """diffusers → ours → CompVis → ours → diffusers keeps every bit and setting of 50 random small models."""
    before = random_folder(seed, tmp_path / "theirs")
    write_model(read_model(tmp_path / "theirs"), tmp_path / "single.safetensors")
    write_model(read_model(tmp_path / "single.safetensors"), tmp_path / "back")
    for name, tensors in before.items():
        module = LOADERS[name].from_pretrained(tmp_path / "back" / name, torch_dtype=next(iter(tensors.values())).dtype)
        after = dict(module.state_dict())
        assert after.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert tensor_hash(tensor) == tensor_hash(after[key]), (name, key)
        original = LOADERS[name].from_pretrained(tmp_path / "theirs" / name).config
        kept = {
            k: v for k, v in dict(original if name != TEXT else original.to_dict()).items() if not k.startswith("_")
        }
        config = dict(module.config if name != TEXT else module.config.to_dict())
        assert {k: config[k] for k in kept} == kept
    scheduler = json.loads((tmp_path / "back/scheduler/scheduler_config.json").read_text())
    assert scheduler == json.loads((tmp_path / "theirs/scheduler/scheduler_config.json").read_text())


def test_a_model_draws_the_same_in_every_layout(tmp_path: Path) -> None:
    """Folder, single file and folder again, and what diffusers draws from the last."""
    pipe = make("v")
    pipe.save_pretrained(tmp_path / "a")
    write_model(read_model(tmp_path / "a"), tmp_path / "b.safetensors")
    write_model(read_model(tmp_path / "b.safetensors"), tmp_path / "c")
    expected = array(pipe(PROMPTS, sampler="ddim", steps=10, guidance_scale=7.5, seed=7))
    for place in ("b.safetensors", "c"):
        again = Pipeline.from_pretrained(tmp_path / place)
        assert again.defaults == pipe.defaults and again.caption_dropout == pipe.caption_dropout
        assert abs(array(again(PROMPTS, sampler="ddim", steps=10, guidance_scale=7.5, seed=7)) - expected).max() <= 1
    pictures = theirs(tmp_path / "c")(PROMPTS, latents=noise(7, 4), num_inference_steps=10, guidance_scale=7.5).images
    assert abs(array(pictures) - expected).max() <= 1


# ---------------------------------------------------------------- variants of a folder


def test_sharded_weights_and_variants(tmp_path: Path) -> None:
    """Shards with their index, fp16 and non_ema beside the whole, as diffusers writes them."""
    make().save_pretrained(tmp_path / "whole")
    expected = read_model(tmp_path / "whole").parts[UNET].tensors
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "whole/unet")
    forget_hashes(shutil.copytree(tmp_path / "whole", tmp_path / "shards"))
    (tmp_path / "shards/unet" / FILES[UNET]).unlink()
    unet.save_pretrained(tmp_path / "shards/unet", max_shard_size="200KB")
    assert len(list((tmp_path / "shards/unet").glob("*-of-*"))) > 1
    read = read_model(tmp_path / "shards").parts[UNET].tensors
    assert {k: tensor_hash(v) for k, v in read.items()} == {k: tensor_hash(v) for k, v in expected.items()}
    assert array(Pipeline.from_pretrained(tmp_path / "shards")(PROMPTS[:1], steps=2)).shape == (1, 16, 16, 3)
    for variant, dtype in (("fp16", torch.float16), ("non_ema", torch.float32)):
        for name, loader in LOADERS.items():
            loader.from_pretrained(tmp_path / "whole" / name).to(dtype).save_pretrained(
                tmp_path / "whole" / name, variant=variant
            )
        for part in read_model(tmp_path / "whole", variant).parts.values():
            assert {t.dtype for t in part.tensors.values()} == {dtype}
        assert Pipeline.from_pretrained(tmp_path / "whole", variant=variant).unet.conv_in.weight.dtype == torch.float32
    for file in (tmp_path / "whole").glob("*/*non_ema*"):
        if file.parent.name != UNET:
            file.unlink()  # as published folders have it
    assert read_model(tmp_path / "whole", "non_ema").parts[VAE].files[0].name == FILES[VAE]
    with pytest.raises(FolderError, match="fp16"):
        read_model(tmp_path / "whole", "bf16")


def test_our_shards_open_in_diffusers(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "whole")
    bundle = read_model(tmp_path / "whole")
    write_model(bundle, tmp_path / "shards", max_shard_bytes=200_000)
    assert len(list((tmp_path / "shards/unet").glob("*-of-*"))) > 1
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "shards/unet")
    assert all(torch.equal(unet.state_dict()[k], v) for k, v in bundle.parts[UNET].tensors.items())
    shards, whole = (
        array(theirs(tmp_path / folder)(PROMPTS, latents=noise(7, 4), num_inference_steps=3).images)
        for folder in ("shards", "whole")
    )
    assert abs(shards - whole).max() == 0


def test_the_old_names_of_the_autoencoders_attention(tmp_path: Path) -> None:
    """As in the folders that were published first: query, key, value, proj_attn."""
    make().save_pretrained(tmp_path / "model")
    file = tmp_path / "model/vae" / FILES[VAE]
    new = load_file(file)
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old = {}
    for key, tensor in new.items():
        for today, before in names.items():
            key = key.replace(today, before)
        old[key] = tensor
    assert old.keys() != new.keys()
    save_file(old, file, metadata={"format": "pt"})
    read = read_model(tmp_path / "model").parts[VAE].tensors
    assert read.keys() == new.keys() and all(torch.equal(read[k], new[k]) for k in new)
    assert (
        diffusers.AutoencoderKL.from_pretrained(tmp_path / "model/vae").state_dict().keys() == new.keys()
    )  # who also knows them


@pytest.mark.parametrize(("channels", "name"), [(5, "StableDiffusionInpaintPipeline"), (1, "LatentDiffusionPipeline")])
def test_further_channels_are_an_inpainting_model_or_said_to_be_unknown(
    tmp_path: Path, channels: int, name: str
) -> None:
    from ldm.config import UNetConfig
    from ldm.models.unet import UNet

    pipe = make("eps")
    config = UNetConfig((32, 64), 1, (1,), (2,), groups=8, concat_channels=channels)
    pipe.unet = UNet(config, 4, 4, pipe.unet.context_dim).eval()
    pipe.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model/model_index.json").read_text())["_class_name"] == name
    again = Pipeline.from_pretrained(tmp_path / "model")
    assert again.unet.conv_in.weight.shape[1] == 4 + channels
    if channels == 5:
        diffusers.StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "model")
        assert len(again(PROMPTS)) == len(PROMPTS)
        return
    with pytest.raises(ConfigError, match="1 further channels, which are no mask and masked image"):
        again(PROMPTS)  # as of a model of depth


# ---------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    make("v").save_pretrained(folder)
    return folder


def test_convert_and_inspect(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(model), str(tmp_path / "x.safetensors"), "--verify"]) == 0
    said = capsys.readouterr().out
    assert "none missing" in said and "the same output of unet, vae, text_encoder" in said
    assert main(["convert", str(tmp_path / "x.safetensors"), str(tmp_path / "back"), "--verify"]) == 0
    assert "a table of the schedule: checked" in capsys.readouterr().out
    abouts = []
    for place in (model, tmp_path / "x.safetensors", tmp_path / "back"):
        assert main(["inspect", str(place), "--json"]) == 0
        abouts.append(json.loads(capsys.readouterr().out))
    for name in (UNET, VAE, TEXT, "process", "ldm.json"):
        assert abouts[0][name] == abouts[1][name] == abouts[2][name]
    pipe = Pipeline.from_pretrained(model)
    assert abouts[0][UNET]["parameters"] == sum(p.numel() for p in pipe.unet.parameters())
    assert abouts[0][VAE]["latent_scale"] == 1.0 and abouts[0]["process"]["target"] == "v"
    assert main(["inspect", str(model), "--no-hashes"]) == 0
    assert "sha256" not in capsys.readouterr().out


def test_a_scheduler_without_its_class_is_written_as_the_one_that_it_is_read_as(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    file = tmp_path / "model/scheduler/scheduler_config.json"
    file.write_text(
        json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "_class_name"})
    )
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "out"), "--verify"]) == 0
    assert json.loads((tmp_path / "out/model_index.json").read_text())["scheduler"] == ["diffusers", "DDIMScheduler"]
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    assert scheduler.config["prediction_type"] == "v_prediction"


def test_a_conversion_that_cannot_be_verified_leaves_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, tmp_path / "model")
    file = tmp_path / "model/tokenizer/tokenizer.json"
    about = json.loads(file.read_text())
    del about["model"]["vocab"]["z"]
    file.write_text(json.dumps(about))
    for target in (tmp_path / "out", tmp_path / "out.safetensors"):
        assert main(["convert", str(tmp_path / "model"), str(target), "--verify"]) == 4
        assert "verify: text_encoder: the tokenizer has" in capsys.readouterr().err
    assert [place.name for place in tmp_path.iterdir()] == ["model"]


def test_an_autoencoder_alone(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(model / "vae"), str(tmp_path / "vae.safetensors"), "--verify"]) == 0
    assert main(["convert", str(tmp_path / "vae.safetensors"), str(tmp_path / "vae"), "--verify"]) == 0
    before, after = read_any(model / "vae"), read_any(tmp_path / "vae")
    assert before.parts.keys() == after.parts.keys() == {VAE}
    diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert main(["sample", str(tmp_path / "vae.safetensors"), "--prompt", "x"]) == 2
    assert "an autoencoder alone, which draws nothing" in capsys.readouterr().err


def test_types_are_kept_or_cast(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = read_any(model)
    mixed = {k: v.half() if "conv" in k else v for k, v in bundle.parts[UNET].tensors.items()}
    save_file(mixed, tmp_path / "mixed.safetensors")
    half = cast(bundle, "fp16")
    assert {t.dtype for part in half.parts.values() for t in part.tensors.values()} == {torch.float16}
    assert main(["convert", str(model), str(tmp_path / "half"), "--dtype", "fp16", "--verify"]) == 0
    assert {t.dtype for t in read_any(tmp_path / "half").parts[VAE].tensors.values()} == {torch.float16}
    forget_hashes(shutil.copytree(model, tmp_path / "large"))
    file = tmp_path / "large/unet" / FILES[UNET]
    save_file({k: torch.full_like(v, 1e6) if k == "conv_in.bias" else v for k, v in load_file(file).items()}, file)
    assert main(["convert", str(tmp_path / "large"), str(tmp_path / "no"), "--dtype", "fp16"]) == 2
    assert "conv_in.bias has values that fp16 cannot hold" in capsys.readouterr().err and not (tmp_path / "no").exists()


FAULTS = {  # what is wrong with the source → exit code, words of the one line
    "missing": (4, "tensor conv_in.weight is missing"),
    "extra": (4, "conv_in.extra belongs to no part"),
    "shape": (4, "conv_in.weight is [3]"),
    "truncated": (4, FILES[UNET]),
    "no tokenizer": (4, "holds no tokenizer"),
    "unknown key": (2, "unknown key cross_atention_dim: did you mean cross_attention_dim?"),
    "pickle": (4, "safetensors"),
}


@pytest.mark.parametrize("command", ["convert", "sample", "inspect"])
@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_broken_folder_is_one_line_and_nothing_is_written(
    model: Path, tmp_path: Path, fault: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    file = broken / "unet" / FILES[UNET]
    tensors = load_file(file)
    if fault == "missing":
        del tensors["conv_in.weight"]
    elif fault == "extra":
        tensors["conv_in.extra"] = torch.zeros(3)
    elif fault == "shape":
        tensors["conv_in.weight"] = torch.zeros(3)
    save_file(tensors, file, metadata={"format": "pt"})
    if fault == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif fault == "pickle":
        torch.save(tensors, file)
    elif fault == "no tokenizer":
        shutil.rmtree(broken / "tokenizer")
        (broken / "tokenizer").mkdir()
    elif fault == "unknown key":
        config = json.loads((broken / "unet/config.json").read_text())
        (broken / "unet/config.json").write_text(json.dumps({**config, "cross_atention_dim": 3}))
    target = tmp_path / "target"
    arguments = {
        "convert": [str(broken), str(target)],
        "sample": [str(broken), "--prompt", "x", "--out", str(target)],
        "inspect": [str(broken)],
    }
    code, words = FAULTS[fault]
    assert main([command, *arguments[command]]) == code
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert not target.exists() or not any(target.iterdir())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("there", "exists already"),
        ("file.safetensors", "exists already"),
        ("new.ckpt", "pickled files are read, never written"),
    ],
)
def test_nothing_is_overwritten_nor_pickled(
    model: Path, tmp_path: Path, target: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").write_text("mine")
    (tmp_path / "file.safetensors").write_text("mine")
    assert main(["convert", str(model), str(tmp_path / target)]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "there/file").read_text() == (tmp_path / "file.safetensors").read_text() == "mine"


def test_verify_finds_what_has_changed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = read_any(model)
    for fault, message in (
        ("value", "conv_in.bias has changed"),
        ("config", "unet computes another output"),
        ("name", "conv_in.bias is missing"),
        ("tokenizer", "verify: text_encoder: the tokenizer has"),
    ):
        target = tmp_path / fault
        write_model(source, target)
        file = target / "unet" / FILES[UNET]
        tensors = load_file(file)
        if fault == "value":
            tensors["conv_in.bias"][0] += 1e-7
        elif fault == "name":
            tensors["other"] = tensors.pop("conv_in.bias")
        save_file(tensors, file)
        if fault == "tokenizer":
            about = json.loads((target / "tokenizer/tokenizer.json").read_text())
            del about["model"]["vocab"]["z"]
            (target / "tokenizer/tokenizer.json").write_text(json.dumps(about))
        if fault == "config":
            config = json.loads((target / "unet/config.json").read_text())
            (target / "unet/config.json").write_text(json.dumps({**config, "attention_head_dim": 4}))
        with pytest.raises(FolderError, match=message):
            conversion.verify(source, target)


def test_saving_into_the_folder_that_is_open(model: Path, tmp_path: Path) -> None:
    """Its weights are mapped from the very files that are replaced."""
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    pipe = Pipeline.from_pretrained(folder)
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    nn.init.zeros_(pipe.unet.conv_in.bias)
    pipe.save_pretrained(folder)
    again = Pipeline.from_pretrained(folder).unet.state_dict()
    assert (
        all(torch.equal(again[k], v) for k, v in before.items() if k != "conv_in.bias")
        and not again["conv_in.bias"].any()
    )


def test_a_checkpoint_of_compvis_through_the_command(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A .ckpt as others write it: no header of ours, EMA copies, counters; what it does not say is given."""
    tensors, _ = to_compvis(read_any(model))
    ema = {
        "model_ema." + k.removeprefix("model.").replace(".", ""): v + 1
        for k, v in tensors.items()
        if k.startswith("model.diffusion_model.")
    }
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(3)}
    torch.save({"state_dict": {**tensors, **ema, **counters}, "global_step": 3, "epoch": 1}, tmp_path / "model.ckpt")
    say = [
        "--prediction",
        "v",
        "--heads",
        "2",
        "--groups",
        "8",
        "--vae-groups",
        "8",
        "--image-size",
        "16",
        "--text-heads",
        "2",
        "--text-act",
        "quick_gelu",
    ]
    file, folder = str(tmp_path / "model.ckpt"), str(tmp_path / "folder")
    assert main(["convert", file, folder]) == 2 and "give vae_groups" in capsys.readouterr().err
    assert main(["convert", file, folder, *say]) == 2
    assert (
        "holds no tokenizer" in (said := capsys.readouterr().err)
        and "--tokenizer" in said
        and not Path(folder).exists()
    )
    assert main(["convert", file, folder, *say, "--tokenizer", str(model), "--verify"]) == 0
    said = capsys.readouterr().out
    assert "turned back" in said and "EMA" in said
    taken, raw = read_any(folder).parts[UNET].tensors, read_any(model).parts[UNET].tensors
    assert all(torch.equal(taken[k], v + 1) for k, v in raw.items())
    assert (
        main(["convert", file, str(tmp_path / "raw"), *say, "--tokenizer", str(model), "--weights", "raw", "--verify"])
        == 0
    )
    kept = read_any(tmp_path / "raw").parts[UNET].tensors
    assert all(torch.equal(kept[k], v) for k, v in raw.items())
    assert (
        main(
            ["sample", str(tmp_path / "raw"), "--prompt", PROMPTS[0], "--steps", "2", "--out", str(tmp_path / "images")]
        )
        == 0
    )
    assert main(["sample", file, "--prompt", "x"]) == 2 and "ldm convert" in capsys.readouterr().err


def test_an_openclip_file_pads_with_token_0(model: Path, tmp_path: Path) -> None:
    """open_clip fills a caption up with zeros, which are the token "!"; a tokenizer of CLIP's says end of text."""
    bundle = read_any(model)
    text = replace(bundle.parts[TEXT], config={**bundle.parts[TEXT].config, "hidden_act": "gelu"})
    tensors, _ = to_compvis(replace(bundle, parts={**bundle.parts, TEXT: text}), openclip=True)
    write_tensors(tmp_path / "model.safetensors", tensors)
    sizes = {
        "heads": 2,
        "groups": 8,
        "vae_groups": 8,
        "image_size": 16,
        "text_heads": 2,
        "text_layers": 1,
        "text_act": "gelu",
    }
    encoder = read_model(tmp_path / "model.safetensors", prediction="v", tokenizer=str(model), **sizes)
    ids = text_of(encoder, tmp_path).tokenize(["", PROMPTS[0]])[0]
    start, end = ids[0, :2].tolist()
    assert ids[0, 2:].tolist() == [0] * (ids.shape[1] - 2) and (ids[1] == end).sum() == 1 and ids[1, 0] == start
    plain = text_of(bundle, model).tokenize([""])[0]
    assert plain[0, 1:].tolist() == [end] * (ids.shape[1] - 1)
    with pytest.raises(ConfigError, match="is for single files"):
        read_model(model, prediction="v")


def test_a_lora_is_no_model(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"unet.conv_in.lora_A.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    (tmp_path / "run").mkdir()
    Reference(tmp_path / "run", model, "0", {}).write()
    for path in ("lora.safetensors", "run"):
        assert main(["inspect", str(tmp_path / path)]) == 2
        assert "is a LoRA" in (said := capsys.readouterr().err) and "--lora" in said


@pytest.mark.parametrize(
    ("source", "options", "code", "words"),
    [
        ("vae.safetensors", ["--scale", "nan"], 2, "scale must be at least"),
        ("vae.safetensors", ["--vae-groups", "0"], 2, "vae_groups must be at least 1"),
        ("model/vae", ["--heads", "4"], 2, "heads is for single files"),
        ("model/vae", ["--shard-size", "nan"], 2, "--shard-size must be above 0"),
        ("model/unet", [], 4, "one part of a pipeline (a UNet2DConditionModel)"),
        ("model/text_encoder", [], 4, "one part of a pipeline"),
        ("parts", [], 4, "holds unet/ but no model_index.json"),
        ("empty", [], 4, "holds no model: expected model_index.json"),
        ("page.safetensors", [], 4, "should be safetensors and holds something unknown"),
    ],
)
def test_a_wrong_call_is_one_line(
    model: Path,
    tmp_path: Path,
    source: str,
    options: list[str],
    code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(model, tmp_path / "model")
    shutil.copytree(model, tmp_path / "parts")
    (tmp_path / "parts/model_index.json").unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "page.safetensors").write_text("<html><body>Not found</body></html>")
    save_file(to_compvis(read_any(model / "vae"))[0], tmp_path / "vae.safetensors")
    assert main(["convert", str(tmp_path / source), str(tmp_path / "target"), *options]) == code
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not (tmp_path / "target").exists()


def test_a_folder_does_not_take_its_own_copy(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(shutil.copytree(model, tmp_path / "model"))
    assert main(["convert", str(source), str(source / "unet/x.safetensors")]) == 2
    assert "lies inside" in capsys.readouterr().err and not (source / "unet/x.safetensors").exists()


def test_parts_of_a_single_file_serve_in_training(model: Path, tmp_path: Path) -> None:
    """What `text:`, `autoencoder:` and `init:` of a configuration name."""
    write_model(read_any(model), file := tmp_path / "model.safetensors")
    assert read_text(file).hash == read_text(model).hash
    assert autoencoder_config(file) == autoencoder_config(model)
    a, b = load_codec(file), load_codec(model)
    assert (a.scale, a.shift) == (b.scale, b.shift) and a.files == (file,)
    assert all(torch.equal(v, b.autoencoder.state_dict()[k]) for k, v in a.autoencoder.state_dict().items())
    mine, theirs_ = (load_unet(ModelInfo.read(place)).state_dict() for place in (file, model))
    assert all(torch.equal(v, theirs_[k]) for k, v in mine.items())


def test_a_reader_that_has_enough_is_no_fault(model: Path) -> None:
    """`ldm inspect MODEL | head -1`."""
    command = f"{sys.executable} -m ldm.cli.main inspect {model} --no-hashes | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == "" and done.stdout.splitlines()[-1] == "0"
