"""The digits and the textures."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from ldm.config import DataConfig
from ldm.data.digits import NAMES
from ldm.data.sample import Source
from ldm.data.shapes import COLOURS
from ldm.data.sources import open_source
from ldm.errors import DataError


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
