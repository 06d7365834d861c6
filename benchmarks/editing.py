"""What a model makes of a given image: image-to-image by strength, and completion of a hole, judged strictly.

    make demo
    python benchmarks/editing.py runs/demo [--images 500]

Each held-out caption of a small object is drawn starting from a scene of the same background with another small object.
Image-to-image: the share that shows the caption, the share that still shows the scene, and the distance to it.
Completion: the hole is a square over the scene's object; the share that shows the caption, and the mean step between
neighbouring pixels across the hole's edge, beside that of the scenes themselves. Prints tables in markdown; network
calls count both halves of guidance once.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm import config as configuration
from ldm.config import DiffusionTrainingConfig
from ldm.config.values import changed
from ldm.data.sample import Source
from ldm.data.shapes import RADII, parse
from ldm.data.sources import open_source
from ldm.data.transforms import to_uint8
from ldm.diffusion.completion import repaint_path
from ldm.evaluation.evaluate import JUDGES, Judge
from ldm.pipeline import Pipeline

STRENGTHS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
MARGIN = 2  # pixels of a hole beyond a small object
FILLED: dict[str, dict[str, Any]] = {  # by a model that was trained to fill masks
    "as trained": {},
    "as trained, with blend": {"completion": "blend"},
    "as trained, 50 steps": {"steps": 50},
}
COMPLETIONS: dict[str, dict[str, Any]] = {
    "blend": {"completion": "blend"},
    "blend, 50 steps": {"completion": "blend", "steps": 50},
    "blend, ddpm, 50 steps": {"completion": "blend", "steps": 50, "sampler": "ddpm"},
    "repaint, ddim, 10 steps": {"completion": "repaint", "sampler": "ddim", "steps": 10, "repaint_jump": 3},
    "repaint, ddim": {"completion": "repaint", "sampler": "ddim", "steps": 25},
    "repaint, ddpm": {"completion": "repaint", "sampler": "ddpm", "steps": 25},
}


class Task(NamedTuple):
    """Captions to draw, the scenes to start from with their captions, and a hole over the object of each."""

    captions: list[str]
    images: list[np.ndarray]
    scenes: list[str]
    holes: list[np.ndarray]


def tasks(wanted: Source, scenes: Source, count: int) -> Task:
    """Captions of small objects in ``wanted``, each with the next scene of the same background and another one."""
    task, at = Task([], [], [], []), 0
    small = (text for i in itertools.count() if parse(text := wanted.text(i)).objects[0].size == "small")
    for caption in itertools.islice(small, count):
        while not fits(scenes.text(at), caption):
            at += 1
        sample = scenes[at]
        task.captions.append(caption)
        task.images.append(sample.image)
        task.scenes.append(sample.text)
        task.holes.append(hole(sample.truth.objects[0], sample.image.shape[0]))
        at += 1
    return task


def fits(scene: str, caption: str) -> bool:
    """True if both have one background and different objects, both small."""
    a, b = parse(scene), parse(caption)
    small = a.objects[0].size == b.objects[0].size == "small"
    return small and a.background == b.background and a.objects != b.objects


def hole(thing: Any, side: int) -> np.ndarray:
    """A mask, white over a square around a small object."""
    mask, half = np.zeros((side, side), np.uint8), int(np.ceil(RADII["small"] * side)) + MARGIN
    mask[max(0, thing.y - half) : thing.y + half + 1, max(0, thing.x - half) : thing.x + half + 1] = 255
    return mask


def drawn(pipe: Pipeline, task: Task, settings: dict[str, Any], holes: bool) -> np.ndarray:
    """The pictures, uint8 [n, h, w, c]."""
    masks = {"mask": task.holes} if holes else {}
    batches = pipe.sample(task.captions, changed(pipe.defaults, settings), image=task.images, batch_size=100, **masks)
    return np.concatenate([to_uint8(images) for images in batches])


def right(judge: Judge, images: np.ndarray, captions: list[str]) -> float:
    """Share of the images that show their caption."""
    return float(np.mean([row["all"] for row in judge.right(images, captions)]))


def seam(images: np.ndarray, holes: Sequence[np.ndarray]) -> float:
    """Mean difference of neighbouring pixels of which one lies in the hole and the other does not, of 255."""
    levels, inside = images.astype(float), np.stack(list(holes)) > 0
    steps = []
    for axis in (1, 2):
        across = np.diff(inside.astype(int), axis=axis) != 0
        steps.append(np.abs(np.diff(levels, axis=axis)).mean(-1)[across])
    return float(np.concatenate(steps).mean())


def calls(settings: dict[str, Any], steps: int) -> int:
    """Network calls of one picture."""
    steps = settings.get("steps", steps)
    if settings.get("completion") != "repaint":
        return steps
    path = repaint_path(steps, settings.get("repaint_jump", 5), settings.get("repaint_repeats", 5))
    return sum(b > a for a, b in itertools.pairwise(path))


def image_to_image(pipe: Pipeline, judge: Judge, task: Task, strengths: Sequence[float]) -> str:
    """Rows by strength."""
    lines = ["| strength | shows the caption | shows the scene | distance, of 255 |", "| --- | --- | --- | --- |"]
    for strength in strengths:
        images = drawn(pipe, task, {"strength": strength}, holes=False)
        distance = float(np.sqrt(np.mean((images.astype(float) - np.stack(task.images)) ** 2)))
        shares = f"{right(judge, images, task.captions):.3f} | {right(judge, images, task.scenes):.3f}"
        lines.append(f"| {strength:g} | {shares} | {distance:.1f} |")
    return "\n".join(lines)


def completion(pipe: Pipeline, judge: Judge, task: Task, ways: dict[str, dict[str, Any]]) -> str:
    """Rows by way of completion."""
    titles = ("completion", "network calls", "shows the caption", "step at the edge, of 255")
    lines = [f"| {' | '.join(titles)} |", "| --- | --- | --- | --- |"]
    lines.append(f"| the scenes | | | {seam(np.stack(task.images), task.holes):.2f} |")
    for name, settings in ways.items():
        images = drawn(pipe, task, settings, holes=True)
        found = f"{right(judge, images, task.captions):.3f} | {seam(images, task.holes):.2f}"
        lines.append(f"| {name} | {calls(settings, pipe.defaults.steps)} | {found} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run of train-ldm on shapes")
    parser.add_argument("--images", type=int, default=500, help="held-out captions (default 500)")
    asked = parser.parse_args(arguments)
    config = configuration.load(DiffusionTrainingConfig, configuration.model_config_file(asked.run), [])
    if config.data.source != "shapes":
        parser.error(f"{asked.run} was trained on {config.data.source}: the judge of this benchmark is for shapes")
    pipe, judge = Pipeline.from_pretrained(asked.run), JUDGES["shapes"](config.data.image_size)
    task = tasks(open_source(config.data, "held_out"), open_source(config.data, "validation"), asked.images)
    if pipe.unet.spec.fills:
        print(completion(pipe, judge, task, FILLED))
        return
    print(image_to_image(pipe, judge, task, STRENGTHS), flush=True)
    print("\n" + completion(pipe, judge, task, COMPLETIONS))


if __name__ == "__main__":
    main()
