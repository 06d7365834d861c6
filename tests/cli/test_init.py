"""`ldm init` and `ldm train`: what is said of a folder, and that the configurations written for it train."""

from __future__ import annotations

import csv
import json
import os
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from support.command_line import Call, caller

from ldm import config
from ldm.cli import init, recipe
from ldm.cli.expectations import expectations
from ldm.config import AutoencoderTrainingConfig, ClipTrainingConfig, DataConfig, DiffusionTrainingConfig
from ldm.runs.records import read_status

CLASSES = {"autoencoder": AutoencoderTrainingConfig, "clip": ClipTrainingConfig, "ldm": DiffusionTrainingConfig}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return caller(capsys)


def paint(folder: Path, n: int = 40, suffix: str = "png", side: int = 40) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{i:02d}.{suffix}" for i in range(n)]
    for i, name in enumerate(names):
        Image.new("RGB", (side + i, side), (6 * i % 256, 100, 50)).save(folder / name)
    return names


def metadata(folder: Path, names: list[str], column: str = "text") -> None:
    rows = [
        json.dumps({"file_name": name, column: f'picture "{i}" of {{many}}: #' + " ${x}" * (i < 3)})
        for i, name in enumerate(names)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(rows))


def written(out: Path) -> dict[str, object]:
    return {
        stage: config.load(cls, out / f"{stage}.yaml")
        for stage, cls in CLASSES.items()
        if (out / f"{stage}.yaml").exists()
    }


def test_from_a_folder_to_samples_in_three_commands(run: Call, tmp_path: Path) -> None:
    metadata(tmp_path / "my photos", paint(tmp_path / "my photos"))
    code, out, err = run("init", "my photos")
    assert (code, err) == (0, ""), err
    assert "my photos: 40 images, captions in metadata (text)" in out and "40×40 to 79×40, median short side 40" in out
    assert "formats   PNG 40; modes RGB 40" in out and "40 distinct, 0 empty" in out and "left out" not in out
    settings = written(tmp_path / "configs/my-photos")
    assert list(settings) == ["autoencoder", "clip", "ldm"]
    shares = {s.data.validation_fraction for s in settings.values()}  # type: ignore[attr-defined]
    assert shares == {0.2} and {s.data for s in settings.values()} == {settings["ldm"].data}  # type: ignore[attr-defined]
    short = [
        "autoencoder.train.steps=3",
        "clip.train.steps=2",
        "clip.train.batch_size=8",
        "ldm.train.steps=2",
        "ldm.train.batch_size=4",
    ]
    code, out, err = run("train", "configs/my-photos", *short)
    assert (code, err) == (0, ""), err
    assert [
        read_status(tmp_path / p)["state"]
        for p in ("runs/my-photos/autoencoder", "runs/my-photos/text", "runs/my-photos")
    ] == ["done"] * 3  # type: ignore[index]
    code, out, err = run("train", "configs/my-photos", *short)
    assert code == 0 and out.count("already trained") == 3
    code, out, err = run("sample", "runs/my-photos", "--prompt", "a picture", "--steps", "2", "--count", "2")
    assert (code, err) == (0, "") and len(list((tmp_path / "images").glob("0000*.png"))) == 2


@pytest.mark.parametrize("captions", config.CAPTIONS)
@pytest.mark.parametrize("machine", ["cpu", "gpu"])
@pytest.mark.parametrize("grey", [False, True])
def test_every_recipe_is_complete_and_its_networks_fit_together(
    tmp_path: Path, captions: str, machine: str, grey: bool
) -> None:
    size = 64 if machine == "gpu" else 32
    given = {"text_column": 'a "b": #'} if captions == "metadata" else {}
    data = DataConfig(
        folder='pho"tos: #1', captions=captions, image_size=size, image_channels=1 if grey else 3, **given
    )
    plan = recipe.Plan("mine", "configs/mine", data, 500, machine, 40, ('one: # "quoted"',))
    for name, text in recipe.write(plan).items():
        assert "$" not in text and "\t" not in text
        (tmp_path / name).write_text(text, encoding="utf-8")
    settings = written(tmp_path)
    assert set(settings) == ({"autoencoder", "ldm"} if captions == "none" else set(CLASSES))
    for s in settings.values():
        assert s.data.folder == 'pho"tos: #1' and s.data.captions == captions and s.data.smallest_side == size // 4  # type: ignore[attr-defined]
    from autoencoder.model import AutoencoderKL
    from ldm.diffusion.condition import Condition
    from ldm.models.unet import UNet

    stage1, stage2 = settings["autoencoder"], settings["ldm"]
    assert (
        isinstance(stage1, AutoencoderTrainingConfig)
        and isinstance(stage2, DiffusionTrainingConfig)
        and stage2.autoencoder == stage1.run
    )
    with torch.device("meta"):
        image = torch.zeros(1, data.image_channels, size, size)
        assert AutoencoderKL(stage1.model)(image)[0].shape == image.shape
        side = size // stage1.model.factor
        latent = torch.zeros(1, stage1.model.latent_channels, side, side)
        context = None if captions == "none" else torch.zeros(1, 40, 128)
        unet = UNet(stage2.unet, 4, 4, None if context is None else 128)
        assert unet(latent, torch.zeros(1, dtype=torch.long), Condition(context=context)).shape == latent.shape


@pytest.mark.parametrize("related", [0, 1, 2])
def test_captions_that_say_where_things_are_make_the_text_encoder_learn_it(
    run: Call, tmp_path: Path, related: int
) -> None:
    names = paint(tmp_path / "things", n=40)
    texts = ["a hat left of a cat"] * related + ["the left hand"] * (40 - related)
    rows = [json.dumps({"file_name": name, "text": text}) for name, text in zip(names, texts, strict=True)]
    (tmp_path / "things/metadata.jsonl").write_text("\n".join(rows))
    code, out, _ = run("init", "things")
    clip = written(tmp_path / "configs/things")["clip"]
    assert code == 0 and isinstance(clip, ClipTrainingConfig)
    assert (clip.swap_relations, clip.model.position_std) == ((True, 1.0) if related == 2 else (False, 0.02))
    assert ("5% of the captions say left of" in out) == (related == 2)


def test_steps_follow_the_data_within_limits() -> None:
    def plan(images: int, machine: str) -> recipe.Plan:
        return recipe.Plan("a", "b", DataConfig(folder="c"), images, machine, 12, ())

    assert [plan(n, "cpu").steps("ldm") for n in (1, 400, 10**6)] == [1500, 2500, 4000]
    assert [plan(n, "gpu").steps("autoencoder") for n in (1, 100_000, 10**7)] == [20_000, 125_000, 200_000]


def test_layouts_are_found_and_near_misses_named(run: Call, tmp_path: Path) -> None:
    names = paint(tmp_path / "sidecar", 20)
    for name in names:
        (tmp_path / "sidecar" / name).with_suffix(".txt").write_text("a caption")
    for kind in ("red_fox", "house-cat"):
        paint(tmp_path / "classes" / kind, 12)
    paint(tmp_path / "plain", 20)
    rows = paint(tmp_path / "table", 20)
    with (tmp_path / "table/metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("file_name", "caption", "id"), *((name, "a, caption", i) for i, name in enumerate(rows))]
        )
    said = {name: run("init", name) for name in ("sidecar", "classes", "plain", "table")}
    assert all(code == 0 for code, _, _ in said.values()), said
    layouts = {name: written(tmp_path / "configs" / name)["ldm"].data for name in said}  # type: ignore[attr-defined]
    assert {name: data.captions for name, data in layouts.items()} == {
        "sidecar": "sidecar", "classes": "class", "plain": "none", "table": "metadata",
    }  # fmt: skip
    assert (
        layouts["table"].text_column == "caption"
        and "no column `text` but `caption`: that one is read" in said["table"][1]
    )
    assert "captions are made from the 2 folder names (house-cat, red_fox" in said["classes"][1]
    assert "the model will be unconditional" in said["plain"][1] and not (tmp_path / "configs/plain/clip.yaml").exists()
    for wrong in ("metadata.json1", "captions.jsonl", "Metadata.jsonl", "metadata.tsv", "meta_data.csv"):
        (tmp_path / "plain" / wrong).write_text("{}")
        code, _, err = run("init", "plain", "--out", "elsewhere")
        assert code == 3 and f"but {wrong}: rename it if it holds the captions" in err and err.count("\n") == 1
        (tmp_path / "plain" / wrong).unlink()
    (tmp_path / "plain/captions.jsonl").touch()
    assert run("init", "plain", "--out", "elsewhere", "--captions", "none")[0] == 0  # a person may know better


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 3, "no folder nowhere"),
        (["file"], 3, "file is a file"),
        (["empty"], 3, "empty holds no image"),
        (["one"], 3, "one: 1 usable image is too few to train on some and validate on others"),
        (["photos", "--image-size", "24"], 2, "--image-size must be a multiple of 16"),
        (["photos", "--image-size", "256"], 3, "40×40 is smaller than 64 pixels"),
        (["photos", "--captions", "texts"], 2, "invalid choice: 'texts'"),
        (["photos", "--out", "file"], 2, "--out file: file is a file"),
        (["photos", "--out", "file/y"], 2, "--out file/y: file is a file"),
        (["photos", "--out", "photos/configs"], 2, "photos/configs would lie inside photos, among the images"),
        (["photos", "--captions", "metadata"], 3, "photos has no metadata.jsonl and no metadata.csv"),
        (["d${x}"], 2, "rename the folder"),
        (["ruins"], 3, "ruins: none of 2 images and rows can be used, such as ruins/a.png: the file is empty"),
    ],
)
def test_what_cannot_be_looked_at_is_one_line(
    run: Call, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "file").touch()
    for folder in ("empty", "ruins"):
        (tmp_path / folder).mkdir()
    (tmp_path / "ruins/a.png").touch()
    (tmp_path / "ruins/b.png").touch()
    paint(tmp_path / "one", 1)
    paint(tmp_path / "photos", 10)
    got, _, err = run("init", *arguments)
    assert got == code and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "configs").exists()


def test_a_large_set_is_decoded_in_part_unless_asked(
    run: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ldm.data import survey

    monkeypatch.setattr(survey, "DECODED", 10)
    names = paint(tmp_path / "photos", 40)
    cut = tmp_path / "photos" / names[1]
    cut.write_bytes(cut.read_bytes()[:60])  # the header stands
    code, out, _ = run("init", "photos")
    assert code == 0 and "decoded   10 of them; of the others only the header was read" in out and "left out" not in out
    code, out, _ = run("init", "photos", "--out", "again", "--all")
    assert (
        code == 0
        and "decoded" not in out.replace("cannot be decoded", "")
        and f"photos/{names[1]}: cannot be decoded" in out
    )
    assert "training stops if more than 1% are left out, and here it is 2.5%" in out
    assert "set max_skipped to 0.03" in out
    assert [json.loads(line)["file"] for line in (tmp_path / "again/skipped.jsonl").read_text().splitlines()] == [
        f"photos/{names[1]}"
    ]


def test_grey_images_make_grey_models_and_a_gpu_larger_ones(
    run: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "grey").mkdir()
    for i in range(20):
        Image.new("L", (200 + i, 220)).save(tmp_path / f"grey/{i}.png")
    monkeypatch.setattr(init, "_gpu", lambda: True)
    assert run("init", "grey")[0] == 0
    stage1 = written(tmp_path / "configs/grey")["autoencoder"]
    assert isinstance(stage1, AutoencoderTrainingConfig) and stage1.train.mixed_precision == "bf16"
    assert (stage1.data.image_size, stage1.data.image_channels, stage1.model.image_channels) == (192, 1, 1)


def test_train_names_what_is_wrong_with_the_folder_or_the_overrides(run: Call, tmp_path: Path) -> None:
    paint(tmp_path / "photos", 20)
    assert run("init", "photos")[0] == 0
    for arguments, message in (
        (["nowhere"], "nowhere holds none of autoencoder.yaml, clip.yaml, ldm.yaml"),
        (
            ["configs/photos", "train.steps=3"],
            "override 'train.steps=3' must begin with a stage of the folder: autoencoder., ldm.",
        ),
        (["configs/photos", "clip.train.steps=3"], "must begin with a stage"),
        (
            ["configs/photos", "ldm.train.stesp=3"],
            "configs/photos/ldm.yaml: unknown key train.stesp: did you mean train.steps?",
        ),
        (["configs/photos", "ldm.train.mixed_precision=bf16"], "mixed_precision differs between the stages (bf16, no)"),
    ):
        code, out, err = run("train", *arguments)
        assert code == 2 and message in err and err.count("\n") == 1 and out == "", err
    assert (
        not (tmp_path / "runs").exists()
        and yaml.safe_load((tmp_path / "configs/photos/ldm.yaml").read_text())["text"] == "none"
    )


def test_a_second_look_tells_and_overwrites_nothing(run: Call, tmp_path: Path) -> None:
    paint(tmp_path / "photos", 20)
    assert run("init", "photos")[0] == 0
    (tmp_path / "configs/photos/ldm.yaml").write_text("mine")
    (tmp_path / "photos/broken.png").touch()
    code, out, _ = run("init", "photos/")
    assert code == 0 and "photos/broken.png: the file is empty" in out
    assert "autoencoder.yaml, ldm.yaml in configs/photos/ stay as they are" in out and "next:" not in out
    assert (tmp_path / "configs/photos/ldm.yaml").read_text() == "mine"


def test_nothing_is_written_among_the_images(run: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paint(tmp_path / "photos", 20)
    assert run("init", "photos")[0] == 0
    monkeypatch.chdir(tmp_path / "photos")
    code, _, err = run("init", ".", "--out", "../elsewhere")
    assert code == 2 and "runs would lie inside ., among the images" in err
    monkeypatch.chdir(tmp_path)
    code, _, err = run("train-autoencoder", "configs/photos/autoencoder.yaml", "run=photos/runs")
    assert (
        code == 2
        and "run photos/runs is inside data.folder photos" in err
        and len(list((tmp_path / "photos").iterdir())) == 20
    )


def test_the_next_line_can_be_pasted(run: Call, tmp_path: Path) -> None:
    names = paint(tmp_path / "photos", 20)
    captions = ["two\nlines", "x" * 300, 'it\'s `touch pwned` $5 "here"']
    rows = [json.dumps({"file_name": name, "text": captions[min(i, 2)]}) for i, name in enumerate(names)]
    (tmp_path / "photos/metadata.jsonl").write_text("\n".join(rows))
    code, out, _ = run("init", "photos", "--out", "my out/it's")
    _, train, sample = out.rstrip().rsplit("\n", 2)
    assert code == 0
    assert shlex.split(train.removeprefix("next:")) == ["ldm", "train", "my out/it's"]
    assert shlex.split(sample) == ["ldm", "sample", "runs/it-s", "--prompt", captions[2], "--count", "8"]
    (tmp_path / "photos/metadata.jsonl").write_text("\n".join(rows[:2]))  # no caption will do as an example
    sample = run("init", "photos", "--out", "long")[1].rstrip().rsplit("\n", 1)[1]
    assert shlex.split(sample) == ["ldm", "sample", "runs/long", "--prompt", init.PROMPT, "--count", "8"]
    sample = run("init", "photos", "--out", "none", "--captions", "none")[1].rstrip().rsplit("\n", 1)[1]
    assert shlex.split(sample) == ["ldm", "sample", "runs/none", "--count", "8"]


def test_columns_that_can_be_conditions_are_named(run: Call, tmp_path: Path) -> None:
    names = paint(tmp_path / "things", 20)
    rows = [
        json.dumps({"file_name": name, "text": "a thing", "kind": "hat", "year": 2000 + i})
        for i, name in enumerate(names)
    ]
    (tmp_path / "things/metadata.jsonl").write_text("\n".join(rows))
    code, out, _ = run("init", "things")
    assert code == 0 and "  columns   kind, year: a model can be given these too, by conditions: in ldm.yaml" in out
    paint(tmp_path / "classes/hats", 12)
    paint(tmp_path / "classes/cats", 12)
    assert "columns" not in run("init", "classes")[1]


def test_what_to_expect_is_said_before_with_a_better_way_that_starts(run: Call, tmp_path: Path) -> None:
    """The command that is named is read by the configuration that it names, with the data that were found."""
    paint(tmp_path / "my cats/red_fox", 20, side=90)
    paint(tmp_path / "my cats/house-cat", 20, side=90)
    code, out, err = run("init", "my cats", "--out", "configs/cats")
    settings = written(tmp_path / "configs/cats")["ldm"]
    assert (code, err) == (0, "") and isinstance(settings, DiffusionTrainingConfig)
    images = int(out.split(" for training")[0].split()[-1])
    minutes = int(out.split("expect    about ")[1].split()[0])
    plan = recipe.Plan("cats", "configs/cats", settings.data, images, "cpu", 12, ())
    assert minutes == round(sum(plan.seconds(stage) for stage in plan.stages) / 60)
    assert "images of 32×32 pixels, where half of yours have a short side of 90 or more" in out
    seen = round(settings.train.steps * settings.train.batch_size / images)
    assert f"{images} images are few for a model that starts from nothing: it sees each {seen} times" in out
    assert "runs/cats/best" in out and settings.train.keep_best
    (command,) = (line for line in out.splitlines() if "ldm train-ldm configs/sd1/ldm.yaml" in line)
    ldm, name, file, *overrides = shlex.split(command)
    lora = config.load(DiffusionTrainingConfig, Path(__file__).resolve().parents[2] / file, overrides)
    assert (ldm, name) == ("ldm", "train-ldm") and lora.train.lora is not None and lora.init is not None
    for field in ("folder", "captions", "caption_templates", "validation_fraction"):
        assert getattr(lora.data, field) == getattr(settings.data, field)
    code, out, _ = run("init", "my cats", "--captions", "none", "--out", "none")
    assert "better    with captions a pretrained Stable Diffusion" in out and "configs/sd1" not in out


@pytest.mark.parametrize(
    ("images", "machine", "side", "few", "better"),
    [
        (4999, "gpu", 64, True, True),
        (5000, "gpu", 64, False, False),
        (5000, "gpu", 400, False, False),
        (5000, "cpu", 400, False, True),  # too large for this machine
        (5000, "cpu", 63, False, False),
    ],
)
def test_a_better_way_is_named_where_it_is_one(images: int, machine: str, side: int, few: bool, better: bool) -> None:
    data = DataConfig(folder="c", captions="sidecar", image_size=64 if machine == "gpu" else 32)
    said = "\n".join(expectations(recipe.Plan("a", "b", data, images, machine, 12, ()), side))
    assert ("images are few" in said) == few and ("train.lora.rank=8" in said) == better
    assert ("which needs a GPU" in said) == (better and machine == "cpu")
    assert ("not measured" in said.splitlines()[0]) == (machine == "gpu")


def test_validations_are_often_enough_to_see_a_rise() -> None:
    plan = recipe.Plan("a", "b", DataConfig(folder="c"), 400, "cpu", 12, ())
    for text in recipe.write(plan).values():
        train = yaml.safe_load(text)["train"]
        assert 10 <= train["steps"] // train["validate_every"] <= 20 and train["keep_best"] is True


def folder_of(kind: str, folder: Path) -> None:
    """Folders that look like one thing and are another."""
    names = paint(folder, 20)
    if kind == "hugging face":
        paint(folder / "train", 20)
        metadata(folder / "train", names)
    elif kind == "splits":
        for split in ("train", "val"):
            paint(folder / split / "cats", 10)
        for name in names:
            (folder / name).unlink()
    elif kind == ".caption":
        for name in names:
            (folder / name).with_suffix(kind).write_text("a caption")
    elif kind == "double":
        for name in names:
            (folder / f"{name}.txt").write_text("a caption")
    elif kind == "empty captions":
        for name in names:
            (folder / name).with_suffix(".txt").touch()
    elif kind == "array":
        (folder / "metadata.jsonl").write_text(json.dumps([{"file_name": name, "text": "x"} for name in names]))
    elif kind == "one text":
        (folder / "05.txt").write_text("a caption")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("hugging face", "has no metadata.jsonl, but train/metadata.jsonl: give that folder"),
        ("splits", "train, val look like splits, not classes: give one of them"),
        (".caption", "20 files such as 00.caption are beside images: if they hold captions, rename them to 00.txt"),
        ("double", "20 files such as 00.png.txt are beside images: if they hold captions, rename them to 00.txt"),
        ("empty captions", "every caption is empty: fix them, or train without with --captions none"),
        ("array", "none of 1 images and rows can be used, such as look/metadata.jsonl:1: must be an object like"),
        (
            "one text",
            "1 usable image is too few to train on some and validate on others, and 19 were left out,"
            " such as look/00.png: no 00.txt",
        ),
    ],
)
def test_captions_in_another_place_are_not_passed_over(run: Call, tmp_path: Path, kind: str, message: str) -> None:
    folder_of(kind, tmp_path / "look")
    code, out, err = run("init", "look")
    assert code == 3 and message in err and err.count("\n") == 1 and out == "", err


def test_pipes_broken_links_and_loops_are_named_or_followed_once(run: Call, tmp_path: Path) -> None:
    paint(tmp_path / "photos", 20)
    paint(tmp_path / "elsewhere", 5, suffix="jpg")
    photos = tmp_path / "photos"
    os.mkfifo(photos / "pipe.png")
    (photos / "dir.png").mkdir()
    (photos / "broken.png").symlink_to("nowhere")
    (photos / "self.png").symlink_to("self.png")
    (photos / "linked").symlink_to(tmp_path / "elsewhere")
    (photos / "loop").symlink_to(photos)
    (photos / "a.heic").touch()
    code, out, err = run("init", "photos")
    assert (code, err) == (0, "") and "photos: 25 images" in out and "left out  3 of 28" in out
    assert (
        "photos/pipe.png: is not a regular file" in out
        and "photos/broken.png: is not a file" in out
        and "photos/self.png: is not a file" in out
    )
    assert "1 images are of formats that are not read" in out
    for name in ("00", "01"):
        (photos / f"{name}.txt").write_text("a caption")
    os.mkfifo(photos / "02.txt")
    assert "photos/02.txt: is not a regular file" in run("init", "photos", "--out", "again")[1]
