"""Drawn scenes: captions, pictures, positions, splits."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from ldm.config import DataConfig
from ldm.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    EPOCH,
    RADII,
    SHAPES,
    SIZES,
    Object,
    Scene,
    ShapesSource,
    caption,
    combinations,
    coverage,
    draw,
    margin,
    parse,
)
from ldm.data.sources import open_source
from ldm.errors import DataError

ALL = [(objects, held_out) for objects in (1, 2) for held_out in (False, True)]


def source(objects: int = 1, split: str = "train", side: int = 32, **settings) -> ShapesSource:
    return ShapesSource(
        DataConfig(source="shapes" if objects == 1 else "shapes-two", image_size=side, **settings), split, objects
    )


def test_colours_are_named_once_and_far_apart():
    everything = list(COLOURS.values()) + list(BACKGROUNDS.values())
    assert not COLOURS.keys() & BACKGROUNDS.keys()
    assert min(math.dist(a, b) for a, b in itertools.combinations(everything, 2)) > 115


@pytest.mark.parametrize(
    "text",
    [
        "a small red circle on a white background",
        "a large orange ring on a black background",
        "a red circle left of a green square on a white background",
        "an orange star above a pink cross on a navy background",
    ],
)
def test_caption_wording(text):
    assert caption(parse(text)) == text


@pytest.mark.parametrize(("objects", "held_out"), ALL)
def test_parse_inverts_caption(objects, held_out):
    scenes = combinations(objects, held_out)
    assert all(parse(caption(scene)) == scene for scene in scenes[:: 1 if objects == 1 else 37])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a dog",
        "a small red circle on a red background",
        "A small red circle on a white background",
        "a small red circle on a white background.",
        "a orange star above a pink cross on a navy background",
        "a red circle beside a green square on a white background",
        "a big red circle on a white background",
    ],
)
def test_parse_refuses_other_text(text):
    with pytest.raises(ValueError, match="not a caption of a drawn scene"):
        parse(text)


# Areas in units of radius², by elementary geometry.
OUTER = 1 / math.sin(math.radians(72))
AREAS = {
    "circle": math.pi,
    "square": 1.8**2,
    "triangle": math.sqrt(3),
    "star": 10 * 0.5 * OUTER * 0.45 * OUTER * math.sin(math.radians(36)),
    "cross": 2 * 2 * 0.72 - 0.72**2,
    "ring": math.pi * 0.75,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [7.5, 12.0, 40.0])
def test_coverage_has_the_area_and_extent_of_the_shape(shape, radius):
    mask = coverage(shape, radius)
    assert mask.sum() == pytest.approx(AREAS[shape] * radius**2, rel=0.015)
    np.testing.assert_allclose(mask, mask[:, ::-1], atol=1e-6)  # upright shapes are mirror images of themselves
    columns = np.flatnonzero(mask.any(0))
    width = 2 * radius * (0.9 if shape == "square" else 1)
    assert columns[-1] - columns[0] + 1 == pytest.approx(width, abs=2)


@pytest.mark.parametrize(("shape", "feet"), [("triangle", 1), ("star", 2)])
def test_triangle_and_star_stand_on_their_feet(shape, feet):
    mask = coverage(shape, 40.0)
    rows = np.flatnonzero(mask.any(1))
    head, ground = mask[rows[3]] > 0, mask[rows[-4]] > 0
    assert head.sum() < 10
    assert (np.diff(ground.astype(int)) == 1).sum() == feet  # runs of covered pixels: a base line, or two points


def test_draw_paints_the_named_colours_in_place():
    image = draw(Scene("navy", (Object("large", "yellow", "ring", 15, 17),)), 32)
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    assert tuple(image[0, 0]) == BACKGROUNDS["navy"] and tuple(image[17, 15]) == BACKGROUNDS["navy"]  # the hole
    for x, y in ((24, 17), (6, 17), (15, 26), (15, 8)):
        assert tuple(image[y, x]) == COLOURS["yellow"]


def test_draw_is_invariant_to_scale():
    small = draw(Scene("white", (Object("large", "red", "star", 15, 15),)), 31).astype(float)
    big = draw(Scene("white", (Object("large", "red", "star", 46, 46),)), 93).astype(float)
    assert abs(big.reshape(31, 3, 31, 3, 3).mean((1, 3)) - small).max() < 12


def test_draw_refuses_an_object_that_leaves_the_canvas():
    inside = Scene("white", (Object("small", "red", "star", 9, 22),))
    draw(inside, 32)
    for o in (replace(inside.objects[0], x=8), replace(inside.objects[0], y=23)):
        with pytest.raises(ValueError, match="leaves the canvas"):
            draw(Scene("white", (o,)), 32)


@pytest.mark.parametrize("side", [24, 32, 33, 48, 64])
@pytest.mark.parametrize("objects", [1, 2])
def test_samples_hold_together(objects, side):
    data = source(objects, side=side)
    for i in range(60):
        sample = data[i]
        scene = sample.truth
        assert sample.text == caption(scene)
        np.testing.assert_array_equal(sample.image, draw(scene, side))
        if objects == 2:
            _check_relation(scene, side)


def _check_relation(scene: Scene, side: int) -> None:
    first, second = scene.objects
    assert first.colour != second.colour
    dx, dy = second.x - first.x, second.y - first.y
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[
        scene.relation or ""
    ]
    assert along > 2 * RADII[None] * side and along >= 3 * abs(across)


def test_every_permitted_position_occurs():
    data = source()
    seen = {size: set() for size in SIZES}
    for i in range(2000):
        o = data[i].truth.objects[0]
        seen[o.size] |= {("x", o.x), ("y", o.y)}
    for size in SIZES:
        assert margin(Object(size, "red", "star"), 32) <= 12
        assert seen[size] == {
            (axis, v) for axis in "xy" for v in range(12, 20)
        }  # at most 4 pixels from the middle, 15.5


@pytest.mark.parametrize("objects", [1, 2])
def test_attributes_are_drawn_uniformly(objects):
    data = source(objects, split="validation")
    scenes = [data[i].truth for i in range(2000)]
    for values in (
        [s.background for s in scenes],
        [s.objects[-1].colour for s in scenes],
        [s.objects[0].shape for s in scenes],
    ):
        counts = Counter(values)
        expected = len(values) / len(counts)
        assert all(abs(n - expected) < 6 * math.sqrt(expected) for n in counts.values())
    assert len({s.relation for s in scenes}) == (1 if objects == 1 else 4)


@pytest.mark.parametrize("objects", [1, 2])
def test_held_out_combinations_are_never_seen_but_their_pairs_are(objects):
    held, kept = combinations(objects, True), combinations(objects, False)
    assert not set(held) & set(kept)
    whole = 8 * 6 * 6 * 2 if objects == 1 else 48 * 42 * 6 * 4
    assert len(held) + len(kept) == whole
    assert 0.12 < len(held) / whole < 0.18

    def values(scene: Scene) -> list[tuple[int, str]]:
        named = [(0, scene.background)]
        for o in scene.objects:
            named += [(len(named), o.colour), (len(named) + 1, o.shape)]
        return named

    pairs = Counter(pair for scene in kept for pair in itertools.combinations(values(scene), 2))
    possible = Counter(pair for scene in (*kept, *held) for pair in itertools.combinations(values(scene), 2))
    assert all(pairs[pair] >= 0.7 * n for pair, n in possible.items())


def test_held_out_pairs_are_held_out_in_either_order():
    pairs = {scene.objects for scene in combinations(2, True)}
    assert all(objects[::-1] in pairs for objects in pairs)


@pytest.mark.parametrize("objects", [1, 2])
def test_splits_draw_from_their_own(objects):
    for split in ("train", "validation", "held_out"):
        data = source(objects, split)
        allowed = set(combinations(objects, split == "held_out"))
        assert all(parse(data[i].text) in allowed for i in range(300))
    train, validation = (source(objects, split) for split in ("train", "validation"))
    assert (
        sum(train[i].truth == validation[i].truth for i in range(300)) <= 3
    )  # by chance alone, where the two streams differ


def test_index_decides_the_sample_and_nothing_else():
    a, b = source(), source(size=10)
    assert len({data.fingerprint for data in (a, b, source(side=48), source(2), source(split="validation"))}) == 5
    assert a.fingerprint == source().fingerprint
    assert [a[i].text for i in reversed(range(10))] == [b[i].text for i in range(10)][::-1]
    assert a[3].text == "a small purple star on a navy background"  # a change of this needs another VERSION


def test_lengths_and_bounds():
    assert source().length is None and source(size=10).length == 10
    assert source(split="validation").length == source(split="held_out", size=10).length == EPOCH
    assert source()[10**9].image.shape == (32, 32, 3)
    for data, index in ((source(), -1), (source(size=10), 10), (source(split="validation"), EPOCH)):
        with pytest.raises(IndexError):
            data[index]


@pytest.mark.parametrize("objects", [1, 2])
def test_captions_lists_what_a_split_can_draw(objects):
    data = source(objects, "held_out")
    n = len(combinations(objects, True))
    listed = data.captions(n)
    assert listed is not None and len(set(listed)) == n and listed == sorted(listed)
    assert {data[i].text for i in range(50)} <= set(listed)
    assert data.captions(n - 1) is None


def test_unfit_settings_are_named():
    with pytest.raises(DataError, match="image_channels must be 3, got 1"):
        source(image_channels=1)
    with pytest.raises(DataError, match="image_size is 23"):
        source(side=23)
    with pytest.raises(DataError, match="no split 'test'"):
        open_source(DataConfig(source="shapes", image_size=32), "test")


def test_striped_scenes_say_so_and_show_the_background_between_their_stripes():
    data = open_source(DataConfig(source="shapes-striped", image_size=32), "validation")
    samples = [data[i] for i in range(60)]
    assert {s.truth.objects[0].striped for s in samples} == {True, False}
    for sample in samples:
        (o,) = sample.truth.objects
        assert ("striped" in sample.text) == o.striped and sample.text == caption(sample.truth)
        found = parse(sample.text)
        assert (found.background, found.objects[0].striped, found.objects[0].colour) == (
            sample.truth.background,
            o.striped,
            o.colour,
        )
        same = (sample.image == BACKGROUNDS[sample.truth.background]).all(-1).all(1)  # rows of background alone
        gaps = [bool(same[o.y + d]) for d in (-4, -3, 3, 4)]  # stripes are 4 pixels high, one across the middle
        assert all(gaps) == o.striped
    assert open_source(DataConfig(source="shapes", image_size=32), "validation").fingerprint != data.fingerprint


def test_columns_say_what_captions_of_sized_scenes_do_not() -> None:
    """Radii fill their range but for the gap, half of the objects are striped, and pictures are as the columns say."""
    found = {
        split: open_source(DataConfig(source="shapes-columns", image_size=32), split) for split in ("train", "held_out")
    }
    columns = {split: [source.columns(i) for i in range(600)] for split, source in found.items()}
    radii = {split: np.array([row["radius"] for row in rows]) for split, rows in columns.items()}
    assert not ((radii["train"] > 0.29) & (radii["train"] < 0.33)).any()
    inside = ((radii["held_out"] >= 0.29) & (radii["held_out"] <= 0.33)).mean()
    assert inside == pytest.approx(0.04 / 0.18, abs=0.05)
    for split, (low, high) in (("train", (0.22, 0.4)), ("held_out", (0.22, 0.4))):
        assert low <= radii[split].min() < low + 0.005 and high - 0.005 < radii[split].max() <= high
        assert np.mean([row["striped"] for row in columns[split]]) == pytest.approx(0.5, abs=0.08)
    train, held_out = ({(row["colour"], row["shape"], row["background"]) for row in rows} for rows in columns.values())
    assert not train & held_out
    for i in range(40):
        sample, row = found["train"][i], columns["train"][i]
        article = "an" if row["colour"] == "orange" else "a"
        assert sample.text == f"{article} {row['colour']} {row['shape']} on a {row['background']} background"
        assert parse(sample.text).objects[0].shape == row["shape"] and "size" not in row
        ground, paint = (
            np.array(table[row[name]], float) for table, name in ((BACKGROUNDS, "background"), (COLOURS, "colour"))
        )
        covered = ((sample.image - ground) @ (paint - ground)).sum() / ((paint - ground) ** 2).sum()
        area = AREAS[row["shape"]] * (row["radius"] * 32) ** 2
        assert covered == pytest.approx(area, rel=0.03) if not row["striped"] else covered < 0.65 * area
