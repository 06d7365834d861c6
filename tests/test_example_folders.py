"""The examples that make folders of images: crops of photographs, and the icons of a theme."""

import io
import runpy
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.scripts import ROOT, example

from ldm import config
from ldm.config import AutoencoderTrainingConfig, DataConfig
from ldm.data.folder import FolderSource
from ldm.errors import DataError

PHOTOS = example("folder_of_photos")
ICONS = example("folder_of_icons")
CONFIGS = [config.load(AutoencoderTrainingConfig, ROOT / f"configs/photographs/{name}.yaml") for name in ("l1", "gan")]


def written(name: str, *arguments: str) -> str:
    """The one line of an example that ends with an error."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", [f"{name}.py", *arguments])
        runpy.run_path(str(ROOT / f"examples/{name}.py"), run_name="__main__")
    assert isinstance(ended.value.code, str) and "\n" not in ended.value.code  # printed to stderr, exit code 1
    return ended.value.code


# crops of photographs


def ramps() -> dict[str, Image.Image]:
    """For each photograph an image whose red is x, whose green is y, and whose blue is its number."""
    names = sorted(name for split in PHOTOS.SPLITS.values() for name in split)
    x, y = np.meshgrid(np.arange(200, dtype=np.uint8), np.arange(150, dtype=np.uint8))
    return {name: Image.fromarray(np.stack([x, y, np.full_like(x, i)], axis=-1)) for i, name in enumerate(names)}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(PHOTOS, "photographs", ramps)
    assert PHOTOS.main(str(tmp_path / "crops"), 400, 64) == 400
    return tmp_path / "crops"


def test_training_and_validation_show_different_photographs(made: Path) -> None:
    numbers = {name: i for i, name in enumerate(ramps())}
    data = replace(CONFIGS[0].data, folder=str(made))
    seen = {}
    for split in ("train", "validation"):
        source = FolderSource(data, split)
        assert not source.skipped
        seen[split] = {int(blue) for i in range(len(source.rows)) for blue in np.unique(source[i].image[..., 2])}
        assert {source.text(i) for i in range(len(source.rows))} == set(PHOTOS.SPLITS[split])
        assert seen[split] == {numbers[name] for name in PHOTOS.SPLITS[split]}
    assert not seen["train"] & seen["validation"]


def test_a_crop_is_where_its_row_says(made: Path) -> None:
    sides = set()
    source = FolderSource(DataConfig(folder=str(made), image_size=64), "train")
    for i in range(100):
        sample = source[i]
        left, top, side = (sample.truth[key] for key in ("left", "top", "side"))
        sides.add(side)
        assert sample.image.shape == (64, 64, 3) and left >= 0 and top >= 0 and left + side <= 200 and top + side <= 150
        middle = (left + (side - 1) / 2, top + (side - 1) / 2)
        assert np.allclose(sample.image[..., :2].mean((0, 1)), middle, atol=0.75)  # rounding is half of a pixel
    assert min(sides) >= 64 and max(sides) <= 128 and len(sides) > 40


def test_the_same_crops_are_made_again(made: Path) -> None:
    again = made.parent / "again"
    PHOTOS.main(str(again), 400, 64)
    assert {f.name: f.read_bytes() for f in made.iterdir()} == {f.name: f.read_bytes() for f in again.iterdir()}


def test_the_photographs_are_those_of_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    grey, colour = np.full((20, 30), 7, np.uint8), np.zeros((20, 30, 3), np.uint8)
    data = types.SimpleNamespace(stereo_motorcycle=lambda: (colour, colour, np.zeros((20, 30))))
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        setattr(data, name, lambda: colour)
    data.grass = data.gravel = lambda: grey
    monkeypatch.setitem(sys.modules, "skimage", types.SimpleNamespace(data=data))
    photos = PHOTOS.photographs()
    assert sorted(photos) == sorted(ramps()) and {photo.mode for photo in photos.values()} == {"RGB"}
    assert photos["grass"].getpixel((0, 0)) == (7, 7, 7) and photos["china"].size == (640, 427)


def test_both_configurations_differ_in_the_discriminator_alone() -> None:
    plain, adversarial = CONFIGS
    assert plain.loss.gan == 0 < adversarial.loss.gan
    assert adversarial.data.validation_fraction == PHOTOS.FRACTION
    same = replace(
        adversarial,
        run=plain.run,
        loss=replace(adversarial.loss, gan=0.0),
        train=replace(adversarial.train, steps=plain.train.steps),
    )
    assert same == plain


def test_faults_of_the_photographs_are_one_line(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"{made} exists: name a new folder, or delete it" in written("folder_of_photos", str(made))
    with pytest.raises(DataError, match=r"16 to 150 pixels, and there are at least 100 of them: got 151, 400"):
        PHOTOS.main(str(made.parent / "large"), 400, 151)
    monkeypatch.setitem(sys.modules, "skimage", None)
    line = written("folder_of_photos", str(made.parent / "new"))
    assert "skimage is missing: pip install scikit-learn scikit-image" in line


# icons of a theme

INDEX = """[Icon Theme]
Name=Test
Directories=48x48/actions, 48x48/devices,48x48@2/actions,32x32/actions,scalable/actions,absent/actions

[48x48/actions]
Context=Actions
Size=48
Type=Fixed

[48x48/devices]
Size=48

[48x48@2/actions]
Size=48
Scale=2

[32x32/actions]
Size=32

[scalable/actions]
Size=128
MinSize=40
MaxSize=256
Type=Scalable
"""


def icon(file: Path, colour: tuple[int, ...], side: int = 48) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGBA", (side, side), colour).save(file)


@pytest.fixture
def theme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed theme, the only one, with an icon of each kind; no library for SVG."""
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path / "share"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
    monkeypatch.setitem(sys.modules, "cairosvg", None)
    folder = tmp_path / "share/icons/Test"
    folder.mkdir(parents=True)
    (folder / "index.theme").write_text(INDEX, encoding="utf-8")
    actions = folder / "48x48/actions"
    icon(actions / "document-open-recent.png", (200, 0, 0, 255))
    icon(actions / "go_up.x.png", (0, 200, 0, 255))
    icon(actions / "edit-copy-symbolic.symbolic.png", (1, 1, 1, 255))
    icon(actions / "view-symbolic.png", (2, 2, 2, 255))
    icon(actions / "wrong.png", (3, 3, 3, 255), side=16)
    icon(actions / "hidden-a.png", (9, 9, 9, 0))
    icon(actions / "hidden-b.png", (8, 8, 8, 0))
    (actions / "broken.png").write_text("no image", encoding="utf-8")
    (actions / "a-link.png").symlink_to("document-open-recent.png")
    icon(folder / "48x48/devices/mouse.png", (0, 0, 200, 255))
    icon(folder / "48x48@2/actions/double.png", (4, 4, 4, 255), side=96)
    icon(folder / "32x32/actions/small.png", (5, 5, 5, 255), side=32)
    for name in ("star", "mouse"):
        (folder / "scalable/actions").mkdir(exist_ok=True, parents=True)
        (folder / f"scalable/actions/{name}.svg").write_text("<svg/>", encoding="utf-8")
    return folder


def captions(folder: Path) -> set[str]:
    data = DataConfig(folder=str(folder), image_size=48, validation_fraction=0.0)
    return {row.text for row in FolderSource(data, "train").rows}


def test_captions_are_the_names_of_the_icons_that_differ(
    theme: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ICONS.main(str(tmp_path / "icons"), None, 48) == 4
    assert captions(tmp_path / "icons") == {"document open recent", "go up x", "mouse", "hidden a"}
    out = capsys.readouterr().out
    assert f"4 icons of 48 px from {theme}; left out: " in out
    assert "2 that look like another one" in out and "2 that cannot be read, or have another size" in out
    source = FolderSource(DataConfig(folder=str(tmp_path / "icons"), image_size=48, validation_fraction=0.0), "train")
    (mouse,) = [source[i] for i in range(4) if source.text(i) == "mouse"]
    assert np.all(mouse.image == (0, 0, 200)) and mouse.truth == {"context": ""}


def test_another_size_and_a_theme_by_its_folder(theme: Path, tmp_path: Path) -> None:
    assert ICONS.main(str(tmp_path / "icons"), str(theme), 32) == 1
    assert captions(tmp_path / "icons") == {"small"}


def test_svg_files_are_rendered_where_cairosvg_is_installed(
    theme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def svg2png(url: str, output_width: int, output_height: int) -> bytes:
        assert Path(url).suffix == ".svg"
        content = io.BytesIO()
        Image.new("RGBA", (output_width, output_height), (70, 80, 90, 255)).save(content, format="PNG")
        return content.getvalue()

    monkeypatch.setitem(sys.modules, "cairosvg", types.SimpleNamespace(svg2png=svg2png))
    assert ICONS.main(str(tmp_path / "icons"), "Test", 48) == 5  # mouse.svg gives way to mouse.png
    assert "star" in captions(tmp_path / "icons")
    assert ICONS.main(str(tmp_path / "scaled"), "Test", 100) == 1  # all SVG files are of one colour here


def test_the_theme_with_most_icons_is_chosen(theme: Path, tmp_path: Path) -> None:
    other = tmp_path / "home/icons/Few"
    icon(other / "48/one.png", (1, 2, 3, 255))
    (other / "index.theme").write_text("[Icon Theme]\nDirectories=48\n[48]\nSize=48\n", encoding="utf-8")
    assert ICONS.find_theme(None, 48, (".png",)) == theme
    assert ICONS.find_theme("Few", 48, (".png",)) == other


def test_faults_of_the_icons_are_one_line(theme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = str(tmp_path / "icons")
    assert f"{theme} has no icon of 40 pixels: its icons are SVG files, so install cairosvg" in written(
        "folder_of_icons", out, "--size", "40"
    )
    assert f"{theme} has no icon of 20 pixels: give --size 32, 48" in written("folder_of_icons", out, "--size", "20")
    assert "no icon theme 'Tst'" in (line := written("folder_of_icons", out, "--theme", "Tst")) and "Test" in line
    (theme / "index.theme").write_text("[48x48/actions", encoding="utf-8")
    assert f"{theme}/index.theme cannot be read as the index" in written("folder_of_icons", out)
    (theme / "index.theme").unlink()
    assert f"no icon theme in {tmp_path}/nowhere/.icons, " in written("folder_of_icons", out)
    assert f"{theme} exists: name a new folder" in written("folder_of_icons", str(theme))
    assert not Path(out).exists()
