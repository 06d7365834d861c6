"""A model folder without its autoencoder or text encoder is refused before anything is drawn, and one can be given."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.model_folders import folder, written  # noqa: F401
from support.pipelines import PROMPTS, array, make

from ldm.cli.main import main
from ldm.config import ConfigError
from ldm.errors import FolderError
from ldm.interop.bundle import TEXT, UNET, VAE
from ldm.pipeline import Pipeline
from ldm.pipeline.info import ModelInfo


def edit(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def index(folder: Path, part: str) -> None:
    edit(folder / "model_index.json", **{part: [None, None]})


def removed(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)


def foreign(folder: Path, part: str) -> None:
    index(folder, part)
    (folder / "ldm.json").unlink()


def ours_without_hashes(folder: Path, part: str) -> None:
    """By the channels, or by the width that the U-Net takes."""
    foreign(folder, part)
    edit(folder / "model_index.json", _class_name="LatentDiffusionPipeline")


Way = Callable[[Path, str], None]
WAYS = [index, removed, foreign, ours_without_hashes]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("part", "option", "name"), [(VAE, "vae", "autoencoder"), (TEXT, "text", "text encoder")])
def test_what_is_missing_is_said_before_anything_is_drawn(
    folder: Path, written: Path, part: str, option: str, name: str, way: Way, capsys: Any, monkeypatch: Any
) -> None:
    expected = array(Pipeline.from_pretrained(folder, "cpu")(PROMPTS[:2], seed=3))
    way(folder, part)
    with pytest.raises(FolderError, match=rf"has no {name}, but .* by --{option} PATH"):
        ModelInfo.read(folder)
    assert ModelInfo.read(folder, whole=False).schedule.num_steps == 1000
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "from_pretrained", lambda *_: pytest.fail("opened"))
        out = folder.parent / "o"
        for command in (["sample", str(folder), "--out", str(out)], ["convert", str(folder), str(out)]):
            assert main(command) == 4
            said = capsys.readouterr().err
            assert f"has no {name}" in said and said.count("\n") == 1
        assert not out.exists()
    assert main(["inspect", str(folder), "--no-hashes", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["lacks"]) == [name]
    again = Pipeline.from_pretrained(folder, "cpu", **{option: str(written)})  # type: ignore[arg-type]
    scale = Pipeline.from_pretrained(written, "cpu").defaults.guidance_scale
    drawn = array(again(PROMPTS[:2], seed=3, steps=5, guidance_scale=scale, sampler="ddim"))
    assert (drawn == expected).all()


def test_the_commands_take_parts_from_elsewhere(folder: Path, written: Path, tmp_path: Path, capsys: Any) -> None:
    removed(folder, VAE)
    removed(folder, TEXT)
    given = ["--vae", str(written / VAE), "--text", str(written)]
    out = tmp_path / "o"
    assert main(["sample", str(folder), "--prompt", PROMPTS[0], *given, "--out", str(out), "--device", "cpu"]) == 0
    (picture,) = out.glob("*.png")
    assert (np.asarray(Image.open(picture)) == array(Pipeline.from_pretrained(written, "cpu")(PROMPTS[:1]))[0]).all()
    capsys.readouterr()
    assert main(["reproduce", str(picture)]) == 0
    assert "identical" in capsys.readouterr().out
    assert main(["reproduce", str(picture), "--vae", str(tmp_path / "nowhere")]) == 4
    for target in ("new", "new.safetensors"):
        assert main(["convert", str(folder), str(tmp_path / target), *given, "--verify"]) == 0
        drawn = array(Pipeline.from_pretrained(tmp_path / target, "cpu")(PROMPTS[:1]))
        assert (drawn == np.asarray(Image.open(picture))).all()
    chain = ["--prompt", "a", "--steps", "2", "--out", str(tmp_path / "chain.png")]
    assert main(["plot", "reverse", str(folder), *given, *chain]) == 0
    assert main(["inspect", str(folder), *given, "--no-hashes"]) == 0
    assert "lacks" not in capsys.readouterr().out


def test_another_autoencoder_takes_the_place_of_the_models_own(folder: Path, tmp_path: Path) -> None:
    other = make()
    assert other.codec is not None
    other.codec.autoencoder.decoder.conv_out.bias.data += 0.5
    other.save_pretrained(tmp_path / "other")
    drawn = array(Pipeline.from_pretrained(folder, "cpu", vae=str(tmp_path / "other"))(PROMPTS[:1]))
    own = array(Pipeline.from_pretrained(folder, "cpu")(PROMPTS[:1]))
    assert (drawn == array(other(PROMPTS[:1]))).all() and (drawn != own).any()


def test_parts_of_two_models_are_told_apart(folder: Path, tmp_path: Path) -> None:
    from autoencoder.config import AutoencoderConfig
    from autoencoder.model import AutoencoderKL
    from ldm.pipeline.codec import LatentCodec

    other = make(text=False, codec=False)
    other.save_pretrained(tmp_path / "pixels")
    with pytest.raises(FolderError, match="autoencoder's latents have 4 channels, and the U-Net predicts 3"):
        ModelInfo.read(tmp_path / "pixels", vae=str(folder))
    with pytest.raises(FolderError, match="there is a text encoder, and the U-Net takes no caption"):
        ModelInfo.read(tmp_path / "pixels", text=str(folder))
    wide = make()
    wide.codec = LatentCodec(AutoencoderKL(AutoencoderConfig(3, 8, (16, 32), 1, 8)))
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(FolderError, match="autoencoder's latents have 8 channels, and the U-Net predicts 4"):
        ModelInfo.read(folder, vae=str(tmp_path / "wide"))
    with pytest.raises(FolderError, match=r"width 32, and the U-Net takes 48"):
        edit(folder / UNET / "config.json", cross_attention_dim=48)
        ModelInfo.read(folder)


def test_models_made_without_these_parts_open(tmp_path: Path) -> None:
    for codec in (True, False):
        for text in (True, False):
            place = tmp_path / f"{codec}{text}"
            make(codec=codec, text=text).save_pretrained(place)
            assert ModelInfo.read(place).has_text == text
            (place / "ldm.json").unlink()
            assert (ModelInfo.read(place).autoencoder is not None) == codec


def test_a_single_file_of_a_unet_alone(folder: Path, written: Path, tmp_path: Path, capsys: Any) -> None:
    removed(folder, VAE)
    assert main(["convert", str(folder), str(tmp_path / "x.safetensors")]) == 0  # it may be completed later
    with pytest.raises(FolderError, match=r"has no autoencoder, but ldm\.json has the hash of one"):
        ModelInfo.read(tmp_path / "x.safetensors")
    (folder / "ldm.json").unlink()
    assert main(["convert", str(folder), str(tmp_path / "y.safetensors")]) == 0
    with pytest.raises(FolderError, match="has no autoencoder, but its U-Net predicts 4 channels"):
        ModelInfo.read(tmp_path / "y.safetensors")
    whole = Pipeline.from_pretrained(tmp_path / "y.safetensors", "cpu", vae=str(written))
    expected = Pipeline.from_pretrained(written, "cpu")(PROMPTS[:1], steps=2, guidance_scale=1.0)
    assert (array(whole(PROMPTS[:1], steps=2, guidance_scale=1.0)) == array(expected)).all()


@pytest.mark.parametrize("option", ["vae", "text"])
def test_what_cannot_be_given_is_one_line(
    folder: Path, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "empty"):
        command = ["sample", str(folder), "--prompt", "a", f"--{option}", str(path), "--out", str(tmp_path / "o")]
        assert main(command) == 4
        said = capsys.readouterr().err
        assert str(path) in said and said.count("\n") == 1
    with pytest.raises(ConfigError, match=f"{option} is for models with a U-Net"):
        from ldm.interop.open import read_any

        read_any(folder / VAE, **{option: str(folder)})  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["--heads 3", "--tokenizer x", "--weights ema", "--scale 2", "--variant fp16"])
@pytest.mark.parametrize("command", [["inspect"], ["convert", "TARGET"]])
def test_options_of_a_file_that_is_missing_say_that_it_is(
    tmp_path: Path, command: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "nowhere.ckpt"
    assert main([command[0], str(missing), *(str(tmp_path / a) for a in command[1:]), *option.split()]) == 4
    assert capsys.readouterr().err == f"ldm {command[0]}: no run or model folder {missing}\n"


def test_a_finetune_of_an_incomplete_model_is_refused(folder: Path) -> None:
    """init, and a classifier's diffusion model, are read alike."""
    foreign(folder, VAE)
    with pytest.raises(FolderError, match="every StableDiffusionPipeline has one"):
        ModelInfo.read(str(folder))
