"""Sweep of classifier guidance of the unconditional model (docs/equations.md G4), and its page."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from ldm import config as configuration
from ldm.config import ClassifierTrainingConfig, ConfigError, SampleConfig
from ldm.data.sources import open_source
from ldm.distributed.processes import ALONE, Processes
from ldm.evaluation.evaluate import JUDGES, Progress, check_judged
from ldm.evaluation.figures.page import EDGE, FONT, GAP, HEADER, Page, labels, spread
from ldm.evaluation.figures.sweep import DIVERSITY, Setting, about, real_pictures, sweep
from ldm.evaluation.figures.sweep_panels import BELOW, Line, panels
from ldm.interop.classifier import read_classifier
from ldm.pipeline import Pipeline

SHOWN = 5  # captions in the picture
SMALL = 64  # side of a sample in the picture, in pixels
VARIANTS: dict[str, dict[str, Any]] = {  # settings by the name in the picture
    "score": {},
    "score, σ ≤ 10": {"guidance_interval": (0.0, 10.0)},
    "mean": {"classifier_form": "mean"},
}
COLOURS = dict(zip(VARIANTS, ("#0072B2", "#D55E00", "#009E73"), strict=True))

NOT_COMMON = ("classifier_scale", "classifier_form", "guidance_interval")  # settings that differ between variants

# by weight: the results, and one image of each caption
Points = dict[float, tuple[Setting, UInt8[np.ndarray, "captions h w c"]]]
# (a variant, its weights, weights done before, weights in all) → results
Sweep = Callable[[dict[str, Any], Sequence[float], int, int], Points]


def classifier_sweep(
    run: Path, classifier: Path, weights: Sequence[float], images: int, steps: int, batch_size: int = 100,
    progress: Progress | None = None, processes: Processes = ALONE, device: torch.device | None = None,
    parts: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], Page]:  # fmt: skip
    """Sweep classifier guidance in each of VARIANTS with the same noise; returns the report and its page.

    The diffusion model is unconditional (γ = 0) and samples are ancestral, so that nothing else differs.
    w = 0 is drawn once for all variants.

    Args:
        images: most images for each weight, shared equally among the captions of the classifier.
        parts: replacements for parts of the model (``vae``, ``text``), see ``Pipeline.from_pretrained``.

    Raises:
        ConfigError: there is no judge for the data, or fewer than two images of a caption are asked for.
        FolderError: the run has no model.
    """
    captions = len(read_classifier(classifier)[0].captions)
    data = configuration.load(ClassifierTrainingConfig, configuration.config_file(classifier)).data
    check_judged(data, classifier)
    if images < 2 * captions:
        raise ConfigError(f"images must be at least {2 * captions}, two of each caption, got {images}")
    pipe = Pipeline.from_pretrained(run, device, **(parts or {}))
    settings = SampleConfig("ddpm", steps, guidance_scale=0.0, classifier=str(classifier))
    pipe.check(settings)
    judge = JUDGES[data.source](pipe.sample_size)
    split = judge.splits[0][1]
    source = open_source(dataclasses.replace(data, image_size=pipe.sample_size), split)
    real = real_pictures(source, pipe.sample_size, captions)
    each = images // len(real)

    def swept(variant: dict[str, Any], scales: Sequence[float], before: int, total: int) -> Points:
        def draw(scale: float, captions: Sequence[str], numbers: Sequence[int]) -> Iterable[Tensor]:
            chosen = dataclasses.replace(settings, classifier_scale=scale, **variant)
            return pipe.sample(captions, chosen, batch_size=batch_size, indices=numbers)

        def report_progress(step: int, steps: int, values: Mapping[str, float]) -> None:
            share = steps // len(scales)
            if progress:
                progress(before * share + step, total * share, values)

        found, first = sweep(draw, scales, real, each, judge, processes, report_progress)
        return {setting.scale: (setting, first[:, k]) for k, setting in enumerate(found)}

    points = _every_variant(swept, weights)
    sampling = {name: value for name, value in dataclasses.asdict(settings).items() if name not in NOT_COMMON}
    report = {
        **about(run, pipe.hash, split, len(real), each),
        "sampling": sampling,
        "diversity": DIVERSITY,
        "variants": {name: _as_json(name, results) for name, results in points.items()},
    }
    sampled = f"{settings.sampler}, {steps} steps, {report['images']} images for each w"
    return report, classifier_page(points, list(real)[:SHOWN], sampled)


def _as_json(name: str, results: Sequence[tuple[Setting, np.ndarray]]) -> dict[str, Any]:
    return {"settings": VARIANTS[name], "scales": [dataclasses.asdict(row) for row, _ in results]}


def _every_variant(swept: Sweep, weights: Sequence[float]) -> dict[str, list[tuple[Setting, np.ndarray]]]:
    """Results of each variant by weight, in order; at w = 0 all variants are equal and drawn once."""
    guided = [w for w in weights if w]
    free = len(weights) - len(guided)
    total = free + len(VARIANTS) * len(guided)
    unguided = swept({}, [0.0], 0, total) if free else {}
    points = {}
    for i, (name, variant) in enumerate(VARIANTS.items()):
        results = unguided | (swept(variant, guided, free + i * len(guided), total) if guided else {})
        points[name] = [results[w] for w in weights]
    return points


def classifier_page(
    points: Mapping[str, Sequence[tuple[Setting, np.ndarray]]], captions: Sequence[str], sampled: str
) -> Page:
    """Page of accuracy and diversity over w, a colour for each variant, with a row of samples for each w.

    ``captions``: those of the samples shown; their last word is the title of a column.
    """
    left, apart = 66, 24
    block, weights = spread(len(captions), SMALL), [row.scale for row, _ in next(iter(points.values()))]
    width = max(EDGE + left + len(points) * (block + apart) - apart + EDGE, 900)
    page = Page(width, BELOW + 2 * HEADER + spread(len(weights), SMALL) + EDGE)
    page.text(EDGE, EDGE + 8, f"Classifier guidance: {sampled}, with 95 % intervals", fontsize=FONT + 1.5)
    lines = [Line(name, [row for row, _ in results], COLOURS[name], COLOURS[name]) for name, results in points.items()]
    right, varied = panels(page, lines, "classifier scale w")
    for axes in (right, varied):  # a doubling is as wide as the distance from 0 to 1
        axes.set_xscale("symlog", base=2, linthresh=1, linscale=0.5)
        axes.set_xticks(weights, [f"{w:g}" for w in weights])
        axes.set_xticks([], minor=True)
        axes.set_xlim(-0.4, 1.3 * max(1.0, *weights))
    varied.legend(fontsize=FONT - 1, frameon=False, loc="lower left")
    for k, w in enumerate(weights):
        page.text(EDGE + left - 10, BELOW + 2 * HEADER + k * (SMALL + GAP) + SMALL / 2, f"w = {w:g}", ha="right")
    for i, (name, results) in enumerate(points.items()):
        x = EDGE + left + i * (block + apart)
        page.text(x, BELOW + HEADER / 2, name, color=COLOURS[name], fontsize=FONT + 1, weight="bold")
        labels(page, x, BELOW + HEADER, [caption.split()[-1] for caption in captions], SMALL)
        page.pictures(x, BELOW + 2 * HEADER, np.stack([images[: len(captions)] for _, images in results]), SMALL)
    return page
