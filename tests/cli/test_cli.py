"""Commands as a user meets them: help without torch, errors of one line, images with their settings."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from support.command_line import Call, caller

from autoencoder.config import AutoencoderConfig
from autoencoder.model import AutoencoderKL
from ldm import config as configuration
from ldm.cli.main import COMMANDS
from ldm.config import ClipConfig, DiffusionTrainingConfig, SampleConfig, ScheduleConfig, UNetConfig
from ldm.evaluation.evaluate import GUIDANCE_SCALES
from ldm.models.clip import build_clip, from_clip, train_tokenizer
from ldm.models.unet import UNet
from ldm.pipeline import Pipeline
from ldm.pipeline.codec import LatentCodec

ROOT = Path(__file__).resolve().parents[2]
RUN: dict[str, Any] = {
    "data": {"source": "shapes", "image_size": 32, "size": 6},
    "unet": {"channels": [16, 16], "layers_per_level": 1, "attention_levels": [1], "heads": [2], "groups": 4},
    "train": {"steps": 1, "trackers": []},
    "sample": {"steps": 2, "guidance_scale": 2.0},
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run (untrained weights), an unconditional model of pixels, and a run that has no model yet."""
    folder = tmp_path_factory.mktemp("here")
    torch.manual_seed(0)
    clip = ClipConfig(width=16, layers=1, heads=2, max_length=16, merges=8, patch_size=8, projection=8)
    tokenizer = train_tokenizer(["a red circle"], clip.merges, clip.max_length)
    text = from_clip(build_clip(clip, tokenizer, 32, 3), tokenizer)
    codec = LatentCodec(
        AutoencoderKL(AutoencoderConfig(channels=(8, 8, 8), layers_per_level=1, groups=4, mid_attention=False)).eval()
    )
    settings = configuration.build(
        DiffusionTrainingConfig,
        {"run": f"{folder}/run", "autoencoder": f"{folder}/run", "text": f"{folder}/run", **RUN},
    )
    Pipeline(
        UNet(settings.unet, 4, 4, 16), ScheduleConfig(), "v", codec, text, 32, settings.sample, caption_dropout=0.1
    ).save_pretrained(folder / "run/model")
    configuration.save(settings, folder / "run/config.yaml")
    (folder / "run/metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    small = UNetConfig((8,), 1, (), (1,), groups=4)
    Pipeline(
        UNet(small, 3, 3, None), ScheduleConfig(num_steps=20), "eps", None, None, 8, SampleConfig(steps=1)
    ).save_pretrained(folder / "pixels")
    (folder / "unfinished").mkdir()
    configuration.save(settings, folder / "unfinished/config.yaml")
    (folder / "run.yaml").write_text(yaml.safe_dump(configuration.to_dict(settings)))
    tree = {
        "run": f"{folder}/stage1",
        "data": {"source": "textures", "image_size": 32, "size": 8},
        "model": {"channels": [32, 32]},
    }
    (folder / "autoencoder.yaml").write_text(yaml.safe_dump(tree))
    (folder / "clip.yaml").write_text(yaml.safe_dump({"run": f"{folder}/clip", "data": RUN["data"]}))
    (folder / "broken.yaml").write_text("run: [1\n")
    (folder / "empty.txt").write_text("\n  \n")
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    return folder


@pytest.fixture
def run(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command in the folder."""
    monkeypatch.chdir(here)
    return caller(capsys)


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*arguments: Any, **options: Any) -> None:
        raise AssertionError("weights were read, or training began, before the fault was found")

    monkeypatch.setattr("ldm.pipeline.info.fill", loaded)
    monkeypatch.setattr("ldm.training.loop.Loop.__init__", loaded)


# help


def test_every_help_comes_without_the_heavy_packages() -> None:
    code = f"""
import sys
from ldm.cli.main import main
for arguments in [[], *([name] for name in {list(COMMANDS)})]:
    try:
        main([*arguments, "--help"])
    except SystemExit as stop:
        assert not stop.code
heavy = {{"torch", "transformers", "accelerate", "PIL", "numpy", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.count("usage: ldm") == 1 + len(COMMANDS) and "exit codes" in done.stdout


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.stem)
def test_each_script_is_its_command(script: Path) -> None:
    command = [sys.executable, str(script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and done.stdout.startswith(f"usage: ldm {script.stem.replace('_', '-')} ")


def test_there_is_a_script_for_each_command() -> None:
    names = {path.stem.replace("_", "-") for path in (ROOT / "scripts").glob("*.py")}
    # those that look, or draw one picture, need no launcher, and scripts/inspect.py would hide Python's own inspect
    assert names == set(COMMANDS) - {"inspect", "invert", "reproduce", "replay", "status", "diff", "checkpoints"}


def test_a_fault_in_a_script_is_one_line_and_its_code(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/train_ldm.py"), "missing.yaml"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "ldm train-ldm: no configuration file missing.yaml\n")


# one line for what is wrong


@pytest.mark.parametrize("device", ["numpy", "cpu"])
def test_too_little_memory_is_one_line(run: Call, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    def asks_too_much(*_: Any, **__: Any) -> None:
        np.empty(2**62, np.uint8) if device == "numpy" else torch.empty(2**62, dtype=torch.uint8)

    monkeypatch.setattr("ldm.cli.status.run", asks_too_much)
    code, _, error = run("status", "anywhere")
    assert code == 2 and error.startswith("ldm status: not enough memory") and error.count("\n") == 1


USAGE = [
    ([], "command"),
    (["paint"], "invalid choice: 'paint'"),
    (["sample"], "RUN_OR_FOLDER"),
    (["sample", "run", "--stepz", "3"], "--stepz"),
    (["sample", "run", "--steps", "three"], "--steps: invalid int value: 'three'"),
    (["sample", "run", "--seed", "1.5"], "--seed"),
    (["sample", "run", "--guidance-scale", "big"], "--guidance-scale"),
    (["train-ldm"], "CONFIG"),
    (
        ["train-ldm", "ldm.yaml", "--from", "4", "train.lr=1", "--fast", "x=1"],
        "unrecognized arguments: train.lr=1 --fast x=1",
    ),
    (["sample", "run", "--seed", "1", "seed=2"], "unrecognized arguments: seed=2"),
    (["evaluate", "run", "--images", "x"], "--images"),
]
SAMPLING = [
    (["--sampler", "eulr"], "got 'eulr'"),
    (["--steps", "0"], "steps must lie between 1 and 100000, got 0"),
    (["--steps", "-3"], "steps must lie between 1"),
    (["--steps", "1001"], "steps must lie between 1 and 1000, got 1001"),
    (["--guidance-scale", "nan"], "guidance_scale must lie between"),
    (["--guidance-scale", "-1"], "guidance_scale must lie between"),
    (["--guidance-scale", "inf"], "guidance_scale must lie between"),
    (["--eta", "1.5"], "eta must lie between"),
    (
        ["--sampler", "dpmpp_2m", "--eta", "0.5"],
        "eta is for ddim and predictor_corrector, and dpmpp_2m does not read it",
    ),
    (["--sampler", "euler", "--variance", "beta"], "variance is for ddpm, and euler does not read it"),
    (["--grid", "karass"], "grid must be one of trailing"),
    (["--seed", "-1"], "seed must lie between"),
    (["--seed", str(2**64)], "seed must lie between"),
    (["--count", "0"], "count must be at least 1"),
    (["--batch-size", "0"], "batch_size must be at least 1"),
    (["--size", "30"], "size must be a positive multiple of 4"),
    (["--size", "0"], "size must be a positive multiple of 4"),
    (["--size", "-4"], "size must be a positive multiple of 4"),
    (["--prompts-file", "none.txt"], "none.txt"),
    (["--prompts-file", "empty.txt"], "holds no caption"),
    (["--prompts-file", "latin.txt"], "latin.txt"),
    (["--prompts-file", "."], "cannot be read"),
    (["--device", "nonsense"], "--device nonsense"),
    (["--device", "cuda:99"], "--device cuda:99"),
    (["--device", "meta"], "--device meta"),
    (["--out", "run.yaml"], "--out run.yaml"),
    (["--out", "run.yaml/deeper"], "--out run.yaml/deeper"),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE)
def test_wrong_usage_is_one_line(run: Call, arguments: list[str], message: str) -> None:
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err and "--help" in err


@pytest.mark.parametrize(("arguments", "message"), SAMPLING)
def test_a_wrong_setting_is_one_line_before_anything_is_loaded(
    run: Call, nothing_is_loaded: None, arguments: list[str], message: str
) -> None:
    code, out, err = run("sample", "run", "--prompt", "a red circle", *arguments)
    assert code == 2 and out == "" and err.startswith("ldm sample: ") and err.count("\n") == 1 and message in err
    assert not Path("images").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["sample", "nowhere", "--prompt", "x"], 4, "no run or model folder nowhere"),
        (["sample", "unfinished", "--prompt", "x"], 4, "run without a diffusion model yet"),
        (["sample", "run.yaml", "--prompt", "x"], 4, "run.yaml"),
        (["sample", "run"], 2, "--prompt or --prompts-file is needed"),
        (["evaluate", "nowhere"], 2, "nowhere is not a run"),
        (["evaluate", "unfinished"], 4, "run without a diffusion model yet"),
        (["evaluate", "run", "--images", "0"], 2, "images must be at least 1"),
        (["evaluate", "run", "--tune", "-1"], 2, "tune must be at least 0"),
        (["evaluate", "run", "--batch-size", "0"], 2, "batch_size must be at least 1"),
        (["evaluate", "run", "train.steps=3"], 2, "train.steps=3: only sample.* can be changed"),
        (["evaluate", "run", "sample.stepz=3"], 2, "did you mean sample.steps?"),
        (["evaluate", "run", "sample.steps=0"], 2, "sample.steps must lie between 1"),
        (["evaluate", "run", "sample.steps"], 2, "override 'sample.steps' is not of the form key=value"),
        (["evaluate", "run", "--out", "run.yaml"], 2, "--out run.yaml cannot be a folder"),
        (["evaluate", "run", "--likelihood", "sample.steps=2"], 2, "--likelihood draws nothing"),
        (["train-autoencoder", "missing.yaml"], 2, "no configuration file missing.yaml"),
        (["train-autoencoder", "broken.yaml"], 2, "broken.yaml: cannot be read"),
        (["train-autoencoder", "autoencoder.yaml", "train.stepz=3"], 2, "did you mean train.steps?"),
        (["train-autoencoder", "autoencoder.yaml", "train.steps=three"], 2, "train.steps must be an integer"),
        (["train-autoencoder", "autoencoder.yaml", "train.lr=-1"], 2, "train.lr must be at least"),
        (["train-autoencoder", "autoencoder.yaml", "steps"], 2, "key=value"),
        (
            ["train-autoencoder", "autoencoder.yaml", "data.image_size=33"],
            2,
            "data.image_size 33 is not a multiple of 2",
        ),
        (
            ["train-autoencoder", "autoencoder.yaml", "loss.gan=1", "data.image_size=16"],
            2,
            "data.image_size: image 16×16 is too small",
        ),
        (["train-autoencoder", "run.yaml"], 2, "unknown key"),
        (
            ["train-autoencoder", "autoencoder.yaml", "data={source: folder, folder: nowhere, size: null}"],
            3,
            "no folder nowhere",
        ),
        (
            ["train-clip", "clip.yaml", "data.image_size=24", "model.patch_size=7"],
            2,
            "data.image_size 24 is not a multiple of 7",
        ),
        (["train-clip", "clip.yaml", "data.image_size=16", "model.patch_size=8"], 3, "image_size is 16"),
        (
            ["train-ldm", "run.yaml", "run=fresh", "autoencoder=nowhere"],
            4,
            "no autoencoder nowhere: train one with `ldm train-autoencoder`",
        ),
        (["train-ldm", "run.yaml", "run=fresh", "autoencoder=unfinished"], 4, "unfinished holds no autoencoder"),
        (["train-ldm", "run.yaml", "run=fresh", "autoencoder=none", "text=nowhere"], 2, "text: "),
        (["train-ldm", "run.yaml", "unet.heads=[3]"], 2, "unet.heads: 3 does not divide"),
        (["train-ldm", "run.yaml", "unet.groups=3"], 2, "unet.channels 16 is not a positive multiple of groups 3"),
        (["cache-latents", "run.yaml", "autoencoder=nowhere"], 4, "no autoencoder nowhere"),
        (["cache-latents", "run.yaml", "autoencoder=none"], 2, "nothing to cache"),
        (["cache-latents", "run.yaml", "cache_latents=false"], 2, "nothing to cache"),
        (["cache-latents", "missing.yaml"], 2, "no configuration file missing.yaml"),
    ],
)
def test_what_is_missing_or_wrong_is_one_line(
    run: Call, nothing_is_loaded: None, arguments: list[str], code: int, message: str
) -> None:
    returned, _, err = run(*arguments)
    assert (returned, err.count("\n")) == (code, 1), err
    assert err.startswith(f"ldm {arguments[0]}: ") and message in err and "Traceback" not in err


def test_images_that_do_not_fit_the_autoencoder(run: Call, nothing_is_loaded: None) -> None:
    code, _, err = run("train-ldm", "run.yaml", "data.image_size=30", "run=fresh")
    assert (code, err) == (2, "ldm train-ldm: data.image_size 30 is not a multiple of 4 (the autoencoder's factor)\n")
    code, _, err = run("train-ldm", "run.yaml", "train.batch_size=6", "train.micro_batch=4", "run=fresh")
    assert code == 2 and "train.batch_size 6 is not a multiple of micro_batch 4" in err and not Path("fresh").exists()


def test_the_keyboard_stops_without_a_traceback(run: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ldm.pipeline.info.ModelInfo.read", pressed)
    assert run("sample", "run", "--prompt", "x") == (130, "", "stopped\n")


# what the commands make


def about(file: Path) -> dict[str, Any]:
    """What the picture says, but for how the work was shared out."""
    return {k: v for k, v in json.loads(Image.open(file).text["ldm"]).items() if k != "drawn"}  # type: ignore[attr-defined]


def test_pictures_carry_their_settings_and_numbers_go_on(run: Call, tmp_path: Path) -> None:
    out, options = tmp_path / "out", ["--prompt", "Ein roter Kreis: ○!", "--seed", "7", "--out", str(tmp_path / "out")]
    more = ["--count", "2", "--prompt", "", "--batch-size", "3", "--steps", "3", "--sampler", "dpmpp_2m"]
    assert run("sample", "run", *options, *more)[0] == 0
    assert sorted(f.name for f in out.iterdir()) == [
        "00000-ein-roter-kreis.png", "00001-ein-roter-kreis.png",
        "00002-empty.png", "00003-empty.png", "grid-00000.png",
    ]  # fmt: skip
    one = about(out / "00001-ein-roter-kreis.png")
    settings = {
        "prompt": "Ein roter Kreis: ○!",
        "seed": 7,
        "index": 1,
        "steps": 3,
        "sampler": "dpmpp_2m",
        "guidance_scale": 2.0,
        "eta": 0.0,
    }
    assert {k: one[k] for k in settings} == settings and one["size"] == 32 and len(one["model"]) == 64
    grid = about(out / "grid-00000.png")
    assert grid["prompts"] == ["Ein roter Kreis: ○!"] * 2 + [""] * 2 and grid["seed"] == 7
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    assert run("sample", "run", *options)[1].splitlines()[-1] == f"1 image in {out}/ from 00004"
    assert {f.name for f in out.iterdir()} - before.keys() == {"00004-ein-roter-kreis.png"}
    assert all((out / name).read_bytes() == content for name, content in before.items())
    assert about(out / "00004-ein-roter-kreis.png")["sampler"] == "ddim"  # the model's own again
    assert not np.array_equal(
        np.asarray(Image.open(out / "00000-ein-roter-kreis.png")),
        np.asarray(Image.open(out / "00001-ein-roter-kreis.png")),
    )


def test_guidance_on_a_model_that_never_saw_the_empty_caption_warns(run: Call, here: Path, tmp_path: Path) -> None:
    shutil.copytree(here / "run/model", tmp_path / "model")
    facts = tmp_path / "model/ldm.json"
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "caption_dropout": 0.0}))
    command = ["--prompt", "a red circle", "--steps", "1", "--out", str(tmp_path / "images")]
    for model, scale, warns in (
        (tmp_path / "model", "3", True),
        (tmp_path / "model", "1", False),
        (here / "run", "3", False),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert run("sample", str(model), *command, "--guidance-scale", scale)[0] == 0
        assert any("trained without caption dropout" in str(warning.message) for warning in caught) == warns


def test_the_same_settings_give_the_same_picture_at_any_batch_size(run: Call, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\n  a blue star  \n", encoding="utf-8")
    for name, batch in (("a", "1"), ("b", "4"), ("c", "4")):
        options = ["--prompts-file", str(prompts), "--count", "2", "--seed", "5", "--size", "24"]
        assert run("sample", "run", *options, "--batch-size", batch, "--out", str(tmp_path / name))[0] == 0
    names = sorted(f.name for f in (tmp_path / "a").iterdir())
    assert (
        len(names) == 5
        and names == sorted(f.name for f in (tmp_path / "b").iterdir())
        and "00002-a-blue-star.png" in names
    )
    for name in names:
        a, b, c = (np.asarray(Image.open(tmp_path / folder / name)).astype(int) for folder in "abc")
        assert a.shape == b.shape and np.abs(a - b).max() <= 1 and np.array_equal(b, c)
        assert name.startswith("grid") or a.shape == (24, 24, 3)
        assert about(tmp_path / "a" / name) == about(tmp_path / "b" / name)


def test_an_unconditional_model_needs_no_prompt(run: Call, tmp_path: Path) -> None:
    assert run("sample", "pixels", "--count", "3", "--out", str(tmp_path))[0] == 0
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "00000-empty.png",
        "00001-empty.png",
        "00002-empty.png",
        "grid-00000.png",
    ]
    assert about(tmp_path / "00000-empty.png")["prompt"] == "" and Image.open(tmp_path / "00000-empty.png").size == (
        8,
        8,
    )
    code, _, err = run("sample", "pixels", "--steps", "21", "--out", str(tmp_path))
    assert code == 2 and "steps must lie between 1 and 20, got 21" in err  # the T of this model


def test_latents_are_cached_once(run: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run("cache-latents", "run.yaml", f"run={tmp_path}")
    assert code == 0 and "encoding 6 images" in out and f"6 images in {tmp_path}/latents" in out
    code, out, _ = run("cache-latents", "run.yaml", f"run={tmp_path}")
    assert code == 0 and "encoding" not in out
    code, _, err = run("cache-latents", "run.yaml", f"run={tmp_path}", "data.size=7")
    assert code == 3 and err.count("\n") == 1 and "another data" in err


def test_a_run_is_evaluated(run: Call, here: Path) -> None:
    code, out, err = run("evaluate", "run", "--images", "3", "--tune", "2", "--batch-size", "2")
    assert code == 0, err
    report = json.loads((here / "run/report.json").read_text())
    seen = report["judge"]["single"]["seen"]["all"]
    assert (
        seen["n"] == 3
        and 0 <= seen["low"] <= seen["accuracy"] + 1e-9 <= seen["high"] <= 1
        and "judge.single.held_out.all" in out
    )
    assert report["settings"]["steps"] == 2 and len(report["tuned_on_seen"]) == len(GUIDANCE_SCALES)
    assert Image.open(here / "run/samples.png").size and Image.open(here / "run/curves.png").size


def test_a_run_is_evaluated_with_another_sampler_into_a_folder(run: Call, here: Path, tmp_path: Path) -> None:
    """The run's own report stays, and a guidance scale that is given is not tuned."""
    (here / "run/report.json").write_text("{}")
    overrides = ["sample.steps=1", "sample.sampler=euler", "sample.guidance_scale=1.5"]
    code, out, err = run("evaluate", "run", *overrides, "--images", "2", "--out", str(tmp_path / "deep/out"))
    assert code == 0, err
    report = json.loads((tmp_path / "deep/out/report.json").read_text())
    used = [report["settings"][name] for name in ("steps", "sampler", "guidance_scale")]
    assert used == [1, "euler", 1.5] and "tuned_on_seen" not in report and f"report: {tmp_path}/deep/out" in out
    assert (tmp_path / "deep/out/samples.png").is_file() and (here / "run/report.json").read_text() == "{}"


def test_a_warning_is_one_line(run: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(arguments: argparse.Namespace) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn_explicit("mind the step", UserWarning, str(Path("somewhere") / "ldm" / "pipeline.py"), 1)

    monkeypatch.setattr("ldm.cli.report.run", warn)
    before = warnings.showwarning
    code, _, err = run("report", "run")
    assert code == 0 and err == "warning: mind the step\n" and warnings.showwarning is before


def test_one_of_several_processes_ends_without_tearing_down_the_interpreter() -> None:
    """A thread that waits for ever stands for one of gloo's that holds a tensor."""
    code = (
        "import atexit, threading; from ldm.cli.main import exit_process; atexit.register(print, 'workers ended');"
        "threading.Thread(target=threading.Event().wait).start(); print('said', end=' '); exit_process(75)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "WORLD_SIZE": "2"}, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (75, "said workers ended\n", "")
