"""One image file: formats, modes, depths, orientation, and what is no image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data import decode
from ldm.data.decode import read_image
from ldm.data.sample import BadSample


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
    with pytest.raises(BadSample, match="32 bits per channel"):
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
        with pytest.raises(BadSample, match=f"{name}: .*more than 89478485 pixels"):
            read_image(tmp_path / name, 3)
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    monkeypatch.setattr(decode, "PIXEL_LIMIT", 99)
    with pytest.raises(BadSample, match="10×10 is more than 99 pixels"):
        read_image(tmp_path / "a.png", 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tiff"])
def test_damaged_files_are_one_line(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for data in (b"", b"no image", whole[: len(whole) // 2], whole[:20]):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadSample, match=name) as caught:
            read_image(tmp_path / name, 3)
        assert "\n" not in str(caught.value)


def test_other_formats_are_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.ppm")
    with pytest.raises(BadSample, match="not an image in one of the formats JPEG, PNG"):
        read_image(tmp_path / "a.ppm", 3)
