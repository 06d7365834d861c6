"""NaN and infinity in the weights of a model, in its parts' outputs, in pixels: named, and no image is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.model_folders import folder, written  # noqa: F401
from support.pipelines import PROMPTS, make
from torch import Tensor

from ldm.cli.main import main
from ldm.config import ClassifierConfig
from ldm.data.transforms import to_uint8
from ldm.distributed.processes import ALONE
from ldm.errors import FolderError, NonFiniteError
from ldm.files.tensors.finite import counted, is_finite, nonfinite
from ldm.interop.bundle import TEXT, UNET, VAE
from ldm.interop.classifier import ClassifierInfo, load_classifier
from ldm.interop.convert import write_model
from ldm.interop.diffusers.folder import FILES
from ldm.interop.open import read_any
from ldm.interop.text import read_text
from ldm.pipeline import Pipeline
from ldm.pipeline.codec import load_codec
from ldm.runs.directory import RunDirectory
from ldm.training.logger import Logger
from ldm.training.skipped import SkipLog

NAN, INF = float("nan"), float("inf")
PLACES = {  # of each part: a tensor, its name there, the part as messages call it
    UNET: ("conv_out.weight", "U-Net"),
    VAE: ("decoder.conv_in.bias", "autoencoder"),
    TEXT: ("text_model.final_layer_norm.bias", "text encoder"),
}


def plant(folder: Path, part: str, value: float) -> str:
    """Put one such value into a weight of a part; returns the name of the tensor."""
    file = folder / part / FILES[part]
    tensors, name = load_file(file), PLACES[part][0]
    tensors[name].view(-1)[1] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.int64]
)
@pytest.mark.parametrize("value", [0.0, NAN, INF, -INF, 5e4])
def test_numbers_are_told_from_what_is_none(dtype: torch.dtype, value: float) -> None:
    """As torch.isfinite does it for each element, wherever it stands, and in views that are not contiguous."""
    for place in range(6):
        tensor = torch.full((6,), 3.0)
        tensor[place] = value
        if not dtype.is_floating_point:
            tensor = torch.nan_to_num(tensor, 1, 2, 3)
        tensor = tensor.to(dtype).reshape(2, 3).T
        expected = bool(torch.isfinite(tensor.double()).all())
        assert bool(is_finite(tensor)) == expected
        assert nonfinite({"a": torch.ones(2), "b": tensor, "c": torch.ones(0)}) == ([] if expected else ["b"])
    assert counted(torch.tensor([NAN, INF, 1.0, -INF])) == "1 NaN and 2 infinite of 4 values"


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("part", [UNET, VAE, TEXT])
def test_a_weight_that_is_no_number_is_named_at_opening(
    folder: Path, part: str, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    name = plant(folder, part, value)
    with pytest.raises(FolderError) as raised:
        Pipeline.from_pretrained(folder)
    message = str(raised.value)
    assert name in message and PLACES[part][1] in message and "holds 1 " in message and "\n" not in message
    out = folder.parent / "images"
    assert main(["sample", str(folder), "--prompt", "a", "--steps", "2", "--out", str(out)]) == 4
    assert name in capsys.readouterr().err and not list(out.glob("*"))


def test_the_parts_that_training_opens_are_looked_at(folder: Path) -> None:
    plant(folder, VAE, NAN)
    plant(folder, TEXT, INF)
    with pytest.raises(FolderError, match=r"autoencoder: tensor decoder\.conv_in\.bias holds 1 NaN"):
        load_codec(folder)
    with pytest.raises(FolderError, match=r"text encoder: tensor text_model\.final_layer_norm\.bias holds 1 infinite"):
        read_text(folder)


def test_a_classifier_is_looked_at(tmp_path: Path) -> None:
    schedule = make().schedule_config
    info = ClassifierInfo(ClassifierConfig(channels=(8, 8), groups=4), ("a", "b"), {"a": 0, "b": 1}, 4, schedule, None)
    network = info.make()
    next(network.parameters()).data.view(-1)[0] = NAN
    info.save(network, tmp_path / "classifier")
    with pytest.raises(FolderError, match=r"classifier\.safetensors: .*holds 1 NaN"):
        load_classifier(tmp_path)


def test_inspect_reports_them_and_verify_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = plant(folder, UNET, NAN)
    assert main(["inspect", str(folder), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    count = load_file(folder / UNET / FILES[UNET])[name].numel()
    assert about[UNET]["not_finite"] == {name: f"1 NaN of {count:,} values"}
    assert "not_finite" not in about[VAE] and "not_finite" not in about[TEXT]
    assert main(["inspect", str(folder), "--verify"]) == 4
    said = capsys.readouterr()
    assert name in said.err and said.err.count("\n") == 1 and said.out == ""
    assert main(["inspect", str(folder), "--verify", "--no-hashes"]) == 2


@pytest.mark.parametrize("options", [[], ["--verify"], ["--dtype", "bf16"]])
@pytest.mark.parametrize("target", ["new", "new.safetensors"])
def test_convert_refuses_them(
    folder: Path, target: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    name = plant(folder, VAE, INF)
    assert main(["convert", str(folder), str(folder.parent / target), *options]) == 4
    assert name in capsys.readouterr().err and not (folder.parent / target).exists()


def test_no_model_is_written_with_them(written: Path, tmp_path: Path) -> None:
    pipe = make()
    pipe.unet.conv_in.bias.data[0] = INF
    with pytest.raises(NonFiniteError, match=r"unet: conv_in\.bias holds 1 infinite"):
        pipe.save_pretrained(tmp_path / "new")
    bundle = read_any(written)
    bundle.parts[VAE].tensors["quant_conv.bias"][0] = NAN
    with pytest.raises(NonFiniteError, match=r"vae: quant_conv\.bias"):
        write_model(bundle, tmp_path / "new.safetensors")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- drawing


def spoil(function: Callable[..., Tensor], call: int, value: float = NAN) -> Callable[..., Tensor]:
    """The function, whose result of one call holds a value that is not a number."""
    calls = 0

    def spoiled(*arguments: Any, **options: Any) -> Tensor:
        nonlocal calls
        result, calls = function(*arguments, **options), calls + 1
        if calls == call:
            result = result.clone()
            result.view(-1)[-1] = value
        return result

    return spoiled


@pytest.mark.parametrize(
    ("part", "call", "message"),
    [
        ("unet", 3, "the U-Net's prediction at step 3 of 5 is not finite"),
        ("text", 1, "what the text encoder says of the caption is not finite"),
        ("decoder", 1, "what the autoencoder decodes is not finite"),
    ],
)
def test_the_part_and_the_step_are_named(part: str, call: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = make()
    assert pipe.text is not None and pipe.codec is not None
    owner = {"unet": pipe.unet, "text": pipe.text, "decoder": pipe.codec.autoencoder}[part]
    name = {"unet": "forward", "text": "encode", "decoder": "decode"}[part]
    monkeypatch.setattr(owner, name, spoil(getattr(owner, name), call))
    with pytest.raises(NonFiniteError) as raised:
        pipe(PROMPTS[:2])
    assert str(raised.value).startswith(message) and raised.value.exit_code == 5


def test_a_callback_may_spoil_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = make()
    with pytest.raises(NonFiniteError, match="the sample at step 2 of 5"):
        list(pipe.sample(PROMPTS[:1], pipe.defaults, callback=lambda step, x, x0: x * INF if step == 1 else None))


def test_half_precision_that_overflows_says_what_to_take(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipeline.from_pretrained(written, "cpu", dtype=torch.float16)
    monkeypatch.setattr(pipe.unet, "forward", spoil(pipe.unet.forward, 1, INF))
    with pytest.raises(NonFiniteError, match="its weights are float16: take dtype bfloat16 or float32"):
        pipe(PROMPTS[:1], steps=1)


def test_guides_are_named(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = make()
    info = ClassifierInfo(
        ClassifierConfig(channels=(8, 8), groups=4), ("a", "b"), {"a": 0, "b": 1}, 4, pipe.schedule_config, None
    )
    network = info.make().requires_grad_(False).eval()
    monkeypatch.setattr(pipe._guides, "classifier", lambda *_: (info, network))
    monkeypatch.setattr(network, "forward", spoil(network.forward, 2))
    with pytest.raises(NonFiniteError, match="the gradient of classifier judge at step 2 of 3"):
        pipe(["a"], steps=3, classifier="judge")
    monkeypatch.setattr(network, "forward", spoil(type(network).forward.__get__(network), 2))
    with pytest.raises(NonFiniteError, match="the gradient of classifier judge at step 2 of 3"):
        pipe(["a"], steps=3, sampler="ddpm", classifier="judge", classifier_form="mean")
    monkeypatch.setattr(pipe._guides, "weak", lambda *_: spoil(lambda x, t: torch.zeros_like(x), 1))
    with pytest.raises(NonFiniteError, match="the prediction of autoguidance weak at step 1 of 3"):
        pipe(["a"], steps=3, autoguidance="weak")


def test_the_command_writes_no_picture(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from ldm.models.unet import UNet

    monkeypatch.setattr(UNet, "forward", spoil(UNet.forward, 2))
    assert (
        main(["sample", str(written), "--prompt", "a", "--count", "2", "--steps", "3", "--out", str(tmp_path / "o")])
        == 5
    )
    said = capsys.readouterr().err
    assert "the U-Net's prediction at step 2 of 3 is not finite" in said and said.count("\n") == 1
    assert not list((tmp_path / "o").glob("*.png"))


def test_a_preview_that_is_none_does_not_end_the_training(tmp_path: Path) -> None:
    class Silent:
        def say(self, text: str) -> None: ...
        def progress(self, step: int, steps: int, values: Any) -> None: ...

    with RunDirectory(tmp_path / "run") as run:
        logger = Logger(run, 9, SkipLog([], run, Silent().say, ALONE), Silent())
        with pytest.warns(
            UserWarning, match=r"no pictures from update 3 on, training continues: NonFiniteError: pixels of a picture"
        ):
            logger.pictures(3, lambda: {"samples": to_uint8(torch.full((1, 3, 2, 2), NAN))[0]})
        assert not list((tmp_path / "run").rglob("*.png"))
        logger.pictures(4, lambda: {"samples": to_uint8(torch.zeros(1, 3, 2, 2))[0]})
        assert len(list((tmp_path / "run").rglob("*.png"))) == 1


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_no_picture_is_made_of_what_is_no_number(value: float) -> None:
    pixels = torch.zeros(1, 3, 2, 2)
    pixels[0, 1, 1, 1] = value
    with pytest.raises(NonFiniteError, match="pixels of a picture"):
        to_uint8(pixels)
    assert to_uint8(torch.full((1, 1, 1, 1), 9.0)).tolist() == np.full((1, 1, 1, 1), 255).tolist()
