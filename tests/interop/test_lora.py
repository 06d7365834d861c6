"""LoRA against peft and diffusers: outputs, gradients, files of every layout, pictures; and what a wrong file says."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import pytest
import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.loras import (  # noqa: F401
    ALL,
    PROMPTS,
    TEXT_TARGETS,
    alphas,
    as_written,
    both,
    changed,
    close,
    inputs,
    networks,
    out,
    pictures,
    pipe,
    plain_keys,
    same,
    theirs,
    written,
)
from torch import Tensor

from ldm.cli.main import main
from ldm.config import ConfigError, LoraConfig, SampleConfig
from ldm.diffusion.condition import Condition
from ldm.errors import FolderError
from ldm.interop.bundle import TEXT, UNET
from ldm.interop.diffusers.lora_folder import Reference
from ldm.interop.lora import FILE, METADATA, find_lora, read_lora, write_lora
from ldm.interop.lora_settings import TOWER
from ldm.models.lora import Lora, changeable, named_layers
from ldm.pipeline import Pipeline
from ldm.pipeline.info import ModelInfo

# ---------------------------------------------------------------- the layers


@pytest.mark.parametrize("targets", [LoraConfig().targets, ALL], ids=["attention", "all"])
def test_output_and_gradients_are_those_of_peft(written: Path, pipe: Pipeline, targets: tuple[str, ...]) -> None:
    lora = changed(pipe.unet, targets)
    plain = out(pipe.unet)
    lora.attach()
    other: Any = diffusers.UNet2DConditionModel.from_pretrained(written / "unet")
    other.add_adapter(peft.LoraConfig(r=3, lora_alpha=5.0, target_modules=list(targets)))
    held = {name.replace(".default", ""): p for name, p in other.named_parameters() if ".lora_" in name}
    assert held.keys() == lora.state_dict().keys() and len(held) >= 16
    for name, value in lora.state_dict().items():
        held[name].data.copy_(value)
    x, t, context = inputs()
    expected = other(x, t, context).sample
    found = lora(x, t, Condition(context=context))
    close(found, expected)
    assert float((found - plain).detach().abs().max()) > 0.01 * float(plain.abs().max())
    for prediction in (found, expected):
        (prediction * torch.linspace(-1, 1, prediction.numel()).view_as(prediction)).sum().backward()
    for name, parameter in lora.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0
        close(parameter.grad, held[name].grad)
    assert all(p.grad is None and not p.requires_grad for p in pipe.unet.parameters())


def test_a_fresh_change_is_none_and_its_parameters_are_all_that_it_holds(pipe: Pipeline) -> None:
    plain, names = out(pipe.unet), list(pipe.unet.state_dict())
    lora = Lora.fresh(pipe.unet, LoraConfig(rank=2))
    lora.attach()
    assert torch.equal(lora(*inputs()[:2], Condition(context=inputs()[2])), plain)
    assert list(pipe.unet.state_dict()) == names
    attentions = len([name for name in names if name.endswith("to_q.weight")])
    assert len(lora.state_dict()) == len(list(lora.parameters())) == 8 * attentions
    assert all(float(change.lora_A.weight.detach().abs().max()) > 0 for change in lora.changes.values())  # type: ignore[arg-type]


def test_several_changes_live_merged_and_taken_off(pipe: Pipeline) -> None:
    plain = out(pipe.unet)
    one, two = changed(pipe.unet, ALL), changed(pipe.unet, ("to_q", "conv1"), rank=1, seed=2)
    off = one.attach(0.7), two.attach(-0.4)
    live = out(pipe.unet)
    off[1]()
    only_one = out(pipe.unet)
    assert float((live - only_one).abs().max()) > 1e-3
    off[0]()
    assert torch.equal(out(pipe.unet), plain)
    two.merge(-0.4)
    one.merge(0.7)
    close(out(pipe.unet), live)
    assert float((out(pipe.unet) - plain).abs().max()) > 1e-3


def test_a_merge_into_half_precision_rounds_once(pipe: Pipeline) -> None:
    lora = changed(pipe.unet, ("to_q",))
    name = next(iter(lora.changes))
    exact = changeable(pipe.unet)[name].weight.bfloat16().double() + lora.changes[name].matrix().double()
    pipe.unet.bfloat16()
    lora.merge()
    assert torch.equal(changeable(pipe.unet)[name].weight, exact.float().bfloat16())


def test_targets_are_ends_of_names(pipe: Pipeline) -> None:
    assert all(".attn2.to_k" in name for name in named_layers(pipe.unet, ("attn2.to_k",)))
    assert named_layers(pipe.unet, ("conv_in",)) == ["conv_in"]
    with pytest.raises(
        ConfigError, match=r"train.lora.targets: no .* layer of the U-Net is called to_w: did you mean to_"
    ):
        named_layers(pipe.unet, ("to_q", "to_w"))


# ---------------------------------------------------------------- files


def test_what_is_written_is_read(pipe: Pipeline, tmp_path: Path) -> None:
    loras = both(pipe)
    network = pipe.unet
    sizes = {
        name: (1 + i % 3, float(2 + i % 2)) for i, name in enumerate(changeable(network))
    }  # ranks and α that differ
    loras[UNET] = Lora(network, sizes)
    write_lora(loras, tmp_path / FILE)
    same(read_lora(tmp_path, networks(pipe)), as_written(loras))
    shutil.copytree(tmp_path, tmp_path / "run/model")
    assert find_lora(tmp_path / "run") == tmp_path / "run/model" / FILE


def test_what_diffusers_writes_is_read(written: Path, pipe: Pipeline, tmp_path: Path) -> None:
    """With its own metadata, which has peft's LoraConfig in full."""
    loras = both(pipe)
    other: Any = diffusers.StableDiffusionPipeline.from_pretrained(written)
    pairs = {UNET: (other.unet, ALL), TEXT: (other.text_encoder, TEXT_TARGETS)}
    for part, (network, targets) in pairs.items():
        rank, alpha = next((c.rank, c.alpha) for c in loras[part].changes.values())
        network.add_adapter(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)))  # type: ignore[arg-type]
        held = {
            name.replace(".default", "").removeprefix(TOWER): p
            for name, p in network.named_parameters()
            if ".lora_" in name
        }
        for name, value in loras[part].state_dict().items():
            held[name].data.copy_(value)
    states = {part: peft.get_peft_model_state_dict(network) for part, (network, _) in pairs.items()}
    about = {part: network.peft_config["default"].to_dict() for part, (network, _) in pairs.items()}
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path, states[UNET], convert_state_dict_to_diffusers(states[TEXT]),
        unet_lora_adapter_metadata=about[UNET], text_encoder_lora_adapter_metadata=about[TEXT],
    )  # fmt: skip
    with safe_open(tmp_path / FILE, "pt") as opened:
        assert METADATA in opened.metadata()
    same(read_lora(tmp_path, networks(pipe)), loras)


def old_names(tensors: dict[str, Tensor], alpha: dict[str, float]) -> dict[str, Tensor]:
    """diffusers before peft: attention processors, `lora_linear_layer` in the text encoder, `.lora.` elsewhere."""
    renamed = {}
    for key, value in tensors.items():
        for new, old in (("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out.0", "to_out")):
            for letter, word in (("A", "down"), ("B", "up")):
                key = key.replace(f".{new}.lora_{letter}.", f".processor.{old}_lora.{word}.")
        middle = ".lora_linear_layer." if key.startswith(TEXT) else ".lora."
        renamed[key.replace(".lora_A.", f"{middle}down.").replace(".lora_B.", f"{middle}up.")] = value
    return renamed | {f"{name}.alpha": torch.tensor(value) for name, value in alpha.items()}


def oldest_text_names(tensors: dict[str, Tensor], alpha: dict[str, float]) -> dict[str, Tensor]:
    renamed = old_names(tensors, alpha)
    for new, old in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out")):
        renamed = {key.replace(f".{new}.lora_linear_layer.", f".{old}_lora."): value for key, value in renamed.items()}
    return renamed


def kohya_names(tensors: dict[str, Tensor], alpha: dict[str, float], encoder: str = "lora_te1") -> dict[str, Tensor]:
    """By diffusers' own converter, which gives every layer its rank as α."""
    named = {k.replace(".lora_", "@").replace(".", "_").replace("@", ".lora_"): v for k, v in alpha.items()}
    converted = convert_state_dict_to_kohya(dict(tensors))
    for key in [key for key in converted if key.endswith(".alpha")]:
        module = key.removesuffix(".alpha").replace("lora_te1_", "text_encoder_").replace("lora_unet_", "unet_")
        converted[key] = torch.tensor(named[module], dtype=torch.float16)
    return {key.replace("lora_te1", encoder): value for key, value in converted.items()}


LAYOUTS: dict[str, Callable[[dict[str, Tensor], dict[str, float]], dict[str, Tensor]]] = {
    "peft": lambda tensors, alpha: tensors | {f"{name}.alpha": torch.tensor(value) for name, value in alpha.items()},
    "processors": old_names,
    "oldest": oldest_text_names,
    "kohya": kohya_names,
    "kohya-te": lambda tensors, alpha: kohya_names(tensors, alpha, "lora_te"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(pipe: Pipeline, tmp_path: Path, layout: str) -> None:
    loras = both(pipe)
    tensors = LAYOUTS[layout](plain_keys(loras), alphas(loras))
    assert (set(tensors) & set(plain_keys(loras)) == set()) == (layout != "peft")
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "any.safetensors")
    same(read_lora(tmp_path / "any.safetensors", networks(pipe)), loras)


def test_a_file_of_kohya_is_the_same_to_us_and_to_diffusers(written: Path, pipe: Pipeline, tmp_path: Path) -> None:
    lora = {UNET: changed(pipe.unet, LoraConfig().targets)}
    save_file(kohya_names(plain_keys(lora), alphas(lora)), tmp_path / "kohya.safetensors")
    pipe.load_lora(tmp_path / "kohya.safetensors")
    other: Any = diffusers.StableDiffusionPipeline.from_pretrained(written)
    other.load_lora_weights(tmp_path / "kohya.safetensors")
    x, t, context = inputs()
    close(out(pipe.unet), other.unet(x, t, context).sample)


def test_a_folder_of_peft_is_read_with_its_scaling(written: Path, pipe: Pipeline, tmp_path: Path) -> None:
    """rsLoRA, ranks and α that differ between layers, as peft's own model computes them."""
    other: Any = diffusers.UNet2DConditionModel.from_pretrained(written / "unet")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "to_v"], rank_pattern={"attn2.to_q": 2}, alpha_pattern={"to_v": 3},
        use_rslora=True,
        init_lora_weights=False,
    )  # fmt: skip
    wrapped: Any = peft.get_peft_model(other, config)
    wrapped.save_pretrained(tmp_path)
    pipe.load_lora(tmp_path)
    x, t, context = inputs()
    close(out(pipe.unet), wrapped(x, t, context).sample)


def test_a_linear_layer_and_a_1x1_convolution_stand_for_each_other(pipe: Pipeline, tmp_path: Path) -> None:
    lora = changed(pipe.unet, ("proj_in", "to_q"))
    flat = {
        f"unet.{k}": v.flatten(1) if "proj_in" in k else v[:, :, None, None].contiguous()
        for k, v in lora.state_dict().items()
    }
    save_file(flat, tmp_path / FILE)
    found = read_lora(tmp_path, networks(pipe))[UNET]
    assert all(torch.equal(found.state_dict()[name], value) for name, value in lora.state_dict().items())
    assert next(iter(found.changes.values())).alpha == 3.0  # nothing says another: the rank


def test_pictures_are_those_of_diffusers(written: Path, pipe: Pipeline, tmp_path: Path) -> None:
    """Two LoRAs of U-Net and text encoder, by our files, live, in a call, merged, and by diffusers."""
    plain = pictures(pipe)
    write_lora(both(pipe), tmp_path / "one" / FILE)
    mixed = Lora(
        pipe.unet, {name: (1 + i % 3, 1.0 + i % 2) for i, name in enumerate(named_layers(pipe.unet, ("to_v", "conv2")))}
    )
    for parameter in mixed.parameters():
        parameter.data.normal_(std=0.2)
    write_lora({UNET: mixed}, tmp_path / "two" / FILE)
    settings = {"lora": (f"{tmp_path}/one:0.8", f"{tmp_path}/two:0.5")}
    called = pictures(pipe, **settings)
    assert np.abs(called - plain).max() > 20
    assert (pictures(pipe) == plain).all()  # a call leaves nothing behind
    pipe.load_lora(tmp_path / "one", 0.8)
    pipe.load_lora(tmp_path / "two", 0.5)
    assert (pictures(pipe) == called).all()
    pipe.merge_lora()
    assert np.abs(pictures(pipe) - called).max() <= 1
    assert np.abs(called - theirs(written, (tmp_path / "one", 0.8), (tmp_path / "two", 0.5))).max() <= 1


def test_a_model_with_live_changes_is_not_written_and_has_a_hash_of_its_own(pipe: Pipeline, tmp_path: Path) -> None:
    write_lora({UNET: changed(pipe.unet, ("to_q",))}, tmp_path / FILE)
    hashes = [pipe.hash]
    for scale in (1.0, 0.5):
        pipe.load_lora(tmp_path, scale)
        hashes.append(pipe.hash)
    assert len(set(hashes)) == 3
    with pytest.raises(ConfigError, match="live LoRAs cannot be written: merge_lora"):
        pipe.save_pretrained(tmp_path / "model")
    pipe.merge_lora()
    pipe.save_pretrained(tmp_path / "model")
    again = Pipeline.from_pretrained(tmp_path / "model", "cpu")
    close(out(again.unet), out(pipe.unet))
    assert again.hash == pipe.hash  # the files hold all of it


# ---------------------------------------------------------------- a folder that is only a LoRA


@pytest.fixture
def reference(written: Path, pipe: Pipeline, tmp_path: Path) -> Path:
    base = Path(shutil.copytree(written, tmp_path / "base"))
    write_lora({UNET: changed(pipe.unet, ("to_q", "to_v"))}, tmp_path / "run/model" / FILE)
    Reference(tmp_path / "run/model", base, ModelInfo.read(base).hash, {"sample_size": 16}).write()
    return tmp_path / "run"


def test_a_folder_that_is_only_a_lora_opens_its_base(pipe: Pipeline, reference: Path, tmp_path: Path) -> None:
    opened = Pipeline.from_pretrained(reference, "cpu")
    assert (pictures(opened) == pictures(pipe, lora=(str(reference),))).all()
    assert opened.hash != pipe.hash
    (tmp_path / "moved").mkdir()
    for name in ("base", "run"):
        shutil.move(tmp_path / name, tmp_path / "moved")
    assert (pictures(Pipeline.from_pretrained(tmp_path / "moved/run", "cpu")) == pictures(opened)).all()


def test_a_base_that_changed_or_is_gone_is_one_line(reference: Path, tmp_path: Path) -> None:
    weights = tmp_path / "base/unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({name: value + 1e-3 for name, value in tensors.items()}, weights, metadata={"format": "pt"})
    with pytest.raises(FolderError, match="whose weights have changed since it was trained"):
        Pipeline.from_pretrained(reference, "cpu")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(FolderError, match=r"is the LoRA of .*base, which is not there"):
        Pipeline.from_pretrained(reference, "cpu")


def test_the_command_line_draws_with_loras(
    written: Path, pipe: Pipeline, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    common = ["--prompt", PROMPTS[0], "--seed", "3", "--sampler", "ddim", "--steps", "5", "--device", "cpu"]
    assert main(["sample", str(written), "--lora", f"{reference}:0.5", *common, "--out", str(tmp_path / "o")]) == 0
    (file,) = (tmp_path / "o").glob("*.png")
    drawn = Image.open(file)
    assert json.loads(drawn.text["ldm"])["lora"] == [f"{reference}:0.5"]  # type: ignore[attr-defined]
    assert (np.asarray(drawn).astype(int) == pictures(pipe, lora=(f"{reference}:0.5",))[0]).all()
    for argument, said in ((f"{reference}:1e9", "lora must be PATH or PATH:SCALE"), (f"{tmp_path}/none:2", "no LoRA ")):
        assert main(["sample", str(written), "--lora", argument, *common, "--out", str(tmp_path / "o")]) in (2, 4)
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("entry", "pair"), [("a/b", ("a/b", 1.0)), ("a:0.5", ("a", 0.5)), ("a:b", ("a:b", 1.0)), ("a:b:-2", ("a:b", -2.0))]
)
def test_a_path_may_have_a_scale(entry: str, pair: tuple[str, float]) -> None:
    assert SampleConfig(lora=(entry,)).loras() == [pair]


# ---------------------------------------------------------------- refusals

Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def broken(
    pipe: Pipeline, change: Callable[[dict[str, Tensor]], Any], header: dict[str, Any] | None = None
) -> Callable[[Path], Path]:
    tensors = {f"unet.{name}": value.contiguous() for name, value in changed(pipe.unet, ("to_q",)).state_dict().items()}
    change(tensors)

    def write(folder: Path) -> Path:
        save_file(tensors, folder / FILE, metadata={"format": "pt", METADATA: json.dumps(header)} if header else None)
        return folder / FILE

    return write


@pytest.mark.parametrize(
    ("change", "header", "said"),
    [
        (lambda t: t.update({"unet.mid_block.nowhere.to_q.lora_A.weight": torch.ones(1, 1)}), None,
         "mid_block.nowhere.* changes no layer"),
        (lambda t: t.update({f"unet.{Q}x.lora_A.weight": torch.ones(3, 32)}), None,
         rf"\(the nearest is called unet.{Q}\)"),
        (lambda t: t.update({"position": torch.ones(1)}), None, "position changes no layer of this model"),
        (lambda t: t.pop(f"unet.{Q}.lora_B.weight"), None, f"the lora_B of {Q} is missing"),
        (lambda t: t.pop(f"unet.{Q}.lora_A.weight"), None, f"the lora_A of {Q} is missing"),
        (lambda t: t.update({f"unet.{Q}.lora_A.weight": torch.ones(3, 31)}), None,
         r"is \[3, 31\], .* should be \[3, 32\]"),
        (lambda t: t.update({f"unet.{Q}.lora_B.weight": torch.ones(32, 4)}), None,
         r"is \[32, 4\], .* should be \[32, 3\]"),
        (lambda t: t.update({f"unet.{Q}.lora_A.weight": torch.ones(0, 32)}), None, "its first dimension is the rank"),
        (lambda t: t.update({f"lora_unet_{Q.replace('.', '_')}.lora_down.weight": torch.ones(3, 32)}), None,
         "are for the same layer"),
        (lambda t: t.update({f"unet.{Q}.alpha": torch.tensor(torch.nan)}), None,
         "alpha holds 1 of 1 numbers that are not finite"),
        (lambda t: t.update({f"unet.{Q}.alpha": torch.ones(2)}), None, "should be one finite number"),
        (lambda t: t.update({f"unet.{Q}.dora_scale": torch.ones(2)}), None, "DoRA is not offered"),
        (lambda t: t.update({f"unet.{Q}.hada_w1_a": torch.ones(2)}), None, "LoHa is not offered"),
        (lambda t: t.update({f"unet.{Q}.lora_B.bias": torch.ones(32)}), None, "a LoRA with biases is not offered"),
        (lambda t: t.clear(), None, "holds no tensor"),
        (lambda t: None, {"unet.r": 4}, "has rank 3, its settings say 4"),
        (lambda t: None, {"unet.r": 3, "unet.lora_alpha": "much"}, "'much', which is not a finite number"),
        (lambda t: None, {"unet.r": 3, "unet.use_dora": True}, "use_dora in its settings is True: DoRA is not offered"),
        (lambda t: None, {"unet.r": 3, "unet.rank_pattern": {"(a+)+$": 3}}, "the pattern .* is not offered"),
        (lambda t: t.update({f"unet.{Q}.alpha": torch.tensor(2.0)}), {"unet.r": 3, "unet.lora_alpha": 3},
         "is 2, the settings .* say 3"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_line(pipe: Pipeline, tmp_path: Path, change: Any, header: Any, said: str) -> None:
    plain = out(pipe.unet)
    with pytest.raises(FolderError, match=said) as caught:
        pipe.load_lora(broken(pipe, change, header)(tmp_path))
    assert "\n" not in str(caught.value) and str(tmp_path / FILE) in str(caught.value)
    assert torch.equal(out(pipe.unet), plain)


def test_a_pickled_file_is_read_like_the_other(pipe: Pipeline, tmp_path: Path) -> None:
    """By the restricted unpickler: the same tensors, in a file of either kind, compute the same."""
    lora = Lora.fresh(pipe.unet, LoraConfig(2))
    for parameter in lora.parameters():
        parameter.data.normal_()
    write_lora({UNET: lora}, tmp_path / "a" / FILE)
    (tmp_path / "b").mkdir()
    torch.save(load_file(tmp_path / "a" / FILE), tmp_path / "b/pytorch_lora_weights.bin")
    a, b = (read_lora(tmp_path / name, {UNET: pipe.unet})[UNET].state_dict() for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_files_that_are_no_lora(pipe: Pipeline, tmp_path: Path) -> None:
    def said(path: Path) -> str:
        with pytest.raises(FolderError) as caught:
            pipe.load_lora(path)
        return str(caught.value)

    assert "no LoRA " in said(tmp_path / "nowhere")
    assert f"holds no LoRA: expected {FILE}" in said(tmp_path)
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(pickle.dumps(print))
    assert (
        "holds a pickle that torch.save did not write" in said(tmp_path) == said(tmp_path / "pytorch_lora_weights.bin")
    )
    (tmp_path / "pytorch_lora_weights.bin").unlink()
    (tmp_path / FILE).write_bytes(b"short")
    assert "should be safetensors and holds something unknown: not opened" in said(tmp_path)
    (tmp_path / FILE).unlink()
    save_file(
        {"base_model.model.conv_in.lora_A.weight": torch.ones(1, 4, 3, 3)}, tmp_path / "adapter_model.safetensors"
    )
    assert "adapter_config.json is missing" in said(tmp_path)
