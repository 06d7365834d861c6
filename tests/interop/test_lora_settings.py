"""The settings of a LoRA beside peft's reading of them: the same output, or refused by name."""

from __future__ import annotations

import json
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.loras import close, inputs, out, pipe, sampled, written  # noqa: F401

from ldm.config import UNetConfig
from ldm.errors import FolderError
from ldm.interop import lora_settings
from ldm.interop.bundle import UNET
from ldm.interop.lora import FILE, METADATA, PEFT_CONFIG, read_lora
from ldm.models.unet import UNet
from ldm.pipeline import Pipeline

TARGETS = ["to_q", "to_v", "conv1"]
SIZE = {"r": 4, "lora_alpha": 6}


@pytest.fixture(scope="module")
def saved(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain adapter."""
    folder = tmp_path_factory.mktemp("saved")
    adapter(written, folder)
    return folder


def adapter(written: Path, folder: Path, **settings: Any) -> torch.Tensor:
    """Write an adapter by peft after a little training; what peft's own model computes that loads it."""
    torch.manual_seed(0)
    network: Any = diffusers.UNet2DConditionModel.from_pretrained(written / "unet")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that peft does not take for linear layers
        wrapped: Any = peft.get_peft_model(network, peft.LoraConfig(**{"target_modules": TARGETS, **SIZE, **settings}))
    trained = [
        p
        for name, p in wrapped.named_parameters()
        if "lora_" in name or "modules_to_save" in name or (p.requires_grad and "bias" in name)
    ]
    for parameter in trained:
        parameter.data += 0.1 * torch.randn_like(parameter)
    wrapped.save_pretrained(folder)
    return loaded(written, folder)


def loaded(written: Path, folder: Path) -> torch.Tensor:
    network: Any = diffusers.UNet2DConditionModel.from_pretrained(written / "unet")
    x, t, context = inputs()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(network, folder)(x, t, context).sample


PLAIN: list[dict[str, Any]] = [
    {},
    {"init_lora_weights": False},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "Gaussian"},
    {"init_lora_weights": "orthogonal", "target_modules": ["to_q", "to_v"]},
    {"init_lora_weights": "mica", "target_modules": ["to_q", "to_v"]},
    {"use_rslora": True},
    {"lora_dropout": 0.5},
    {"fan_in_fan_out": True, "target_modules": ["to_q", "to_v"]},
    {"exclude_modules": ["attn1.to_q"]},
    {"target_modules": r".*attn2\.to_[qv]$"},
    {"layers_to_transform": [0], "layers_pattern": "transformer_blocks"},
    {"rank_pattern": {"attn2.to_q": 3, "to_q": 2}},  # the first that matches, in the order of the file
    {"alpha_pattern": {"to_q": 2, "attn2.to_q": 30, "attn1.to_v": 1, "to_v": 20}},
    {"alpha_pattern": {"^conv1": 30, "mid_block.resnets.0.conv1": 1, "^mid_block.resnets.1.conv1": 2}},
    {"use_rslora": True, "rank_pattern": {"to_v": 9}, "alpha_pattern": {"to_q": 1.5}},
    {"eva_config": peft.EvaConfig(), "loftq_config": {}, "ensure_weight_tying": True},
]


@pytest.mark.parametrize("settings", PLAIN, ids=[" ".join(map(str, case)) or "default" for case in PLAIN])
def test_a_plain_lora_is_what_peft_computes(
    written: Path, pipe: Pipeline, tmp_path: Path, settings: dict[str, Any]
) -> None:
    plain = out(pipe.unet)
    expected = adapter(written, tmp_path, **settings)
    pipe.load_lora(tmp_path)
    close(out(pipe.unet), expected)
    assert float((expected - plain).abs().max()) > 0.01


STARTS = ["pissa", "pissa_niter_4", "olora", "OLoRA", "loftq"]


@pytest.mark.parametrize("start", STARTS)
def test_a_start_that_was_taken_out_of_the_base_is_refused(
    written: Path, pipe: Pipeline, tmp_path: Path, start: str
) -> None:
    """With how to save it; so converted, it is what peft computes."""
    if start == "loftq":  # quantises the base with a library that is not here
        adapter(written, tmp_path / "own")
        set_config(tmp_path / "own", init_lora_weights=start, loftq_config={"loftq_bits": 4})
    else:
        adapter(written, tmp_path / "own", init_lora_weights=start, target_modules=["to_q", "to_v"])
    with pytest.raises(
        FolderError, match=f"init_lora_weights in its settings is '{start}': .*path_initial_model_for_weight_conversion"
    ):
        pipe.load_lora(tmp_path / "own")


def test_an_adapter_that_was_converted_is_what_peft_computes(written: Path, pipe: Pipeline, tmp_path: Path) -> None:
    """As the refusal says it."""
    network: Any = diffusers.UNet2DConditionModel.from_pretrained(written / "unet")
    wrapped: Any = peft.get_peft_model(
        network, peft.LoraConfig(**SIZE, target_modules=["to_q"], init_lora_weights="pissa")
    )
    wrapped.peft_config["default"].init_lora_weights = True  # else the next line takes the start out once more
    wrapped.save_pretrained(tmp_path / "start")
    wrapped.peft_config["default"].init_lora_weights = "pissa"
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    x, t, context = inputs()
    expected = wrapped(x, t, context).sample
    wrapped.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    pipe.load_lora(tmp_path / "plain")
    close(out(pipe.unet), expected)


REFUSED: list[dict[str, Any]] = [
    {"use_dora": True},
    {"velora_config": {"num_groups": 8}, "target_modules": ["to_q"]},
    {"lora_bias": True, "target_modules": ["to_out.0"]},
    {"bias": "all"},
    {"bias": "lora_only", "target_modules": ["to_out.0"]},
    {"modules_to_save": ["conv_in"]},
    {"kasa_config": peft.tuners.lora.config.KasaConfig(), "target_modules": ["to_q"]},
    {
        "use_bdlora": peft.tuners.lora.config.BdLoraConfig(target_modules_bd_a=["to_q"], nblocks=2),
        "target_modules": ["to_q"],
    },
    {"alora_invocation_tokens": [1, 2], "target_modules": ["to_q"], "task_type": "CAUSAL_LM"},
]


@pytest.mark.parametrize("settings", REFUSED, ids=[next(iter(case)) for case in REFUSED])
def test_what_is_more_than_a_lora_is_refused_by_name(
    written: Path, pipe: Pipeline, tmp_path: Path, settings: dict[str, Any]
) -> None:
    plain, name = out(pipe.unet), next(iter(settings))
    if name == "alora_invocation_tokens":  # peft's model needs the tokens to compute
        adapter(written, tmp_path)
        set_config(tmp_path, **settings)
    else:
        adapter(written, tmp_path, **settings)
    with pytest.raises(FolderError, match=f"{name} in its settings is ") as caught:
        pipe.load_lora(tmp_path)
    assert "\n" not in str(caught.value) and torch.equal(out(pipe.unet), plain)


def set_config(folder: Path, **settings: Any) -> None:
    file = folder / PEFT_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


VALUES: dict[str, Any] = {
    "init_lora_weights": "corda", "use_qalora": True, "monteclora_config": {"num_samples": 8},
    "arrow_config": {"top_k": 3},
    "trainable_token_indices": [1], "target_parameters": ["a.b"], "layer_replication": [[0, 2]],
    "megatron_config": {"a": 1},
    "peft_type": "ADALORA", "a_setting_of_tomorrow": 0.5, "use_rslora": "false", "rank_pattern": [1],
    "alpha_pattern": {"to_q": None},
    "lora_alpha": float("nan"), "r": True,
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_other_values_are_refused_by_name(saved: Path, tmp_path: Path, name: str) -> None:
    """In peft's adapter_config.json and in the header of diffusers' files, before a tensor is looked at."""
    config = json.loads((saved / PEFT_CONFIG).read_text()) | {name: VALUES[name]}
    tensors = load_file(saved / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / PEFT_CONFIG).write_text(json.dumps(config))
    renamed = {key.replace("base_model.model.", "unet."): value for key, value in tensors.items()}
    save_file(renamed, tmp_path / FILE, {METADATA: json.dumps({f"unet.{key}": value for key, value in config.items()})})
    said = "is not a finite number" if name in ("lora_alpha", "r", "alpha_pattern") else f"{name} in its settings"
    with torch.device("meta"):
        network = UNet(UNetConfig((16, 32), 1, (1,), (2,), groups=8), 4, 4, 32)
    for place in (tmp_path / "adapter_model.safetensors", tmp_path / FILE):
        with pytest.raises(FolderError, match=said):
            read_lora(place, {UNET: network})


def test_every_setting_of_peft_is_known_here_or_refused_when_it_is_set() -> None:
    """A field that a new release adds is none of those that are ignored."""
    known = {
        *lora_settings.READ,
        *lora_settings.IGNORED,
        *lora_settings.KINDS,
        "init_lora_weights",
        "peft_type",
        "bias",
    }
    assert {field.name for field in fields(peft.LoraConfig)} - known == set()
    defaults = json.loads(json.dumps(peft.LoraConfig().to_dict(), default=list))
    assert lora_settings.settings_of("unet", {f"unet.{key}": value for key, value in defaults.items()}, "x")["r"] == 8


def test_settings_of_another_model_are_refused(saved: Path, pipe: Pipeline, tmp_path: Path) -> None:
    tensors = {
        key.replace("base_model.model.", "unet."): value
        for key, value in load_file(saved / "adapter_model.safetensors").items()
    }
    save_file(tensors, tmp_path / FILE, {METADATA: json.dumps({"transformer.r": 4})})
    with pytest.raises(FolderError, match=r"transformer\.r in its settings is of neither unet nor text_encoder"):
        pipe.load_lora(tmp_path / FILE)


def test_keys_of_peft_need_its_settings_whatever_the_file_is_called(
    written: Path, pipe: Pipeline, tmp_path: Path
) -> None:
    """α is in adapter_config.json alone: without it the scale would be guessed."""
    expected = adapter(written, tmp_path)
    other = (tmp_path / "adapter_model.safetensors").rename(tmp_path / "my_lora.safetensors")
    pipe.load_lora(other)
    close(out(pipe.unet), expected)
    (tmp_path / PEFT_CONFIG).unlink()
    pipe = Pipeline.from_pretrained(written, "cpu")
    with pytest.raises(FolderError, match=r"adapter_config\.json is missing"):
        pipe.load_lora(other)


def test_the_command_line_says_it_in_one_line(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter(written, tmp_path / "a", modules_to_save=["conv_in"])
    assert sampled(written, tmp_path / "a", tmp_path / "o") == 4
    error = capsys.readouterr().err
    assert "modules_to_save in its settings is ['conv_in']: a layer trained and saved whole is not offered" in error
    assert error.count("\n") == 1 and not list(tmp_path.glob("o/*.png"))
