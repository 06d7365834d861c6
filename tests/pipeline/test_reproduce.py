"""`ldm reproduce`: what a PNG says is enough to draw it again, and what has changed since is named."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file
from support.model_folders import forget_hashes
from support.stages import Stages

from ldm.cli import sample
from ldm.cli.main import main
from ldm.config import ClassifierConfig, ConditionConfig, LoraConfig, SampleConfig, ScheduleConfig, UNetConfig
from ldm.diffusion.conditioner import Conditioner
from ldm.interop.bundle import UNET
from ldm.interop.classifier import ClassifierInfo
from ldm.interop.lora import write_lora
from ldm.models.lora import Lora
from ldm.models.unet import UNet
from ldm.pipeline import Pipeline
from ldm.pipeline.codec import autoencoder_hash
from ldm.pipeline.provenance import Provenance, read_provenance

PROMPT = "a small red circle on a white background"
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


def stir(file: Path, amount: float) -> dict[str, torch.Tensor]:
    """The weights of a file, moved."""
    torch.manual_seed(3)
    return {name: tensor + amount * torch.randn_like(tensor) for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def place(stages: Stages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained `run` with a variant, a weaker model, a LoRA, a classifier of its latents; `pixels` of a class."""
    here = tmp_path_factory.mktemp("place")
    shutil.copytree(stages.folder / "ldm", here / "run")
    other = here / "run/model/unet/diffusion_pytorch_model.other.safetensors"
    save_file(stir(here / "run/model" / UNET_FILE, 0.1), other)
    forget_hashes(shutil.copytree(here / "run/model", here / "weak"))
    save_file(stir(here / "weak" / UNET_FILE, 0.1), here / "weak" / UNET_FILE)
    shutil.copytree(here / "run/model/vae", here / "eyes")
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(here / "run/model" / part, here / "ears" / part)
    for file in (here / "eyes/diffusion_pytorch_model.safetensors", here / "ears/text_encoder/model.safetensors"):
        save_file(stir(file, 0.1), file)
    pipe = Pipeline.from_pretrained(here / "run", "cpu")
    lora = Lora.fresh(pipe.unet, LoraConfig(rank=2))
    torch.manual_seed(2)
    for parameter in lora.parameters():
        parameter.data = 0.5 * torch.randn_like(parameter)
    write_lora({UNET: lora}, here / "style.safetensors")
    info = ClassifierInfo(
        ClassifierConfig(channels=(8, 8), groups=4),
        ("a", "b"),
        {PROMPT: 0, "b": 1},
        4,
        pipe.schedule_config,
        autoencoder_hash(here / "run"),
    )
    torch.manual_seed(0)
    network = info.make()
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    info.save(network, here / "judge/classifier")
    torch.manual_seed(1)
    kinds = Conditioner.measured([ConditionConfig("kind", "class")], [{"kind": kind} for kind in "abc"])
    small = UNet(UNetConfig((8,), 1, (), (1,), groups=4, vector_dim=kinds.width), 3, 3, None)
    for parameter in small.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    defaults = SampleConfig(steps=2)
    given = Pipeline(small, ScheduleConfig(num_steps=20), "x0", None, None, 16, defaults, conditioner=kinds)
    given.save_pretrained(here / "pixels")
    (here / "prompts.txt").write_text("a blue star ${x} “○”\n", encoding="utf-8")
    levels, hole = np.random.default_rng(0).integers(0, 256, (16, 16, 3)), np.zeros((16, 16))
    hole[4:12, 2:10] = 255
    for name, array in (("start", levels), ("other", 255 - levels), ("hole", hole)):
        Image.fromarray(array.astype(np.uint8)).save(here / f"{name}.png")
    return here


@pytest.fixture
def call(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run a command in the folder: its exit code, and what it wrote to stdout (0, 1) or stderr."""
    monkeypatch.chdir(place)

    def called(*arguments: str | Path) -> tuple[int, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        if code > 1:
            assert said.out == "" and said.err.count("\n") == 1 and "Traceback" not in said.err
        return code, said.err if code > 1 else said.out

    return called


Call = Callable[..., tuple[int, str]]


def drawn(call: Call, out: Path, *options: str, model: str = "run") -> list[Path]:
    """What `ldm sample` wrote: the pictures, then the grid if there is one."""
    has_prompt = model == "pixels" or "--prompts-file" in options or "--prompt" in options
    prompt = () if has_prompt else ("--prompt", PROMPT)
    assert call("sample", model, *prompt, *options, "--out", str(out))[0] == 0
    return sorted(out.glob("*.png"))


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(int)


def resaved(file: Path, to: Path, about: dict[str, Any] | str, array: np.ndarray | None = None) -> Path:
    """The picture with other settings or pixels."""
    info = PngInfo()
    info.add_itxt("ldm", about if isinstance(about, str) else json.dumps(about))
    Image.fromarray((pixels(file) if array is None else array).astype(np.uint8)).save(to, pnginfo=info)
    return to


def said(file: Path) -> dict[str, Any]:
    return json.loads(Image.open(file).info["ldm"])


@pytest.fixture(scope="module")
def plain(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A picture of the run and one of the model of pixels, without options."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for model, prompt in (("run", ("--prompt", PROMPT)), ("pixels", ())):
            out = tmp_path_factory.mktemp("plain")
            assert main(["sample", model, *prompt, "--out", str(out)]) == 0
            (found[model],) = out.glob("*.png")
    return found


# every option


CLASSIFIER = ("--classifier", "judge", "--classifier-scale", "40")
IMAGE = ("--image", "start.png")
MASK = (*IMAGE, "--mask", "hole.png")
# by the name of `ldm sample`: options that change the picture, and those that they need
CASES: dict[str, tuple[str, ...]] = {
    "prompt": ("--prompt", "two blue stars", "--guidance-scale", "9"),
    "prompts_file": ("--prompts-file", "prompts.txt"),
    "variant": ("--variant", "other"),
    "size": ("--size", "24"),
    "steps": ("--steps", "3"),
    "sampler": ("--sampler", "ddpm", "--steps", "4"),
    "guidance_scale": ("--guidance-scale", "30"),
    "grid": ("--grid", "karras", "--steps", "4"),
    "eta": ("--eta", "0.7", "--steps", "4"),
    "variance": ("--sampler", "ddpm", "--variance", "beta", "--steps", "4"),
    "negative_prompt": ("--negative-prompt", "two ${x} “○” blue stars", "--guidance-scale", "30"),
    "guidance_rescale": ("--guidance-scale", "30", "--guidance-rescale", "0.7"),
    "guidance_interval": ("--guidance-scale", "30", "--steps", "4", "--guidance-interval", "0.1", "2.5"),
    "value": ("--value", "kind=[a,b]"),
    "guidance_alone": ("--value", "kind=b", "--guidance-alone", "kind:9"),
    "dynamic_threshold": ("--dynamic-threshold", "0.5"),
    "autoguidance": ("--autoguidance", "weak"),
    "autoguidance_scale": ("--autoguidance", "weak", "--autoguidance-scale", "4"),
    "classifier": CLASSIFIER,
    "classifier_scale": (*CLASSIFIER[:3], "90"),
    "classifier_form": (*CLASSIFIER, "--classifier-form", "mean", "--sampler", "ddpm", "--steps", "4"),
    "lora": ("--lora", "style.safetensors:0.5", "--lora", "style.safetensors"),
    "vae": ("--vae", "eyes"),
    "text": ("--text", "ears"),
    "seed": ("--seed", str(2**63 - 1)),
    "count": ("--count", "3"),
    "batch_size": ("--count", "3", "--batch-size", "2"),
    "device": ("--device", "cpu"),
    "image": IMAGE,
    "mask": MASK,
    "strength": (*IMAGE, "--strength", "0.3"),
    "strength_by": (*IMAGE, "--strength", "0.3", "--strength-by", "steps", "--steps", "4"),
    "extend": (*IMAGE, "--extend", "4", "0", "16", "8"),
    "invert": (*IMAGE, "--invert", "--sampler", "ddim"),
    "source_prompt": (*IMAGE, "--invert", "--sampler", "ddim", "--source-prompt", "two blue stars"),
    "completion": (*MASK, "--completion", "repaint", "--steps", "6"),
    "repaint_jump": (*MASK, "--completion", "repaint", "--steps", "6", "--repaint-jump", "2"),
    "repaint_repeats": (*MASK, "--completion", "repaint", "--steps", "6", "--repaint-repeats", "2"),
    "paste": (*MASK, "--no-paste"),
    "window": ("--size", "24x40", "--window", "16"),
    "window_stride": ("--size", "24x40", "--window", "16", "--window-stride", "4"),
    "strips": ("--strips", "3"),
    "circular": ("--size", "16x40", "--window", "16", "--circular", "x", "--count", "3"),
}  # fmt: skip
OF_PIXELS = ("dynamic_threshold", "value", "guidance_alone")  # of the model of pixels, which knows a class
SAME = ("device", "strips")  # as without it


def test_every_option_has_a_case() -> None:
    parser = argparse.ArgumentParser()
    sample.add_arguments(parser)
    assert {action.dest for action in parser._actions} - {"help", "out", "model"} == set(CASES)


@pytest.mark.parametrize("option", CASES)
def test_every_option_survives(call: Call, plain: dict[str, Path], tmp_path: Path, option: str) -> None:
    """The picture is another with the option than without it, and what the PNG says is enough to draw it again."""
    model = "pixels" if option in OF_PIXELS else "run"
    files = drawn(call, tmp_path, *CASES[option], model=model)
    last = [file for file in files if not file.name.startswith("grid")][-1]
    mine, other = pixels(last), pixels(plain[model])
    assert (mine.shape != other.shape or bool(np.abs(mine - other).max() > 1)) == (option not in SAME)
    for file in dict.fromkeys((last, files[-1])):  # of several the last picture, and the grid
        code, out = call("reproduce", file)
        assert (code, out) == (0, f"{file}: identical; model {said(file)['model'][:12]} of {model}\n")


# what has changed


def test_another_model_is_refused_by_its_hash(call: Call, plain: dict[str, Path], place: Path, tmp_path: Path) -> None:
    file = plain["run"]
    shutil.copytree(place / "run/model", tmp_path / "model")
    assert call("reproduce", file, "--model", tmp_path / "model")[0] == 0  # elsewhere, but the same
    weights = tmp_path / "model" / UNET_FILE
    save_file(stir(weights, 1e-6), weights)
    forget_hashes(tmp_path / "model")
    code, error = call("reproduce", file, "--model", tmp_path / "model")
    now = Pipeline.from_pretrained(tmp_path / "model").hash
    assert code == 4 and f"has other weights than those that drew {file}" in error
    assert now[:12] in error and Pipeline.from_pretrained(place / "run").hash[:12] in error
    assert call("reproduce", file, "--model", "nowhere") == (4, "ldm reproduce: no run or model folder nowhere\n")


@pytest.mark.parametrize(
    ("name", "old", "new", "named"),
    [
        ("scheduler/scheduler_config.json", '"0.30.0"', '"0.31.0"', None),
        ("scheduler/scheduler_config.json", '"epsilon"', '"v_prediction"', "process"),
        ("scheduler/scheduler_config.json", '"beta_end": 0.012', '"beta_end": 0.013', "process"),
        ("ldm.json", '"null_caption": ""', '"null_caption": "nothing"', "null caption"),
        ("vae/config.json", '"scaling_factor": 1.0', '"scaling_factor": 0.5', "autoencoder's settings"),
        ("text_encoder/config.json", '"quick_gelu"', '"gelu"', "text encoder's settings"),
        ("tokenizer/vocab.json", "{", "{ ", "tokenizer"),
    ],
)
def test_a_model_that_changed_beside_its_weights(
    call: Call, plain: dict[str, Path], place: Path, tmp_path: Path, name: str, old: str, new: str, named: str | None
) -> None:
    file = plain["run"]
    shutil.copytree(place / "run/model", tmp_path / "model")
    changed = tmp_path / "model" / name
    assert old in changed.read_text()
    changed.write_text(changed.read_text().replace(old, new))
    code, said = call("reproduce", file, "--model", tmp_path / "model")
    assert code == (4 if named else 0) and (named is None or f"has changed since: {named}\n" in said)


@pytest.mark.parametrize(
    ("option", "file"),
    [
        ("lora", "style.safetensors"),
        ("autoguidance", f"weak/{UNET_FILE}"),
        ("classifier", "judge/classifier/classifier.safetensors"),
    ],
)
def test_a_guide_that_changed_is_named(call: Call, place: Path, tmp_path: Path, option: str, file: str) -> None:
    picture = drawn(call, tmp_path, *CASES[option])[0]
    before = (place / file).read_bytes()
    try:
        save_file(stir(place / file, 1e-3), place / file, {"lora_adapter_metadata": "{}"})
        code, error = call("reproduce", picture)
    finally:
        (place / file).write_bytes(before)
    assert code == 4 and f"{Path(file).parts[0]} has changed since it helped to draw {picture}" in error


@pytest.mark.parametrize("name", ["start.png", "hole.png"])
def test_an_image_that_changed_is_named(call: Call, place: Path, tmp_path: Path, name: str) -> None:
    picture = drawn(call, tmp_path, *MASK)[0]
    before = (place / name).read_bytes()
    try:
        shutil.copy(place / "other.png", place / name)
        code, error = call("reproduce", picture)
    finally:
        (place / name).write_bytes(before)
    assert code == 4 and f"{name} has changed since it helped to draw {picture}" in error
    (place / name).rename(tmp_path / name)
    try:
        assert call("reproduce", picture) == (4, f"ldm reproduce: {name} cannot be read: No such file or directory\n")
        code, out = call("reproduce", picture, "--moved", f"{name}={tmp_path / name}")
    finally:
        (tmp_path / name).rename(place / name)
    assert code == 0 and ": identical; model " in out


@pytest.mark.parametrize(
    ("option", "old"),
    [("lora", "style.safetensors"), ("autoguidance", "weak"), ("classifier", "judge")],
    ids=["lora", "weak", "judge"],
)
def test_a_guide_that_moved_is_named_and_must_be_the_same(
    call: Call, place: Path, tmp_path: Path, option: str, old: str
) -> None:
    picture = drawn(call, tmp_path, *CASES[option])[0]
    new = tmp_path / f"new-{old}"
    (place / old).rename(new)
    try:
        assert call("reproduce", picture)[0] in (2, 4)
        code, out = call("reproduce", picture, "--moved", f"{old}={new}")
        assert code == 0 and ": identical; model " in out
        code, error = call("reproduce", picture, "--moved", f"other={new}")
        assert code == 2 and f"--moved other: the picture names {old}" in error
        assert call("reproduce", picture, "--moved", old)[0] == 2
        for file in new.rglob("*.safetensors") if new.is_dir() else [new]:
            content = file.read_bytes()
            save_file(stir(file, 1e-3), file, {"lora_adapter_metadata": "{}"})
            code, error = call("reproduce", picture, "--moved", f"{old}={new}")
            file.write_bytes(content)
            assert code == 4 and "changed since it helped to draw" in error
            break
    finally:
        new.rename(place / old)


def test_pixels_that_changed_are_counted(call: Call, plain: dict[str, Path], tmp_path: Path) -> None:
    file = plain["run"]
    array = pixels(file)
    array[3, 4] = np.where(array[3, 4] > 127, array[3, 4] - 1, array[3, 4] + 1)
    code, out = call("reproduce", resaved(file, tmp_path / "near.png", said(file), array))
    assert code == 0 and "1 of 1,024 pixels differ, by at most 1 of 255 (within what is promised)" in out
    array[10, 4:6, 1] += np.where(array[10, 4:6, 1] > 127, -50, 50)
    code, out = call("reproduce", resaved(file, tmp_path / "far.png", said(file), array))
    assert code == 1 and "3 of 1,024 pixels differ, by at most 50 of 255;" in out
    code, out = call("reproduce", resaved(file, tmp_path / "cut.png", said(file), array[:30]))
    assert code == 1 and "it is 32×30 pixels of 3 channels and is drawn as 32×32 pixels of 3 channels" in out


def test_versions_and_device_are_told(call: Call, plain: dict[str, Path], tmp_path: Path) -> None:
    file = plain["run"]
    about = said(file)
    made = {**about["drawn"], "torch": "1.0", "threads": 64}
    code, out = call("reproduce", resaved(file, tmp_path / "a.png", {**about, "drawn": made}))
    assert code == 0 and out.splitlines()[1:] == [
        f"  drawn with torch 1.0, here {torch.__version__}",
        f"  drawn with threads 64, here {torch.get_num_threads()}",
    ]
    made = {**about["drawn"], "device": "tpu", "device_name": "T", "threads": None}
    code, out = call("reproduce", resaved(file, tmp_path / "b.png", {**about, "drawn": made}), "--device", "cpu")
    assert code == 0 and out.splitlines()[1:] == ["  drawn with device tpu, here cpu"]


def test_a_picture_of_an_older_ldm(call: Call, tmp_path: Path) -> None:
    *_, grid = files = drawn(call, tmp_path, "--count", "3")
    for number, file in enumerate(files):
        newer = ("path", "variant", "parts", "others", "drawn")
        about = {name: value for name, value in said(file).items() if name not in newer}
        old = resaved(file, tmp_path / f"old-{number}.png", about)
        code, error = call("reproduce", old)
        assert code == 2 and "does not say where its model" in error and "name it with --model" in error
        code, out = call("reproduce", old, "--model", "run")
        assert code == 0 and out.splitlines()[1:] == ["  drawn by an ldm that recorded neither versions nor device"]
    assert file == grid


def test_sums_of_a_batch_are_made_in_a_batch(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pixels depend on the batch's size and the place in it, the picture is drawn in its place of one."""
    plain = Pipeline.sample

    def dependent(self: Pipeline, prompts: list[str], settings: SampleConfig, **options: Any) -> Iterator[torch.Tensor]:
        for images in plain(self, prompts, settings, **options):
            yield images * 0.5 + 0.02 * len(images) + 0.05 * torch.arange(len(images)).view(-1, 1, 1, 1)

    monkeypatch.setattr(Pipeline, "sample", dependent)
    files = drawn(call, tmp_path, "--count", "5", "--batch-size", "3")
    assert len(files) == 6
    for file in (files[1], files[4], files[5]):
        assert call("reproduce", file)[1].startswith(f"{file}: identical")


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5))
def test_batches_are_those_of_drawing(images: int, batch_size: int, processes: int) -> None:
    """As Processes.over shares the numbers out, and Pipeline.sample cuts a share into batches."""
    shares = [list(range(images))[rank::processes] for rank in range(processes)]
    cut = [share[i : i + batch_size] for share in shares for i in range(0, len(share), batch_size)]
    work = {"images": images, "batch_size": batch_size, "processes": processes}
    grid = Provenance(("",) * images, None, SampleConfig(), 32, "", drawn=work)
    assert sorted(list(batch) for batch in grid.batches()) == sorted(cut)
    for index in range(images):
        (batch,) = dataclasses.replace(grid, prompts=("",), index=index).batches()
        assert list(batch) in cut and index in batch


# one line for what is not a picture of ours


def test_what_is_no_picture_of_ours_is_one_line(call: Call, plain: dict[str, Path], tmp_path: Path) -> None:
    file = plain["run"]
    about = said(file)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "plain.png")
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a.jpg")
    (tmp_path / "short.png").write_bytes(file.read_bytes()[:-200])
    for faulty, what in [
        (tmp_path / "plain.png", "holds no settings"),
        (tmp_path / "a.jpg", "is not a PNG"),
        (tmp_path / "none.png", f"no picture {tmp_path / 'none.png'}"),
        (tmp_path, "cannot be read"),
        (tmp_path / "short.png", "cannot be read"),
        (resaved(file, tmp_path / "1.png", "{"), "its settings are damaged"),
        (resaved(file, tmp_path / "2.png", "[1]"), "its settings are damaged"),
        (resaved(file, tmp_path / "3.png", {"form": "euler"}), "they are not settings of `ldm sample`"),
        (resaved(file, tmp_path / "4.png", {**about, "colour": 1}), "unknown: colour"),
        (resaved(file, tmp_path / "5.png", {**about, "steps": "3"}), "damaged"),
        (resaved(file, tmp_path / "6.png", {**about, "steps": 0}), "steps must lie between 1 and 100000, got 0"),
        (resaved(file, tmp_path / "7.png", {**about, "index": 5}), "there is no image 5"),
        (resaved(file, tmp_path / "8.png", {**about, "drawn": {"batch_size": 0}}), "whole numbers"),
        (resaved(file, tmp_path / "9.png", {k: v for k, v in about.items() if k != "size"}), "size is missing"),
        (resaved(file, tmp_path / "10.png", "[" * 5000 + "]" * 5000), "its settings are damaged"),
        (resaved(file, tmp_path / "11.png", {**about, "variant": [None]}), "variant must be text"),
        (resaved(file, tmp_path / "12.png", {**about, "others": "{}"}), "parts, others and drawn must be objects"),
        (resaved(file, tmp_path / "13.png", {**about, "parts": {"unet": 3}}), "hashes and prompts text"),
        (resaved(file, tmp_path / "14.png", {**about, "prompt": 3}), "hashes and prompts text"),
        (resaved(file, tmp_path / "15.png", {**about, "index": 0.5}), "there is no image 0.5"),
        (resaved(file, tmp_path / "16.png", {**about, "classifier": [None]}), "classifier must be text"),
    ]:
        code, error = call("reproduce", faulty)
        assert code == 2 and what in error and str(faulty) in error, error
    code, error = call("reproduce", resaved(file, tmp_path / "moved.png", {**about, "path": "gone"}))
    assert (code, error) == (4, "ldm reproduce: no run or model folder gone\n")


def test_the_picture_is_kept(call: Call, plain: dict[str, Path], tmp_path: Path) -> None:
    file = plain["run"]
    assert call("reproduce", file, "--out", tmp_path / "again.png")[0] == 0
    again, array = read_provenance(tmp_path / "again.png")
    assert again == read_provenance(file)[0] and np.array_equal(array, pixels(file))
    for out in (file, tmp_path, tmp_path / "no/where.png"):
        code, error = call("reproduce", file, "--out", out)
        assert code == 2 and f"--out {out} must be a file" in error
