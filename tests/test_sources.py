"""The digits, the textures and a folder of the user's images."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.config import DataConfig
from ldm.data import folder as folder_module
from ldm.data.digits import NAMES
from ldm.data.folder import FolderSource, read_image
from ldm.data.shapes import COLOURS
from ldm.data.sources import DataError, Source, open_source


def digits(split: str = "train", **settings) -> Source:
    return open_source(DataConfig(source="digits", **{"image_size": 32, **settings}), split)


def textures(split: str = "train", **settings) -> Source:
    return open_source(DataConfig(source="textures", **{"image_size": 32, **settings}), split)


# --- digits


def test_digits_are_split_by_fives_and_keep_their_labels():
    from sklearn.datasets import load_digits

    labels = load_digits().target  # type: ignore[attr-defined]
    train, validation = digits(), digits("validation")
    assert (train.length, validation.length) == (1437, 360)
    assert [validation[i].truth for i in range(360)] == labels[::5].tolist()
    assert [train[i].truth for i in range(4)] == labels[1:5].tolist()
    assert all(train[i].text == f"a handwritten digit {NAMES[train[i].truth]}" for i in range(20))
    assert train.captions(10) == sorted({train[i].text for i in range(100)})
    assert train.captions(9) is None


@pytest.mark.parametrize("channels", [1, 3])
def test_digits_enlarge_the_original_pixels(channels):
    from sklearn.datasets import load_digits

    source = digits("validation", image_channels=channels)
    for i in range(20):
        image = source[i].image
        assert image.shape == (32, 32, channels) and image.dtype == np.uint8
        blocks = image.astype(float).reshape(8, 4, 8, 4, channels).mean((1, 3, 4)) * 16 / 255
        original = load_digits().images[5 * i]  # type: ignore[attr-defined]
        assert np.corrcoef(blocks.ravel(), original.ravel())[0, 1] > 0.97
        assert blocks.mean() == pytest.approx(original.mean(), rel=0.04)  # full ink is white, no ink black


def test_digits_name_what_is_missing(monkeypatch):
    with pytest.raises(DataError, match="image_channels is 2"):
        digits(image_channels=2)
    with pytest.raises(DataError, match="image_size is 7"):
        digits(image_size=7)
    with pytest.raises(DataError, match="no split 'held_out'"):
        digits("held_out")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        digits()


# --- textures


@pytest.mark.parametrize("side", [7, 32, 50])
def test_textures_mix_their_two_colours(side):
    source = textures(image_size=side)
    for i in range(60):
        sample = source[i]
        truth = sample.truth
        assert sample.text == f"{truth.first} and {truth.second} {truth.kind}"
        assert sample.image.shape == (side, side, 3) and sample.image.dtype == np.uint8
        start, end = (np.array(COLOURS[name], float) for name in (truth.first, truth.second))
        share = (sample.image - start) @ (end - start) / np.square(end - start).sum()
        assert share.min() >= -0.01 and share.max() <= 1.01 and np.ptp(share) > 0.4
        assert abs(sample.image - (start + share[..., None] * (end - start))).max() <= 1  # on the line between the two


def test_stripes_have_the_stated_period_and_angle():
    source = textures(image_size=96)
    stripes = [s for s in (source[i] for i in range(200)) if s.truth.kind == "stripes" and s.truth.period < 24]
    assert len(stripes) > 10
    for sample in stripes:
        wave = sample.image.astype(float).sum(-1)
        power = abs(np.fft.fft2((wave - wave.mean()) * np.hanning(96)[:, None] * np.hanning(96), s=(384, 384)))
        row, column = np.unravel_index(power[:, :192].argmax(), (384, 192))
        found = np.array([np.fft.fftfreq(384)[column], np.fft.fftfreq(384)[row]])
        asked = np.array([np.cos(sample.truth.angle), np.sin(sample.truth.angle)]) / sample.truth.period
        assert min(np.linalg.norm(found - asked), np.linalg.norm(found + asked)) < 0.006


def test_textures_are_a_function_of_the_index():
    a, b = textures(), textures(size=5)
    for i in (4, 0):
        np.testing.assert_array_equal(a[i].image, b[i].image)
    assert a.length is None and b.length == 5 and a.fingerprint != b.fingerprint
    assert a[0].truth != textures("validation")[0].truth
    listed = a.captions(1000)
    assert listed is not None and len(listed) == 4 * 28 and a.captions(111) is None
    assert {a[i].text for i in range(50)} <= set(listed)
    with pytest.raises(IndexError):
        b[5]
    with pytest.raises(DataError, match="image_channels must be 3"):
        textures(image_channels=1)


# --- a folder


def write(folder: Path, rows: list, images: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    for i, row in enumerate(rows):
        if images and isinstance(row, dict):
            path = folder / row["file_name"]
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (6 + i % 3, 5), (i, 2 * i, 255 - i)).save(path)
    return folder


def rows(n: int) -> list[dict]:
    return [{"file_name": f"sub/{i}.png", "text": f"picture {i % 7}", "score": i} for i in range(n)]


def opened(folder: Path, split: str = "train", **settings) -> FolderSource:
    source = open_source(DataConfig(folder=str(folder), **settings), split)
    assert isinstance(source, FolderSource)
    return source


def test_folder_reads_images_captions_and_columns(tmp_path):
    write(tmp_path, rows(40))
    train, validation = (opened(tmp_path, split, validation_fraction=0.2) for split in ("train", "validation"))
    assert train.length and validation.length and train.length + validation.length == 40
    seen = {}
    for source in (train, validation):
        for i in range(len(source.rows)):
            sample = source[i]
            n = sample.truth["score"]
            assert sample.truth == {"score": n} and sample.text == f"picture {n % 7}"
            assert sample.image.shape == (5, 6 + n % 3, 3) and tuple(sample.image[0, 0]) == (n, 2 * n, 255 - n)
            seen[n] = source
    assert len(seen) == 40
    assert train.captions(7) == [f"picture {i}" for i in range(7)] and train.captions(6) is None
    assert pickle.loads(pickle.dumps(train))[0].text == train[0].text  # data workers get copies


def test_split_is_stable_under_adding_files_and_has_the_asked_share(tmp_path):
    some = opened(write(tmp_path / "a", rows(100)), "validation", validation_fraction=0.3)
    more = opened(write(tmp_path / "b", rows(300)[::-1]), "validation", validation_fraction=0.3)
    names = {row.file_name for row in more.rows}
    assert {row.file_name for row in some.rows} == {name for name in names if int(Path(name).stem) < 100}
    assert 60 < len(names) < 120


def test_fingerprint_follows_what_determines_the_samples(tmp_path):
    base = opened(write(tmp_path / "a", rows(40))).fingerprint
    assert opened(write(tmp_path / "b", rows(40)[::-1])).fingerprint == base  # the order of the rows is no fact
    others = [opened(tmp_path / "a", image_channels=1).fingerprint, opened(tmp_path / "a", validation_fraction=0.2).fingerprint]
    changed = rows(40)
    changed[3]["text"] = changed[5]["text"] = "another"
    others.append(opened(write(tmp_path / "c", changed)).fingerprint)
    path = tmp_path / "a" / opened(tmp_path / "a").rows[0].file_name
    path.write_bytes(path.read_bytes() + b"\0")
    others.append(opened(tmp_path / "a").fingerprint)
    assert len({base, *others}) == 5


GOOD = {"file_name": "a.png", "text": "a"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"metadata.jsonl:2: not JSON"),
        ("[1]", r":2: must be an object like"),
        ('{"file_name": "b.png"}', r":2: no text, only file_name"),
        ('{"text": "b"}', r":2: no file_name, only text"),
        ("{}", r":2: no file_name, only an empty object"),
        ('{"file_name": "b.png", "text": 3}', r":2: text must be text, got 3"),
        ('{"file_name": null, "text": "b"}', r":2: file_name must be text, got None"),
        ('{"file_name": "b.png", "text": "\\ud800"}', r":2: text holds half of a surrogate"),
        ('{"file_name": "../b.png", "text": "b"}', r":2: file_name '../b.png' leaves the folder"),
        ('{"file_name": "x/../../b.png", "text": "b"}', r":2: file_name .* leaves the folder"),
        ('{"file_name": "/etc/hostname", "text": "b"}', r":2: file_name .* leaves the folder"),
        ('{"file_name": "b.png", "text": "b"}', r":2: no file 'b.png'"),
        ('{"file_name": "b\\u0000.png", "text": "b"}', r":2: no file"),
        ('{"file_name": ".", "text": "b"}', r":2: file_name '.' is no regular file"),
        ('{"file_name": "./a.png", "text": "b"}', r":2: file_name 'a.png' stands on line 1 already"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, row, message):
    write(tmp_path, [GOOD, row])
    with pytest.raises(DataError, match=message) as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)


def test_blank_lines_and_byte_order_marks_are_no_fault(tmp_path):
    write(tmp_path, [GOOD])
    (tmp_path / "metadata.jsonl").write_bytes(b'\xef\xbb\xbf\r\n{"file_name": "a.png", "text": "\xc3\xa4\xe2\x80\xa8"}\r\n\n')
    assert opened(tmp_path, validation_fraction=0.0)[0].text == "ä\u2028"
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "\xe4"}\n')
    with pytest.raises(DataError, match="not UTF-8 at byte 32"):
        opened(tmp_path)


def test_empty_sets_say_what_to_do(tmp_path):
    write(tmp_path, [GOOD])
    with pytest.raises(DataError, match=r"validation split is empty, none of 1 files .*raise data.validation_fraction or add images"):
        opened(tmp_path, "validation", validation_fraction=0.0)
    write(tmp_path, ["", " "])
    with pytest.raises(DataError, match="has no rows"):
        opened(tmp_path)
    with pytest.raises(DataError, match="image_channels is 4"):
        opened(tmp_path, image_channels=4)


def test_missing_metadata_names_what_was_found_instead(tmp_path):
    with pytest.raises(DataError, match=r"no folder .*nowhere"):
        opened(tmp_path / "nowhere")
    for name in ("metadata.json1", "captions.jsonl", "holiday.png"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"has no metadata.jsonl \(found captions.jsonl, metadata.json1\)"):
        opened(tmp_path)


# --- one image


def reread(tmp_path: Path, image: Image.Image, name: str, channels: int = 3, **options) -> np.ndarray:
    image.save(tmp_path / name, **options)
    return read_image(tmp_path / name, channels)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tiff"])
@pytest.mark.parametrize("channels", [1, 3])
def test_formats(tmp_path, name, channels):
    got = reread(tmp_path, Image.new("RGB", (9, 5), (250, 100, 20)), name, channels)
    want = (250, 100, 20) if channels == 3 else (0.299 * 250 + 0.587 * 100 + 0.114 * 20,)
    assert got.shape == (5, 9, channels) and got.dtype == np.uint8 and got.flags.writeable
    assert abs(got - np.array(want)).max() <= 4


def test_hidden_colours_of_transparent_pixels_become_white(tmp_path):
    rgba = np.array([[[255, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 128]]], np.uint8)
    got = reread(tmp_path, Image.fromarray(rgba), "a.png")
    assert got[0].tolist()[:2] == [[255, 255, 255], [255, 0, 0]] and abs(got[0, 2].astype(int) - 127).max() <= 1
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    assert reread(tmp_path, palette, "b.png", transparency=0)[0].tolist() == [[255, 255, 255], [0, 0, 255]]
    assert reread(tmp_path, palette, "c.png")[0].tolist() == [[255, 0, 0], [0, 0, 255]]
    assert reread(tmp_path, Image.fromarray(rgba).convert("LA"), "d.png", 1)[0, 0].tolist() == [255]


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    wide = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    for name in ("a.png", "a.tiff"):
        got = reread(tmp_path, Image.fromarray(wide), name, 1)
        np.testing.assert_array_equal(got.ravel(), np.arange(256))
    with pytest.raises(DataError, match="32 bits per channel"):
        reread(tmp_path, Image.fromarray(wide.astype(np.float32)), "b.tiff")


def test_cmyk_and_bilevel(tmp_path):
    for channels in (1, 3):
        assert reread(tmp_path, Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "a.jpg", channels).max() <= 3
        assert reread(tmp_path, Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "b.tiff", channels).min() == 255
        assert reread(tmp_path, Image.new("1", (8, 8), 1), "c.png", channels).min() == 255


def test_exif_orientation_turns_the_image(tmp_path):
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :4] = 255  # the left half is bright
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90° clockwise: left becomes top
    got = reread(tmp_path, Image.fromarray(pixels), "a.png", exif=exif)
    assert got.shape == (8, 4, 3) and got[:4].min() == 255 and got[4:].max() == 0


def test_an_image_beyond_the_limit_is_refused_before_decoding(tmp_path, monkeypatch):
    Image.new("1", (20_000, 10_000)).save(tmp_path / "bomb.png")  # a few kilobytes claim 200 megapixels
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    for name in ("bomb.png", "large.png"):
        with pytest.raises(DataError, match=f"{name}: .*more than 89478485 pixels"):
            read_image(tmp_path / name, 3)
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    monkeypatch.setattr(folder_module, "PIXEL_LIMIT", 99)
    with pytest.raises(DataError, match="10×10 is more than 99 pixels"):
        read_image(tmp_path / "a.png", 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tiff"])
def test_damaged_files_are_one_line(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for data in (b"", b"no image", whole[: len(whole) // 2], whole[:20]):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=name) as caught:
            read_image(tmp_path / name, 3)
        assert "\n" not in str(caught.value)


def test_other_formats_are_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.ppm")
    with pytest.raises(DataError, match="no image in one of the formats JPEG, PNG"):
        read_image(tmp_path / "a.ppm", 3)
