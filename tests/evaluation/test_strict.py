"""The strict judge, against drawings whose truth is known and pictures that are wrong in one way each."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from support.drawings import drawings, spoil

from ldm.data.shapes import BACKGROUNDS, COLOURS, RADII, SHAPES, Object, Scene, caption, draw, inside
from ldm.evaluation.evaluate import JUDGES
from ldm.evaluation.judges import strict
from ldm.evaluation.judges.strict import REFUSED, StrictJudge, confusion, examined, reasons

N = 60
SCENES = {shape: Scene("white", (Object("small", "red", shape, 15, 16),)) for shape in SHAPES}


def mask(outline, x: float, y: float, radius: float, side: int = 32, fine: int = 8) -> np.ndarray:
    """Share of each pixel that lies inside, by counting points."""
    points = (np.arange(side * fine) + 0.5) / fine - 0.5
    found = outline((points[None] - x) / radius, (points[:, None] - y) / radius)
    return found.reshape(side, fine, side, fine).mean((1, 3))[..., None]


def painted(*layers: tuple[np.ndarray, str], ground: str = "white") -> np.ndarray:
    image = np.array(BACKGROUNDS[ground], float)
    for shown, colour in layers:
        image = image + shown * (np.array(COLOURS[colour], float) - image)
    return np.rint(image).astype(np.uint8)


@pytest.fixture(scope="module")
def judge() -> StrictJudge:
    return StrictJudge(32, 1)


@pytest.mark.parametrize(("source", "side"), [("shapes", 32), ("shapes", 64), ("shapes-two", 32), ("shapes-two", 48)])
@pytest.mark.parametrize(("blur", "noise"), [(0, 0), (0.7, 0.03)])
def test_real_drawings_are_accepted_and_right(source, side, blur, noise):
    images, scenes, texts = drawings(source, side, N)
    verdicts = StrictJudge(side, len(scenes[0].objects)).read(spoil(images, blur, noise) if blur else images)
    for verdict, scene, text in zip(verdicts, scenes, texts, strict=True):
        row, seen = examined(verdict, scene)
        assert row["all"] and not row[REFUSED], (text, verdict)
        assert seen == [(o.shape, o.shape) for o in scene.objects]
        places = {(o.colour, o.x, o.y) for o in verdict.scene.objects}
        assert all(
            any(c == o.colour and max(abs(x - o.x), abs(y - o.y)) <= 1 for c, x, y in places) for o in scene.objects
        )


def disc(radius: float, x0: float = 0, y0: float = 0):
    return lambda x, y: (x - x0) ** 2 + (y - y0) ** 2 <= radius**2


def with_another(shape: str):
    other = "ring" if shape != "ring" else "square"
    return lambda x, y: inside(shape, x, y) | inside(other, x - 0.7, y)


def with_wrong_hole(shape: str):
    if shape in ("circle", "ring"):  # between the two
        return lambda x, y: disc(1)(x, y) & ~disc(0.2)(x, y)
    return lambda x, y: inside(shape, x, y) & ~disc(0.35)(x, y)


WRONG = {  # outlines drawn in place of a shape
    "half": lambda shape: lambda x, y: inside(shape, x, y) & (x + y > 0),
    "merged": with_another,
    "hole": with_wrong_hole,
    "cut": lambda shape: lambda x, y: inside(shape, x, y) & ~((y > 0.35) & (x > 0.1)),
    "pentagram": lambda shape: lambda x, y: np.hypot(x, y) <= 0.75 * (1 + 0.22 * np.cos(5 * np.arctan2(x, -y))),
    "egg": lambda shape: lambda x, y: np.hypot(x, y / 0.65) <= 1,
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_outlines_are_refused(judge, kind):
    images = np.stack([painted((mask(WRONG[kind](shape), 15, 16, 9.5), "red")) for shape in SHAPES])
    for shape, verdict in zip(SHAPES, judge.read(images), strict=True):
        assert {"shape", "size"} & verdict.refused.keys(), (shape, verdict)
        row = examined(verdict, SCENES[shape])[0]
        assert row[REFUSED] and not row["all"] and row["background"]


def softened(shape: str, sigma: float, warp: float) -> np.ndarray:
    """The mask of a bent shape, its corners rounded: blurred by a share of the radius and cut at one half."""
    bent = mask(lambda x, y: inside(shape, x + warp * np.sin(3 * y), y + warp * np.sin(3 * x)), 64, 64, 38, 128, 1)
    soft = gaussian_filter(bent[..., 0], 38 * sigma) > 0.5
    return np.roll(soft, (-2, -2), (0, 1)).reshape(32, 4, 32, 4).mean((1, 3))[..., None]


def test_a_softly_rounded_bent_shape_is_accepted(judge):
    images = np.stack([painted((softened(shape, 0.18, 0.04), "red")) for shape in SHAPES])
    for shape, verdict in zip(SHAPES, judge.read(images), strict=True):
        assert verdict.scene.objects[0].shape == shape and not verdict.refused, (shape, verdict)


@pytest.mark.parametrize("shape", ["square", "triangle", "star", "cross"])
def test_what_rounding_makes_a_blob_is_refused(judge, shape):
    (verdict,) = judge.read(painted((softened(shape, 0.3, 0), "red"))[None])
    assert verdict.refused or verdict.scene.objects[0].shape != shape, verdict


def test_a_disc_of_the_area_of_a_star_is_not_a_star(judge):
    """The old judge took discs of radius 5 for small stars."""
    for radius in (4, 5, 6, 6.5):
        (verdict,) = judge.read(painted((mask(disc(1), 15, 16, radius), "red"))[None])
        assert verdict.scene.objects[0].shape == "circle" and verdict.refused == {"size": "size"}


@pytest.mark.parametrize(("shape", "radius"), [("square", 0.65), ("star", 1.16), ("cross", 0.8)])
def test_a_shape_between_or_beside_the_sizes_is_refused(judge, shape, radius):
    (verdict,) = judge.read(painted((mask(partial(inside, shape), 15, 16, 9.5 * radius), "red"))[None])
    assert "size" in verdict.refused and verdict.scene.objects[0].shape == shape


def test_what_else_is_wrong_is_refused_for_its_reason(judge):
    star = mask(partial(inside, "star"), 13, 14, 9.5)
    cases = {
        "empty": (painted((star * 0, "red")), {"colour": "nothing is drawn", "shape": "nothing is drawn"}),
        "faint": (painted((star * 0.4, "red")), {"colour"}),
        "two": (painted((star, "red"), (mask(partial(inside, "cross"), 27, 27, 4), "green")), {"shape"}),
        "two colours": (painted((star, "red"), (star * (np.arange(32) > 14)[:, None, None], "blue")), {"shape"}),
        "faint in the palette": (painted((star * 0.66, "purple"), ground="navy"), {"colour"}),
        "grain": (spoil(painted((star, "red"))[None], 0.3, 0.18)[0], {"shape"}),
        "no palette": (np.where(star > 0.5, np.uint8(90), np.uint8(255)).repeat(3, 2), {"colour"}),
    }
    for name, (image, expected) in cases.items():
        (verdict,) = judge.read(image[None])
        assert verdict.refused.keys() >= set(expected), (name, verdict)
        assert not isinstance(expected, dict) or verdict.refused == expected
    noise = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    assert all("background" in v.refused for v in judge.read(noise))
    half = painted((star, "red"))
    half[:12] = np.where((half[:12] == 255).all(-1, keepdims=True), np.array(BACKGROUNDS["gray"], np.uint8), half[:12])
    assert judge.read(half[None])[0].refused


def test_other_scenes_are_read_as_what_they_are(judge):
    """A good drawing of another scene is not refused, and wrong in what differs alone."""
    asked = SCENES["star"]
    for scene, wrong in (
        (Scene("white", (Object("large", "red", "star", 15, 16),)), "size"),
        (Scene("white", (Object("small", "blue", "star", 15, 16),)), "colour"),
        (Scene("white", (Object("small", "red", "cross", 15, 16),)), "shape"),
        (Scene("black", (Object("small", "red", "star", 15, 16),)), "background"),
    ):
        row, seen = examined(judge.read(draw(scene, 32)[None])[0], asked)
        assert {name for name, right in row.items() if not right} == {wrong, "all", REFUSED}
        assert seen == [("star", scene.objects[0].shape)]


def test_each_of_two_objects_is_read_strictly():
    first, second = Object(None, "red", "star", 12, 14), Object(None, "green", "square", 35, 30)
    scene = Scene("navy", (first, second), "left of")
    judge = StrictJudge(48, 2)
    radius, square = RADII[None] * 48, mask(partial(inside, "square"), 35, 30, RADII[None] * 48, 48)
    blob = mask(WRONG["pentagram"]("star"), 12, 14, radius, 48)
    third = mask(partial(inside, "ring"), 12, 38, 4, 48)
    star = mask(partial(inside, "star"), 12, 14, radius, 48)
    pictures = {
        "as asked": painted((star, "red"), (square, "green"), ground="navy"),
        "blob for star": painted((blob, "red"), (square, "green"), ground="navy"),
        "three": painted((star, "red"), (square, "green"), (third, "pink"), ground="navy"),
        "one": painted((star, "red"), ground="navy"),
        "exchanged": draw(Scene("navy", (replace(second, x=12, y=14), replace(first, x=35, y=30))), 48),
    }  # fmt: skip
    rows = dict(zip(pictures, judge.read(np.stack(list(pictures.values()))), strict=True))
    found = {name: examined(verdict, scene)[0] for name, verdict in rows.items()}
    assert found["as asked"] | {REFUSED: True} == dict.fromkeys(found["as asked"], True)
    for name in ("blob for star", "three", "one"):
        assert found[name][REFUSED] and not found[name]["all"], name
    wrong = {name for name, right in found["exchanged"].items() if not right}
    assert wrong == {"relation", "all", REFUSED}


def test_stripes_are_read_strictly():
    images, scenes, _ = drawings("shapes-striped", 32, N)
    rows = [examined(v, s, striped=True)[0] for v, s in zip(StrictJudge(32, 1, True).read(images), scenes, strict=True)]
    assert all(row["all"] and not row[REFUSED] for row in rows)
    striped = [s.objects[0].striped for s in scenes]
    refused = [bool(v.refused) for v in StrictJudge(32, 1).read(images)]
    assert refused == striped  # to a judge of plain shapes stripes are wrong


def test_the_fit_is_that_of_least_squares(judge):
    """Residual, colour and place of the best template against a fit of the same picture by scipy's curve."""
    scene = Scene("beige", (Object("large", "purple", "triangle", 17, 14),))
    image = spoil(draw(scene, 32)[None], 0.5, 0.02)
    (verdict,) = judge.read(image)
    assert verdict.scene == scene and not verdict.refused and verdict.residual < 0.01
    dented = image.copy()
    dented[0, 17:20, 14:20] = BACKGROUNDS["beige"]
    clean, hole = judge.read(np.concatenate([image, dented]))
    area = mask(partial(inside, "triangle"), 17, 14, 12.5).sum()
    assert hole.residual - clean.residual == pytest.approx(18 / area, rel=0.45)  # in units of the shape's own energy
    assert "shape" in hole.refused


def test_blur_is_gaussian():
    image = torch.rand(2, 40, 40)
    expected = gaussian_filter(image.numpy(), (0, 1.3, 1.3), mode="nearest", truncate=3)
    assert np.allclose(strict.blur(image, 1.3), expected, atol=2e-3)


def test_the_confusion_counts_every_object_once():
    seen = [("star", "star"), ("star", REFUSED), ("ring", "circle"), ("star", "star")]
    assert confusion(seen) == {
        "ring": {"circle": 1, "star": 0, REFUSED: 0},
        "star": {"circle": 0, "star": 2, REFUSED: 1},
    }
    refused = [{"shape": "ellipse"}, {}, {"shape": "ellipse", "size": "size"}]
    assert reasons(refused) == {"shape: ellipse": 2, "size: size": 1}


def test_what_evaluation_uses_is_strict():
    images = np.stack([draw(SCENES["star"], 32), painted((mask(disc(1), 15, 16, 5), "red"))])
    judge = JUDGES["shapes"](32)
    good, bad = judge.examine(images, [caption(SCENES["star"])] * 2)
    assert good.row["all"] and not good.row[REFUSED] and good.seen == [("star", "star")]
    assert not bad.row["all"] and bad.row[REFUSED] and bad.seen == [("star", REFUSED)] and bad.refused
    assert judge.right(images, [caption(SCENES["star"])] * 2) == [good.row, bad.row]


def test_batches_do_not_matter(judge, monkeypatch):
    images, _, _ = drawings("shapes", 32, N)
    whole = judge.read(images[:12])
    monkeypatch.setattr(strict, "_CHUNK", 5)
    assert [v.scene for v in judge.read(images[:12])] == [v.scene for v in whole]
    assert judge.read(images[:0]) == [] and not torch.is_inference_mode_enabled()
    with pytest.raises(ValueError, match=r"uint8 \[n, 32, 32, 3\], got float64"):
        judge.read(np.zeros((1, 32, 32, 3)))
    assert math.isfinite(judge.read(np.zeros((1, 32, 32, 3), np.uint8))[0].residual)
