"""The judges, against drawings whose truth is known and against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from support.drawings import drawings, spoil

from ldm.config import DataConfig
from ldm.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    RADII,
    SHAPES,
    SIZES,
    Object,
    Scene,
    caption,
    coverage,
    draw,
    margin,
    stripe,
)
from ldm.data.sources import open_source
from ldm.evaluation.judges.digits import DigitJudge
from ldm.evaluation.judges.shapes import ShapesJudge, agreement, proportion, score

N = 200
SOURCES = {1: "shapes", 2: "shapes-two"}  # by the number of objects


@pytest.mark.parametrize(("objects", "side"), [(1, 32), (1, 24), (2, 48), (2, 32)])
def test_clean_drawings_are_read_exactly(objects, side):
    images, scenes, texts = drawings(SOURCES[objects], side, N)
    readings = ShapesJudge(side, objects).read(images)
    for reading, scene in zip(readings, scenes, strict=True):
        assert reading.background == scene.background
        assert set(reading.objects) == set(scene.objects)  # positions to the pixel
    assert all(row["accuracy"] == 1 for row in score(readings, texts).values())


@pytest.mark.parametrize(("objects", "side"), [(1, 32), (2, 48)])
def test_blurred_and_noisy_drawings_are_read(objects, side):
    images, _, texts = drawings(SOURCES[objects], side, N)
    report = score(ShapesJudge(side, objects).read(spoil(images, 0.6, 0.03)), texts)
    assert report["all"]["accuracy"] >= 0.99


@pytest.mark.parametrize(
    ("objects", "side", "chance"),
    [
        (1, 32, {"background": 1 / 6, "size": 1 / 2, "colour": 1 / 8, "shape": 1 / 6}),
        (2, 48, {"background": 1 / 6, "relation": 1 / 4}),
    ],
)
def test_shuffled_captions_score_at_chance(objects, side, chance):
    images, _, texts = drawings(SOURCES[objects], side, N)
    other = texts[N // 2 + 1 :] + texts[: N // 2 + 1]
    report = score(ShapesJudge(side, objects).read(images), other)
    for name, p in chance.items():
        assert binomtest(round(report[name]["accuracy"] * N), N, p).pvalue > 1e-4, name
    assert report["all"]["accuracy"] < 0.03


def test_the_reading_is_the_nearest_of_all_drawings():
    """Double exposures of two scenes, against every picture that could be drawn, composed one by one."""
    side = 24
    drawn, _, _ = drawings(SOURCES[1], side, N)
    images = spoil((drawn[:40] // 2 + drawn[40:80] // 2), 1.0, 0.1)
    flat = images.reshape(len(images), -1) / 255
    names = list(itertools.product(BACKGROUNDS, COLOURS))
    grounds = np.array([BACKGROUNDS[b] for b, _ in names])[:, None, None] / 255
    paints = np.array([COLOURS[c] for _, c in names])[:, None, None] / 255
    least, best = np.full(len(images), np.inf), [Scene("", ())] * len(images)
    for size, shape in itertools.product(SIZES, SHAPES):
        low = margin(Object(size, "red", shape), side)
        for x, y in itertools.product(range(low, side - low), repeat=2):
            mask = np.zeros((side, side, 1))
            mask[y - low : y + low + 1, x - low : x + low + 1, 0] = coverage(shape, RADII[size] * side)
            pictures = (grounds + mask * (paints - grounds)).reshape(len(names), -1)
            errors = np.square(pictures).sum(1)[:, None] - 2 * pictures @ flat.T  # without |image|², the same for all
            for i in np.flatnonzero(errors.min(0) < least):
                background, colour = names[errors[:, i].argmin()]
                least[i], best[i] = errors[:, i].min(), Scene(background, (Object(size, colour, shape, x, y),))
    assert ShapesJudge(side, 1).read(images) == best


def test_a_faint_small_shape_is_still_seen():
    scene = Scene("white", (Object("small", "cyan", "star", 20, 11),))
    faded = np.rint(255 - 0.6 * (255 - draw(scene, 32).astype(float))).astype(np.uint8)
    assert ShapesJudge(32, 1).read(faded[None]) == [scene]


def two(first: tuple[str, str], second: tuple[str, str], relation: str, background: str = "white") -> Scene:
    return Scene(background, (Object(None, *first), Object(None, *second)), relation)


def test_agreement_of_two_objects():
    red, green = ("red", "circle"), ("green", "square")
    reading = two(red, green, "left of")
    assert all(agreement(reading, two(red, green, "left of")).values())
    assert all(agreement(reading, two(green, red, "right of")).values())  # the same picture in other words
    swapped = agreement(reading, two(red, green, "right of"))
    assert swapped == {"background": True, "colours": True, "shapes": True, "relation": False, "all": False}
    assert not agreement(reading, two(red, green, "above"))["relation"]
    crossed = agreement(
        reading, two(("red", "square"), ("green", "circle"), "left of")
    )  # colours bound to the wrong shapes
    assert crossed == {"background": True, "colours": True, "shapes": False, "relation": True, "all": False}
    assert not agreement(reading, two(red, green, "left of", "black"))["all"]


def test_agreement_of_one_object():
    reading = Scene("white", (Object("small", "red", "circle", 9, 9),))
    for asked, wrong in (
        (Scene("black", (Object("small", "red", "circle"),)), "background"),
        (Scene("white", (Object("large", "red", "circle"),)), "size"),
        (Scene("white", (Object("small", "blue", "circle"),)), "colour"),
        (Scene("white", (Object("small", "red", "ring"),)), "shape"),
    ):
        assert {name for name, right in agreement(reading, asked).items() if not right} == {wrong, "all"}


def test_relation_follows_the_drawn_positions():
    judge = ShapesJudge(48, 2)
    red, blue = Object(None, "red", "star", 24, 10), Object(None, "blue", "ring", 20, 35)
    for scene in (Scene("beige", (red, blue), "above"), Scene("beige", (blue, red), "below")):
        (reading,) = judge.read(draw(scene, 48)[None])
        assert (
            agreement(reading, scene)["all"]
            and caption(reading) == "a red star above a blue ring on a beige background"
        )


def test_two_objects_are_read_in_two_colours():
    """No scene has two of one colour, so the nearest scene has not either."""
    scene = Scene("beige", (Object(None, "red", "star", 24, 10), Object(None, "red", "ring", 20, 35)))
    (reading,) = ShapesJudge(48, 2).read(draw(scene, 48)[None])
    assert len({o.colour for o in reading.objects}) == 2


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (7, 10), (10, 10), (493, 500)])
def test_interval_is_wilsons(successes, n):
    got, want = proportion(successes, n), binomtest(successes, n).proportion_ci(method="wilson")
    assert (got["low"], got["high"]) == pytest.approx((want.low, want.high), abs=1e-6)
    assert got["accuracy"] == successes / n and got["n"] == n


def test_batches_do_not_matter(monkeypatch):
    images, _, _ = drawings(SOURCES[1], 32, N)
    judge = ShapesJudge(32, 1)
    whole = judge.read(images[:20])
    monkeypatch.setattr("ldm.evaluation.judges.shapes._CHUNK", 1)
    assert judge.read(images[:20]) == whole
    assert judge.read(images[:0]) == []
    assert not torch.is_inference_mode_enabled()


def test_misuse_is_named():
    judge = ShapesJudge(32, 1)
    with pytest.raises(ValueError, match=r"uint8 \[n, 32, 32, 3\], got float64"):
        judge.read(np.zeros((1, 32, 32, 3)))
    with pytest.raises(ValueError, match="1 or 2 objects, got 3"):
        ShapesJudge(32, 3)
    readings = judge.read(np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="1 readings and 2 captions"):
        score(readings, ["a", "b"])
    with pytest.raises(ValueError, match=r"2 object\(s\) was given for a reading of 1"):
        score(readings, ["a red circle above a blue ring on a white background"])


@pytest.fixture(scope="module")
def digit_judge() -> DigitJudge:
    return DigitJudge(32)


def test_digit_judge_reads_digits_it_has_not_seen(digit_judge):
    assert digit_judge.held_out_accuracy >= 0.97
    source = open_source(DataConfig(source="digits", image_size=32), "validation")
    samples = [source[i] for i in range(100)]
    read = digit_judge.read(np.stack([s.image for s in samples]))  # three channels
    assert np.mean([a == s.truth for a, s in zip(read, samples, strict=True)]) >= 0.95
    assert digit_judge.read(np.zeros((0, 32, 32, 1), np.uint8)) == []


def test_digit_judge_survives_noise_and_names_misuse(digit_judge):
    source = open_source(DataConfig(source="digits", image_size=32, image_channels=1), "validation")
    samples = [source[i] for i in range(100)]
    read = digit_judge.read(spoil(np.stack([s.image for s in samples]), 0.6, 0.05))
    assert np.mean([a == s.truth for a, s in zip(read, samples, strict=True)]) >= 0.95
    with pytest.raises(ValueError, match=r"uint8 \[n, 32, 32, c\]"):
        digit_judge.read(np.zeros((1, 8, 8, 1), np.uint8))


def test_stripes_are_read(side: int = 32):
    """Drawn, and blurred and noisy."""
    data = DataConfig(source="shapes-striped", image_size=side)
    samples = [open_source(data, split)[i] for split in ("validation", "held_out") for i in range(N // 2)]
    assert 0.35 * N < sum(s.truth.objects[0].striped for s in samples) < 0.65 * N
    images = np.stack([s.image for s in samples])
    judge = ShapesJudge(side, 1, striped=True)
    assert [reading.objects for reading in judge.read(images)] == [s.truth.objects for s in samples]
    rows = [
        agreement(r, s.truth, striped=True) for r, s in zip(judge.read(spoil(images, 0.6, 0.03)), samples, strict=True)
    ]
    assert sum(row["stripes"] for row in rows) >= 0.99 * N and sum(row["all"] for row in rows) >= 0.97 * N
    plain = Scene("white", (Object("small", "red", "circle", 9, 9),))
    assert agreement(plain, stripe(plain), striped=True) == {
        "background": True, "size": True, "colour": True, "shape": True, "stripes": False, "all": False,
    }  # fmt: skip
