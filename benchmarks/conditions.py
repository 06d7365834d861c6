"""How a model follows a caption, a number and a class, together and guided alone: configs/shapes-columns.

    make conditions
    python benchmarks/conditions.py runs/shapes-columns [--images 500]

Scenes of combinations and radii that training never shows are asked for. Colour, shape, background and stripes are
read by the strict judge, whose words on sizes are left out; the drawn radius is that of the same shape which covers as
much of the picture. Rows: everything given; each condition left out; each guided alone. Prints a table in markdown.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm import config as configuration
from ldm.config import DiffusionTrainingConfig
from ldm.config.values import changed
from ldm.data.sample import Source
from ldm.data.shapes import BACKGROUNDS, COLOURS, RADIUS_GAP, STRIPE, Scene, coverage
from ldm.data.sources import open_source
from ldm.data.transforms import prepare, to_uint8
from ldm.evaluation.judges.strict import StrictJudge
from ldm.pipeline import Pipeline

READ = ("colour", "shape", "background", "striped")
TRIED = np.arange(0.1, 0.5, 0.0025)  # radii that a covered area is compared with, as shares of the side
ALONE = 3.0  # scale of a condition that is guided alone
PLAIN: dict[str, Any] = {"guidance_scale": 1.0}
CONDITIONS = ("caption", "radius", "striped")
ROWS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {  # settings, and what is left out
    "all three, guidance 2": ({"guidance_scale": 2.0}, ()),
    "all three": (PLAIN, ()),
    **{f"without {name}": (PLAIN, (name,)) for name in CONDITIONS},
    **{f"{name} guided alone": ({**PLAIN, "guidance_alone": (f"{name}:{ALONE:g}",)}, ()) for name in CONDITIONS},
}


def radius(image: np.ndarray, scene: Scene) -> float:
    """The radius of the scene's object, as a share of the side, whose area is the one covered in the picture."""
    thing, side = scene.objects[0], image.shape[0]
    ground, paint = np.array(BACKGROUNDS[scene.background], float), np.array(COLOURS[thing.colour], float)
    covered = ((image - ground) @ (paint - ground)).sum() / ((paint - ground) ** 2).sum()
    stripe = STRIPE * side if thing.striped else None
    areas = np.array([coverage(thing.shape, float(r) * side, stripe).sum() for r in TRIED])
    return float(TRIED[np.abs(areas - covered).argmin()])


def drawn(pipe: Pipeline, source: Source, count: int, settings: dict[str, Any], without: Sequence[str]) -> np.ndarray:
    """A picture of each of the first scenes, uint8 [n, h, w, c], given all conditions but some."""
    names = [name for name in ("radius", "striped") if name not in without]
    values = [{name: source.columns(i)[name] for name in names} for i in range(count)]
    captions = ["" if "caption" in without else source.text(i) for i in range(count)]
    batches = pipe.sample(captions, changed(pipe.defaults, settings), values=values, batch_size=100)
    return np.concatenate([to_uint8(images) for images in batches])


def reconstructed(pipe: Pipeline, images: np.ndarray) -> np.ndarray:
    """The images encoded and decoded."""
    prepared = torch.stack([prepare(image, images.shape[1]) for image in images])
    with torch.no_grad():
        return to_uint8(prepared if pipe.codec is None else pipe.codec.decode(pipe.codec.encode(prepared)))


def measured(images: np.ndarray, scenes: Sequence[Scene]) -> dict[str, float]:
    """Shares of attributes as asked; of pictures of the shape asked for, correlation and error of the radius."""
    verdicts = StrictJudge(images.shape[1], 1, striped=True).read(images)
    right: dict[str, list[bool]] = {name: [] for name in READ}
    asked, found = [], []
    for image, scene, verdict in zip(images, scenes, verdicts, strict=True):
        thing, seen = scene.objects[0], verdict.scene.objects[0]
        for name in ("colour", "shape", "striped"):
            same = getattr(seen, name) == getattr(thing, name)
            right[name].append(same and name not in verdict.refused)
        right["background"].append(verdict.scene.background == scene.background)
        if right["shape"][-1] and right["colour"][-1]:
            asked.append(thing.radius)
            found.append(radius(image, replace(scene, objects=(replace(thing, striped=seen.striped),))))
    figures = {name: float(np.mean(row)) for name, row in right.items()}
    errors = [abs(a - b) for a, b in zip(asked, found, strict=True)]
    in_gap = [error for a, error in zip(asked, errors, strict=True) if RADIUS_GAP[0] <= a <= RADIUS_GAP[1]]
    figures["correlation"] = float(np.corrcoef(asked, found)[0, 1]) if len(asked) > 1 else float("nan")
    figures["error"], figures["error in the gap"] = (
        float(np.mean(each)) if each else float("nan") for each in (errors, in_gap)
    )
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=500)
    options = parser.parse_args(arguments)
    data = configuration.load(DiffusionTrainingConfig, configuration.model_config_file(options.run)).data
    pipe, source = Pipeline.from_pretrained(options.run), open_source(data, "held_out")
    scenes = [source[i].truth for i in range(options.images)]
    images = np.stack([source[i].image for i in range(options.images)])
    real, decoded = measured(images, scenes), measured(reconstructed(pipe, images), scenes)
    titles = ("given", *real)
    print(f"| {' | '.join(titles)} |\n| {' | '.join('---' for _ in titles)} |")
    drawings = ((name, drawn(pipe, source, len(scenes), *row)) for name, row in ROWS.items())
    rows = ((name, measured(images, scenes)) for name, images in drawings)
    known = [("(the scenes themselves)", real), ("(the same through the autoencoder)", decoded)]
    for name, row in itertools.chain(known, rows):
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in row.values())} |", flush=True)


if __name__ == "__main__":
    main()
