"""Other programs' single files: other spellings of names are read, other kinds of models named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from support.single_files import openclip_file, scheduler, text_config, text_part, unet_part, vae_part
from torch import Tensor

from autoencoder.config import AutoencoderConfig
from ldm.cli.main import main
from ldm.config import ConfigError, UNetConfig
from ldm.errors import FolderError
from ldm.interop.bundle import TEXT, UNET, VAE, Bundle
from ldm.interop.compvis.layout import to_compvis
from ldm.interop.compvis.spelling import spelled
from ldm.interop.diffusers.unet import unet_to_diffusers
from ldm.interop.open import read_autoencoder, read_file
from ldm.models.unet import NetworkSpec

Tensors = dict[str, Tensor]
KL = AutoencoderConfig(channels=(32, 32, 32, 64), layers_per_level=1)


@pytest.fixture(scope="module")
def model() -> Bundle:
    torch.manual_seed(0)
    unet = unet_to_diffusers(NetworkSpec(UNetConfig((32,), 1, (), (8,)), 4, 4, 768), 64)
    return Bundle({UNET: unet_part(unet), VAE: vae_part(KL), TEXT: text_part(text_config(layers=1))}, scheduler())


@pytest.fixture(scope="module")
def whole(model: Bundle) -> Tensors:
    """A file without a header of ours."""
    return to_compvis(model)[0]


def opened(file: Path, tensors: Tensors, **hints: Any) -> Bundle:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return read_file(file, **hints)


def same(one: Bundle, other: Bundle, *parts: str) -> bool:
    return all(
        one.parts[part].tensors.keys() == other.parts[part].tensors.keys()
        and all(
            torch.equal(tensor, other.parts[part].tensors[name]) for name, tensor in one.parts[part].tensors.items()
        )
        for part in parts
    )


def start(prefix: str, without: str = "") -> Callable[[str], str]:
    return lambda name: prefix + name.removeprefix(without)


SPELLINGS: dict[str, Callable[[str], str]] = {
    "DistributedDataParallel": start("module."),
    "DistributedDataParallel of the U-Net": lambda name: name.replace(
        "model.diffusion_model.", "model.diffusion_model.module."
    ),
    "torch.compile": start("_orig_mod."),
    "torch.compile of each part": lambda name: name.replace("stage_model.", "stage_model._orig_mod.").replace(
        "diffusion_model.", "diffusion_model._orig_mod."
    ),
    "FSDP": lambda name: name.replace(
        "diffusion_model.", "diffusion_model._fsdp_wrapped_module._checkpoint_wrapped_module."
    ),
    "a trainer's model": start("model."),
    "a trainer's own name": start("trainer.generator."),
    "both": start("module.model._orig_mod."),
    "no text_model": lambda name: name.replace("transformer.text_model.", "transformer."),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_prefixes_that_only_stand_in_the_way_are_read(name: str, model: Bundle, whole: Tensors, tmp_path: Path) -> None:
    spelling = {SPELLINGS[name](key): tensor for key, tensor in whole.items()}
    assert spelling.keys() != whole.keys()
    assert same(opened(tmp_path / "a.safetensors", spelling), model, UNET, VAE, TEXT)


def test_two_tensors_of_one_name_are_refused(whole: Tensors) -> None:
    name = "model.diffusion_model.out.2.bias"
    with pytest.raises(FolderError, match="is in the file a second time under another name"):
        spelled({**whole, name.replace("out.", "module.out."): whole[name]})


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model.", "unet.", "module."])
def test_a_unet_alone(prefix: str, model: Bundle, whole: Tensors, tmp_path: Path) -> None:
    alone = {
        start(prefix, "model.diffusion_model.")(name): t
        for name, t in whole.items()
        if name.startswith("model.diffusion_model.")
    }
    bundle = opened(tmp_path / "a.safetensors", alone)
    assert bundle.parts.keys() == {UNET} and same(bundle, model, UNET)


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae.", "module.", "model._orig_mod."])
@pytest.mark.parametrize("form", ["compvis", "diffusers", "diffusers before 0.17"])
def test_an_autoencoder_alone_in_both_forms(prefix: str, form: str, model: Bundle, tmp_path: Path) -> None:
    config = {**model.parts[VAE].config}
    tensors = dict(model.parts[VAE].tensors)
    if form == "compvis":
        tensors, _ = to_compvis(Bundle({VAE: model.parts[VAE]}))
    else:
        network = diffusers.AutoencoderKL.from_config({k: v for k, v in config.items() if not k.startswith("_")})
        assert network.load_state_dict(tensors) and network.state_dict().keys() == tensors.keys()
    if "before" in form:
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for new, name in old.items():
            tensors = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in tensors.items()}
    file = tmp_path / "a.safetensors"
    assert same(opened(file, {prefix + name: tensor for name, tensor in tensors.items()}), model, VAE)
    assert read_autoencoder(file).tensors.keys() == model.parts[VAE].tensors.keys()
    if prefix == "":
        assert main(["convert", str(file), str(tmp_path / "folder"), "--verify"]) == 0


@pytest.mark.parametrize(
    "spelling",
    [
        ("cond_stage_model.model.", "cond_stage_model."),  # merges that lost a part of the prefix
        (
            "cond_stage_model.model.transformer.resblocks.",
            "cond_stage_model.model.encoder.resblocks.",
        ),  # written from names without
        ("cond_stage_model.model.transformer.resblocks.", "cond_stage_model.model.encoder.layers."),  # text_model.
    ],
)
def test_openclip_towers_without_a_part_of_their_prefix(spelling: tuple[str, str], tmp_path: Path) -> None:
    hints = {"text_heads": 2, "text_layers": 3}
    right = openclip_file()
    expected = opened(tmp_path / "right.safetensors", right, **hints)
    wrong = {name.replace(*spelling): tensor for name, tensor in right.items()}
    assert wrong.keys() != right.keys()
    assert same(opened(tmp_path / "wrong.safetensors", wrong, **hints), expected, TEXT)


def test_numbers_of_positions_without_a_text_encoder(whole: Tensors, tmp_path: Path) -> None:
    for name in (
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "cond_stage_model.transformer.embeddings.position_ids",
    ):
        left = {key: tensor for key, tensor in whole.items() if not key.startswith("cond_stage_model.")}
        bundle = opened(tmp_path / "a.safetensors", {**left, name: torch.arange(7)[None]})
        assert bundle.parts.keys() == {UNET, VAE} and "positions" in next(iter({**bundle.unused}.values()), "") + str(
            bundle.unused
        )
        assert TEXT in opened(tmp_path / "b.safetensors", {**whole, name: torch.arange(7)[None]}).parts


# ---------------------------------------------------------------- other kinds

one = torch.zeros(1)
_UNET_NAMES = ("input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight", "out.2.weight")
OTHERS: dict[str, tuple[list[str] | Tensors, str]] = {
    "SDXL": (
        ["conditioner.embedders.0.transformer.text_model.x", "conditioner.embedders.1.model.ln_final.bias"],
        "Stable Diffusion XL:",
    ),
    "refiner": (["conditioner.embedders.0.model.ln_final.bias"], "the refiner of Stable Diffusion XL"),
    "XL U-Net": (
        {"label_emb.0.0.weight": torch.zeros(1, 2816), "input_blocks.0.0.weight": one},
        "the U-Net of Stable Diffusion XL",
    ),
    "SD 3": (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "Stable Diffusion 3"),
    "SD 3 alone": (["joint_blocks.0.x_block.attn.qkv.weight"], "Stable Diffusion 3"),
    "Flux": (["double_blocks.0.img_attn.norm.key_norm.scale"], "Flux"),
    "Flux of diffusers": (["transformer_blocks.0.attn.to_q.weight", "x_embedder.weight"], "a diffusion transformer"),
    "VQ": (["encoder.conv_in.weight", "decoder.conv_in.weight", "quantize.embedding.weight"], "a VQ autoencoder"),
    "LDM of VQ": (
        ["first_stage_model.quantize.embedding.weight", "model.diffusion_model.out.2.weight"],
        "a VQ autoencoder",
    ),
    "BERT": (["cond_stage_model.transformer.token_emb.weight"], "a latent diffusion model with a BERT text encoder"),
    "classes": (
        ["cond_stage_model.embedding.weight", "first_stage_model.quantize.embedding.weight"],
        "a class-conditional",
    ),
    "SVD": (
        ["model.diffusion_model.input_blocks.1.0.time_stack.in_layers.0.weight", "conditioner.embedders.0.open_clip.x"],
        "a video model",
    ),
    "ControlNet": (
        ["control_model.input_blocks.0.0.weight", "control_model.input_hint_block.0.weight"],
        "a ControlNet",
    ),
    "ControlNet alone": ([*_UNET_NAMES, "input_hint_block.0.weight"], "a ControlNet"),
    "ControlNet of diffusers": (
        ["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.norm1.weight"],
        "a ControlNet",
    ),
    "T2I-Adapter": (["body.0.block1.weight", "conv_in.weight"], "a T2I-Adapter"),
    "textual inversion": ({"emb_params": torch.zeros(2, 768)}, "a textual inversion"),
    "textual inversion by token": ({"<cat>": torch.zeros(768)}, "a textual inversion"),
    "textual inversion of XL": ({"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}, "a textual inversion"),
    "EMA": (
        ["model_ema.diffusion_modelinput_blocks00weight", "model_ema.decay"],
        "the EMA of a U-Net without the U-Net",
    ),
    "U-Net of diffusers": (["down_blocks.0.resnets.0.norm1.weight", "conv_in.weight"], "a U-Net in diffusers' names"),
    "text encoder": (["text_model.encoder.layers.0.layer_norm1.bias"], "only a text encoder"),
    "T5": (["encoder.block.0.layer.0.SelfAttention.k.weight"], "a T5 text encoder"),
    "optimizer": (["state.0.exp_avg", "state.0.exp_avg_sq"], "the state of an optimizer"),
    "16 channels": (["encoder.conv_in.weight", "decoder.conv_in.weight"], "an autoencoder without quant_conv"),
    "video": (
        {"encoder.conv_in.weight": torch.zeros(1, 1, 1, 1, 1), "quant_conv.weight": one},
        "an autoencoder of videos",
    ),
    "images": (
        ["embedder.model.visual.proj", "model.diffusion_model.out.2.weight"],
        "an image variation model",
    ),
    "IP-Adapter": (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "an IP-Adapter"),
}


@pytest.mark.parametrize("wrapped", ["", "module."])
@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_another_kind_is_said_to_be_that(
    name: str, wrapped: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For every command that opens a model, in one line, with the exit code of a model that is not opened."""
    names, kind = OTHERS[name]
    tensors = names if isinstance(names, dict) else dict.fromkeys(names, one)
    file = tmp_path / "other.safetensors"
    save_file({wrapped + key: tensor.clone() for key, tensor in tensors.items()}, file)
    for command in (
        ["inspect", str(file)],
        ["convert", str(file), str(tmp_path / "out")],
        ["sample", str(file), "--prompt", "a"],
    ):
        assert main(command) == 4
        said = capsys.readouterr().err
        assert f"{file} is {kind}" in said and said.count("\n") == 1, said
    with pytest.raises(FolderError, match=r"are opened$"):
        read_autoencoder(file)


def test_a_lora_is_said_to_be_one(tmp_path: Path) -> None:
    for name in (
        "lora_unet_mid_block.alpha",
        "unet.x.lora_A.weight",
        "lycoris_x.hada_w1_a",
        "diffusion_model.out.2.lokr_w1",
    ):
        save_file({name: one}, tmp_path / "a.safetensors")
        with pytest.raises(ConfigError, match="is a LoRA, not a model: draw with it by"):
            read_file(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ({"state": {0: {"exp_avg": one}}, "param_groups": [{"lr": 1.0}]}, "the state of an optimizer"),
        ({"optimizer": {"state": {}, "param_groups": []}, "epoch": 3}, "the state of an optimizer"),
        ({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(2, 768)}}, "a textual inversion"),
        (
            {"string_to_param": torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.zeros(2, 768))})},
            "a textual inversion",
        ),
        ({"image_proj": {"a": one}, "ip_adapter": {"b": one}}, "an IP-Adapter"),
        ({"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 3}, "holds no tensors"),
        ({"model": {"a": one}, "ema": {"a": one}}, "holds no state_dict: its tensors are under model, ema"),
    ],
)
def test_torch_files_of_other_kinds(content: dict[str, Any], kind: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(FolderError, match=kind) as caught:
        read_file(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)
