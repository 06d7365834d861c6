"""The strict judge of drawn shapes on images whose truth is known: real, degraded, and wrong in one way each.

    python benchmarks/judge.py [--objects 1 2] [--side 32 64] [--images 500]
    python benchmarks/judge.py --threshold [--autoencoder RUN ...]
    python benchmarks/judge.py --pictures FOLDER [--model RUN]

The first command prints the table of docs/results.md; the second the residuals of real drawings, degraded and (with
--autoencoder) reconstructed by a finished run; the third writes grids to look at, with the judge's verdict below each
image, of wrong pictures and (with --model) of what a finished run draws: two sets, shuffled, and each grid without
captions too, to be labelled by eye before the verdicts are seen. Seeds are fixed.
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from ldm import config as configuration
from ldm.config import AutoencoderTrainingConfig, DataConfig, SampleConfig
from ldm.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    RADII,
    SHAPES,
    SIZES,
    Object,
    Scene,
    caption,
    combinations,
    draw,
    inside,
)
from ldm.data.sources import open_source
from ldm.data.transforms import to_uint8
from ldm.evaluation.figures import plots
from ldm.evaluation.judges import strict
from ldm.evaluation.reconstructions import reconstructed
from ldm.pipeline import Pipeline
from ldm.pipeline.codec import load_codec

Outline = Callable[[np.ndarray, np.ndarray], np.ndarray]
SOURCES = {1: "shapes", 2: "shapes-two"}
SEEDS = {"calibration": 101, "test": 202}  # of the pictures that a run draws
FINE = 6  # samples per pixel along either axis


# ---------------------------------------------------------------- real drawings and what blurs them


def scenes(objects: int, side: int, n: int) -> list[Scene]:
    """The truth of real drawings, half of them held out of training."""
    data = DataConfig(source=SOURCES[objects], image_size=side)
    halves = [open_source(data, split) for split in ("validation", "held_out")]
    return [halves[i % 2][i].truth for i in range(n)]


def blurred(images: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur, σ in px."""
    return np.stack([np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma))) for image in images])


def noisy(images: np.ndarray, sigma: float) -> np.ndarray:
    """Normal noise, σ as a share of the range."""
    noise = np.random.default_rng(1).normal(0, 255 * sigma, images.shape)
    return np.rint((images + noise).clip(0, 255)).astype(np.uint8)


def contrast(images: np.ndarray, factor: float) -> np.ndarray:
    """Contrast about middle gray."""
    return np.rint((127.5 + factor * (images - 127.5)).clip(0, 255)).astype(np.uint8)


def jpeg(images: np.ndarray, quality: int) -> np.ndarray:
    """Through a JPEG file with full chroma."""
    found = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling=0)
        found.append(np.asarray(Image.open(file)))
    return np.stack(found)


DEGRADED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as drawn": lambda x: x,
    "blur 0.3 px": partial(blurred, sigma=0.3),
    "blur 0.5 px": partial(blurred, sigma=0.5),
    "blur 0.7 px": partial(blurred, sigma=0.7),
    "noise 0.05": partial(noisy, sigma=0.05),
    "contrast 0.9": partial(contrast, factor=0.9),
    "contrast 1.1": partial(contrast, factor=1.1),
    "JPEG quality 75": partial(jpeg, quality=75),
    "blur 0.7, noise 0.03, contrast 0.92, JPEG 85": lambda x: jpeg(contrast(noisy(blurred(x, 0.7), 0.03), 0.92), 85),
}


# ---------------------------------------------------------------- outlines that are wrong


def _turned(outline: Outline, degrees: float) -> Outline:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return lambda x, y: outline(c * x + s * y, c * y - s * x)


def _disc(radius: float, x0: float = 0, y0: float = 0) -> Outline:
    return lambda x, y: (x - x0) ** 2 + (y - y0) ** 2 <= radius**2


def _sector(degrees: float, width: float) -> Outline:
    """Directions within ``width`` degrees about one, clockwise from the top."""
    return lambda x, y: abs((np.degrees(np.arctan2(x, -y)) - degrees + 180) % 360 - 180) <= width / 2


def _area(shape: str) -> float:
    points = (np.arange(400) + 0.5) / 200 - 1
    return 4 * float(inside(shape, points[None], points[:, None]).mean())


def same_area_disc(shape: str, rng: np.random.Generator) -> Outline:
    """For a circle one of another size."""
    return _disc(0.62 if shape == "circle" else math.sqrt(_area(shape) / math.pi))


def blob(shape: str, rng: np.random.Generator) -> Outline:
    """A closed curve of random lobes."""
    depth, phase = rng.uniform(0.1, 0.2, 3), rng.uniform(0, 2 * math.pi, 3)

    def outline(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        angle = np.arctan2(y, x)
        swings = [depth[k] * np.cos((k + 2) * angle + phase[k]) for k in range(3)]
        return np.hypot(x, y) <= 0.8 + sum(swings)

    return outline


def half(shape: str, rng: np.random.Generator) -> Outline:
    """One side of a line through the middle."""
    angle = rng.uniform(0, 2 * math.pi)
    return lambda x, y: inside(shape, x, y) & (x * math.cos(angle) + y * math.sin(angle) >= 0)


def without_a_part(shape: str, rng: np.random.Generator) -> Outline:
    """An arm, a corner or a slice of 60° is missing."""
    direction = {"star": 72, "cross": 90, "square": 90, "triangle": 120}.get(shape, 1) * int(rng.integers(360))
    sector = _sector(direction + 45 * (shape == "square"), 60)
    start = {"star": 0.42, "cross": 0.42, "triangle": 0.3}.get(shape, 0)
    return lambda x, y: inside(shape, x, y) & ~(sector(x, y) & (np.hypot(x, y) > start))


def merged(shape: str, rng: np.random.Generator) -> Outline:
    """With another shape that overlaps it."""
    other, angle = _other(shape, rng), rng.uniform(0, 2 * math.pi)
    x0, y0 = 0.7 * math.cos(angle), 0.7 * math.sin(angle)
    return lambda x, y: inside(shape, x + x0 / 2, y + y0 / 2) | inside(other, x - x0 / 2, y - y0 / 2)


def wrong_hole(shape: str, rng: np.random.Generator) -> Outline:
    """A hole where there is none; a ring's too narrow, too wide, beside the middle, or missing."""
    if shape != "ring":
        hole = _disc(rng.uniform(0.3, 0.45))
        return lambda x, y: inside(shape, x, y) & ~hole(x, y)
    angle = rng.uniform(0, 2 * math.pi)
    hole = [_disc(0.25), _disc(0.78), _disc(0.5, 0.3 * math.cos(angle), 0.3 * math.sin(angle)), _disc(0)][
        rng.integers(4)
    ]
    return lambda x, y: _disc(1)(x, y) & ~hole(x, y)


def rounded(shape: str, rng: np.random.Generator) -> Outline:
    """All corners are rounded; circle and ring become a rounded square, without and with a hole."""

    def superellipse(x: np.ndarray, y: np.ndarray, power: float) -> np.ndarray:
        return abs(x) ** power + abs(y) ** power <= 0.93**power

    if shape == "square":
        return partial(superellipse, power=rng.uniform(2.4, 3.2))
    if shape == "circle":
        return partial(superellipse, power=rng.uniform(4, 6))
    if shape == "ring":
        return lambda x, y: superellipse(x, y, 5) & ~_disc(0.5)(x, y)
    lobes, depth = {"triangle": (3, 0.13), "star": (5, 0.25), "cross": (4, 0.3)}[shape]
    return lambda x, y: np.hypot(x, y) <= 0.75 * (1 + depth * np.cos(lobes * np.arctan2(x, -y)))


def other_shape(shape: str, rng: np.random.Generator) -> Outline:
    """One that was not asked for."""
    return partial(inside, _other(shape, rng))


def turned(shape: str, rng: np.random.Generator) -> Outline:
    """Upside down or on its tip; circle and ring are flattened."""
    if shape in ("circle", "ring"):
        flat = rng.uniform(0.55, 0.7)
        return _turned(lambda x, y: inside(shape, x, y / flat), rng.uniform(0, 180))
    return _turned(partial(inside, shape), {"square": 45, "cross": 45, "triangle": 180, "star": 36}[shape])


def _other(shape: str, rng: np.random.Generator) -> str:
    return str(rng.choice([s for s in SHAPES if s != shape]))


WRONG_OUTLINES: dict[str, Callable[[str, np.random.Generator], Outline]] = {
    "disc": same_area_disc,
    "blob": blob,
    "half a shape": half,
    "a part missing": without_a_part,
    "two shapes merged": merged,
    "wrong hole": wrong_hole,
    "rounded": rounded,
    "other shape": other_shape,
    "turned or flattened": turned,
}


# ---------------------------------------------------------------- pictures that are wrong


def cover(outline: Outline, side: int, x: float, y: float, radius: float) -> np.ndarray:
    """Share of each pixel [side, side, 1] that an outline covers."""
    points = (np.arange(side * FINE) + 0.5) / FINE - 0.5
    mask = outline((points[None] - x) / radius, (points[:, None] - y) / radius)
    return mask.reshape(side, FINE, side, FINE).mean((1, 3))[..., None]


def painted(side: int, ground: np.ndarray, layers: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Masks in their colours, one over the other, uint8 [side, side, 3]."""
    image = np.broadcast_to(ground, (side, side, 3)).astype(float)
    for mask, colour in layers:
        image = image + mask * (colour - image)
    return np.rint(image.clip(0, 255)).astype(np.uint8)


def layer(o: Object, side: int, outline: Outline | None = None, radius: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """An object's mask and colour; ``outline`` instead of its own, ``radius`` times as large."""
    shown = outline or partial(inside, o.shape)
    return cover(shown, side, o.x, o.y, radius * RADII[o.size] * side), np.array(COLOURS[o.colour], float)


def redrawn(scene: Scene, side: int, which: int, **changes: object) -> np.ndarray:
    """The scene with one object's layer changed."""
    layers = [layer(o, side, **(changes if i == which else {})) for i, o in enumerate(scene.objects)]  # type: ignore[arg-type]
    return painted(side, np.array(BACKGROUNDS[scene.background], float), layers)


def wrong_colour(scene: Scene, side: int, which: int, rng: np.random.Generator) -> np.ndarray:
    """Another colour of the palette."""
    used = {o.colour for o in scene.objects}
    o = replace(scene.objects[which], colour=str(rng.choice([c for c in COLOURS if c not in used])))
    return draw(_with(scene, which, o), side)


def faint(scene: Scene, side: int, which: int, rng: np.random.Generator) -> np.ndarray:
    """Between 25 and 55 % of its contrast."""
    o, ground = scene.objects[which], np.array(BACKGROUNDS[scene.background], float)
    layers = [layer(each, side) for each in scene.objects]
    layers[which] = (layers[which][0] * rng.uniform(0.25, 0.55), np.array(COLOURS[o.colour], float))
    return painted(side, ground, layers)


def two_colours(scene: Scene, side: int, which: int, rng: np.random.Generator) -> np.ndarray:
    """One half is of another colour."""
    o, angle = scene.objects[which], rng.uniform(0, 2 * math.pi)
    shown = draw(scene, side).astype(float)
    mask = cover(
        lambda x, y: inside(o.shape, x, y) & (x * math.cos(angle) + y * math.sin(angle) > 0),
        side,
        o.x,
        o.y,
        RADII[o.size] * side,
    )
    other = np.array(COLOURS[str(rng.choice([c for c in COLOURS if c != o.colour]))], float)
    return np.rint(shown + mask * (other - shown)).astype(np.uint8)


def wrong_background(scene: Scene, side: int, which: int, rng: np.random.Generator) -> np.ndarray:
    """Another background of the palette."""
    return draw(replace(scene, background=_other_ground(scene, rng)), side)


def two_backgrounds(scene: Scene, side: int, which: int, rng: np.random.Generator) -> np.ndarray:
    """A third to a half of the canvas has another."""
    ground = np.broadcast_to(np.array(BACKGROUNDS[scene.background], float), (side, side, 3)).copy()
    ground[: int(side * rng.uniform(0.33, 0.5))] = BACKGROUNDS[_other_ground(scene, rng)]
    return painted(side, ground, [layer(o, side) for o in scene.objects])


def wrong_size(scene: Scene, side: int, which: int, rng: np.random.Generator) -> np.ndarray:
    """Small for large and the other way round; two objects have no sizes: half or less, or 1.4 times as large."""
    o = scene.objects[which]
    if o.size is None:
        return redrawn(scene, side, which, radius=float(rng.choice([0.5, 0.65, 1.4])))
    other = RADII[SIZES[1 - SIZES.index(o.size)]] / RADII[o.size]
    between = math.sqrt(other)
    return redrawn(scene, side, which, radius=[other, between, 0.5 if o.size == "small" else 0.6][rng.integers(3)])


def one_more(scene: Scene, side: int, which: int, rng: np.random.Generator) -> np.ndarray:
    """Another object, of a third to a half of the size, where there is room."""
    ground, radius = np.array(BACKGROUNDS[scene.background], float), RADII[scene.objects[0].size] * side
    small = radius * rng.uniform(0.33, 0.5)
    places = rng.uniform(small, side - 1 - small, (400, 2))
    clear = [min(math.hypot(x - o.x, y - o.y) for o in scene.objects) for x, y in places]
    x, y = places[int(np.argmax(clear))]
    colour = np.array(COLOURS[str(rng.choice(list(COLOURS)))], float)
    extra = (cover(partial(inside, str(rng.choice(SHAPES))), side, x, y, small), colour)
    return painted(side, ground, [extra, *(layer(o, side) for o in scene.objects)])


def one_less(scene: Scene, side: int, which: int, rng: np.random.Generator) -> np.ndarray:
    """An object is missing."""
    return draw(replace(scene, objects=tuple(o for i, o in enumerate(scene.objects) if i != which)), side)


def twice(scene: Scene, side: int, which: int, rng: np.random.Generator) -> np.ndarray:
    """Both objects have the shape of one."""
    first, second = scene.objects
    other = first.shape if first.shape != second.shape else _other(first.shape, rng)
    return draw(_with(scene, 1, replace(second, shape=other)), side)


def exchanged(scene: Scene, side: int, which: int, rng: np.random.Generator) -> np.ndarray:
    """The objects stand in each other's place."""
    a, b = scene.objects
    return draw(replace(scene, objects=(replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y))), side)


def colours_exchanged(scene: Scene, side: int, which: int, rng: np.random.Generator) -> np.ndarray:
    """Each object has the other's colour."""
    a, b = scene.objects
    if a.shape == b.shape:
        return exchanged(scene, side, which, rng)
    return draw(replace(scene, objects=(replace(a, colour=b.colour), replace(b, colour=a.colour))), side)


def _with(scene: Scene, which: int, o: Object) -> Scene:
    return replace(scene, objects=tuple(o if i == which else each for i, each in enumerate(scene.objects)))


def _other_ground(scene: Scene, rng: np.random.Generator) -> str:
    return str(rng.choice([b for b in BACKGROUNDS if b != scene.background]))


Wrong = Callable[[Scene, int, int, np.random.Generator], np.ndarray]
WRONG: dict[str, Wrong] = {
    "wrong size": wrong_size,
    "wrong colour": wrong_colour,
    "faint": faint,
    "two colours": two_colours,
    "wrong background": wrong_background,
    "two backgrounds": two_backgrounds,
    "one object more": one_more,
    "one object less": one_less,
}
WRONG_PAIRS: dict[str, Wrong] = {
    "one shape twice": twice,
    "places exchanged": exchanged,
    "colours exchanged": colours_exchanged,
}


def decoys(objects: int, side: int, asked: list[Scene]) -> Iterator[tuple[str, np.ndarray]]:
    """Of each kind one wrong picture of every scene."""
    for name, outline in WRONG_OUTLINES.items():
        rng = np.random.default_rng(2)
        yield name, np.stack([
            redrawn(scene, side, i % objects, outline=outline(scene.objects[i % objects].shape, rng))
            for i, scene in enumerate(asked)
        ])  # fmt: skip
    for name, wrong in (WRONG | (WRONG_PAIRS if objects == 2 else {})).items():
        rng = np.random.default_rng(2)
        yield name, np.stack([wrong(scene, side, i % objects, rng) for i, scene in enumerate(asked)])


# ---------------------------------------------------------------- what a model draws


def samples(run: Path, seed: int, n: int = 64) -> tuple[np.ndarray, list[Scene]]:
    """Images of a finished run and what was asked for: ``n`` of each shape, half of them held out, shuffled."""
    rng = np.random.default_rng(seed)
    asked: list[Scene] = []
    for shape, held_out in itertools.product(SHAPES, (False, True)):
        pool = [scene for scene in combinations(1, held_out) if scene.objects[0].shape == shape]
        asked += [pool[i] for i in rng.choice(len(pool), n // 2, replace=len(pool) < n // 2)]
    asked = [asked[i] for i in rng.permutation(len(asked))]
    settings = SampleConfig(sampler="dpmpp_2m", steps=10, guidance_scale=2.0, seed=seed)
    batches = Pipeline.from_pretrained(run).sample([caption(scene) for scene in asked], settings, batch_size=64)
    return np.concatenate([to_uint8(images) for images in batches]), asked


# ---------------------------------------------------------------- tables and pictures


@dataclass(frozen=True)
class Row:
    """Pictures of one kind."""

    right: float  # share that shows all that was asked for
    refused: float  # share that is refused; a wrong scene that is drawn well is read as what it is
    seconds: float
    reasons: dict[str, int]
    seen: list[strict.Seen]


def judged(judge: strict.StrictJudge, images: np.ndarray, asked: list[Scene]) -> Row:
    """The judge's answers to pictures of one kind."""
    started = time.process_time()
    verdicts = judge.read(images)
    seconds = time.process_time() - started
    found = [strict.examined(verdict, scene) for verdict, scene in zip(verdicts, asked, strict=True)]
    return Row(
        float(np.mean([row["all"] for row, _ in found])),
        float(np.mean([bool(v.refused) for v in verdicts])),
        seconds,
        strict.reasons([v.refused for v in verdicts]),
        [pair for _, seen in found for pair in seen],
    )


def table(objects: list[int], sides: list[int], n: int) -> None:
    """Share accepted and right of every kind of picture, one column for each number of objects and side."""
    columns: dict[tuple[int, int], dict[str, Row]] = {}
    for many in objects:
        for side in sides:
            asked, judge = scenes(many, side, n), strict.StrictJudge(side, many)
            real = np.stack([draw(scene, side) for scene in asked])
            rows = {name: judged(judge, change(real), asked) for name, change in DEGRADED.items()}
            rows |= {f"decoy: {name}": judged(judge, images, asked) for name, images in decoys(many, side, asked)}
            columns[many, side] = rows
    print(f"{n} images of each kind: share accepted as what was asked for (share refused)\n")
    print("| pictures |" + "".join(f" {'one object' if m == 1 else 'two objects'}, {side} px |" for m, side in columns))
    print("| --- |" + " --- |" * len(columns))
    for name in dict.fromkeys(name for rows in columns.values() for name in rows):
        cells = [
            f"{rows[name].right:.3f} ({rows[name].refused:.3f})" if name in rows else "" for rows in columns.values()
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")
    wrong = [
        np.mean([1 - row.right for name, row in rows.items() if name.startswith("decoy")]) for rows in columns.values()
    ]
    print("| all decoys, share not accepted | " + " | ".join(f"{share:.4f}" for share in wrong) + " |")
    seconds = [sum(row.seconds for row in rows.values()) / len(rows) / n * 1000 for rows in columns.values()]
    print("| seconds of one core for 1,000 pictures | " + " | ".join(f"{s:.1f}" for s in seconds) + " |")
    for (many, side), rows in columns.items():
        print(f"\nasked for and read as, the decoy 'other shape', {many} object(s), {side} px")
        for asked_for, counts in strict.confusion(rows["decoy: other shape"].seen).items():
            print(f"  {asked_for:9}", *(f"{read} {count:<4}" for read, count in counts.items()))


def threshold(objects: list[int], sides: list[int], n: int, runs: list[Path]) -> None:
    """Quantiles of the residual of real drawings, degraded and reconstructed."""
    print(f"residuals; RESIDUAL is {strict.RESIDUAL:g}")
    for many in objects:
        for side in sides:
            asked, judge = scenes(many, side, n), strict.StrictJudge(side, many)
            real = np.stack([draw(scene, side) for scene in asked])
            for name, change in DEGRADED.items():
                _quantiles(f"{many} object(s), {side} px, {name}", judge.read(change(real)))
    for run in runs:
        data = configuration.load(AutoencoderTrainingConfig, run / "config.yaml").data
        many = {source: number for number, source in SOURCES.items()}[data.source]
        judge, autoencoder = strict.StrictJudge(data.image_size, many), load_codec(run).autoencoder
        source = open_source(data, "validation")
        verdicts = []
        for part in reconstructed(autoencoder, source, data.image_size, range(n), 50):
            verdicts += judge.read(to_uint8(part.decoded))
        _quantiles(f"{run}: reconstructions", verdicts)


def _quantiles(name: str, verdicts: list[strict.Verdict]) -> None:
    residuals = [v.residual for v in verdicts]
    cells = [f"{q:g}: {np.quantile(residuals, q):.4f}" for q in (0.5, 0.9, 0.99, 0.999, 1)]
    refused = np.mean([bool(v.refused) for v in verdicts])
    print(f"{name:75}", *cells, f"refused {refused:.3f}", sep="   ")


def pictures(folder: Path, side: int, run: Path | None) -> None:
    """Grids of wrong pictures of each shape, and of what a run draws, the same without captions beside them.

    Framed in red: refused or not as asked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    judge = strict.StrictJudge(side, 1)
    every = scenes(1, side, 400)
    for shape in SHAPES:
        asked = [scene for scene in every if scene.objects[0].shape == shape][:4]
        kinds = list(decoys(1, side, asked))
        _grid(
            folder / f"decoys-{shape}.png", judge, np.concatenate([images for _, images in kinds]), asked * len(kinds)
        )
    if run is None:
        return
    for name, seed in SEEDS.items():
        images, asked = samples(run, seed)
        for i in range(0, len(images), 64):
            some = slice(i, i + 64)
            plots.captioned(images[some], [str(k) for k in range(64)], folder / f"{name}-{i // 64}-blind.png")
            _grid(folder / f"{name}-{i // 64}.png", judge, images[some], asked[some])


def _grid(file: Path, judge: strict.StrictJudge, images: np.ndarray, asked: list[Scene]) -> None:
    verdicts = judge.read(images)
    texts = []
    for i, (v, scene) in enumerate(zip(verdicts, asked, strict=True)):
        o, a = v.scene.objects[0], scene.objects[0]
        told = "; ".join(v.refused.values()) or f"{o.size} {o.colour} {o.shape} on {v.scene.background}"
        texts.append(f"{i}: {a.size} {a.colour} {a.shape} – {told} ({v.residual:.3f})")
    wrong = [not strict.examined(v, scene)[0]["all"] for v, scene in zip(verdicts, asked, strict=True)]
    plots.captioned(images, texts, file, wrong=wrong)
    print(file, Counter(wrong))


def main() -> None:
    """The table, the residuals or the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, nargs="+", choices=tuple(SOURCES), default=list(SOURCES))
    parser.add_argument("--side", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--images", type=int, default=500, help="pictures of each kind")
    parser.add_argument("--threshold", action="store_true", help="residuals of real drawings")
    parser.add_argument(
        "--autoencoder", type=Path, nargs="+", default=[], help="finished runs whose reconstructions are read"
    )
    parser.add_argument("--pictures", type=Path, help="folder for grids")
    parser.add_argument("--model", type=Path, help="finished run of one object whose pictures are read")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.threshold:
        threshold(arguments.objects, arguments.side, arguments.images, arguments.autoencoder)
    elif arguments.pictures:
        pictures(arguments.pictures, arguments.side[0], arguments.model)
    else:
        table(arguments.objects, arguments.side, arguments.images)


if __name__ == "__main__":
    main()
