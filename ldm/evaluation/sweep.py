"""Samples by strength of guidance: how many are what was asked for, and how much they differ (math.md G4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from ldm.config import ConfigError, DataConfig, SampleConfig
from ldm.data.digits import DigitsSource, caption
from ldm.data.images import to_uint8
from ldm.evaluation import plots
from ldm.evaluation.digits import DigitJudge
from ldm.evaluation.judge import proportion
from ldm.pipeline import Pipeline

DIGITS = 10
SHOWN = 10  # images of each setting in the picture: one of each digit
VARIANTS = {  # settings beside the weight, by the name in the picture
    "score": {},
    "score, σ ≤ 10": {"guidance_interval": (0.0, 10.0)},
    "mean": {"classifier_form": "mean"},
}


@dataclass(frozen=True)
class Point:
    """What one weight in one of VARIANTS gives.

    Attributes:
        accuracy: the share read as the digit asked for, with its 95 % interval.
        diversity: mean distance of two images asked for as the same digit, root mean square over pixels in [0, 1].
        images: the first SHOWN, uint8.
    """

    variant: str
    weight: float
    accuracy: dict[str, float]
    diversity: float
    images: UInt8[np.ndarray, "n h w c"]


def classifier_sweep(
    run: str | Path, classifier: str, weights: Sequence[float], variants: Sequence[str] = tuple(VARIANTS), *, images: int = 200,
    steps: int = 25, seed: int = 0, batch_size: int = 100, device: torch.device | str | None = None, say: Callable[[str], Any] = print,
) -> list[Point]:  # fmt: skip
    """Digits drawn by the unconditional model (γ = 0) and classifier guidance, for each variant and weight from the same noise.

    All by ancestral sampling, so that they differ in nothing else. Raises ConfigError for captions that are no digits.
    """
    if images < 2 * DIGITS:
        raise ConfigError(f"images must be at least {2 * DIGITS}, two of each digit, got {images}")
    pipe = Pipeline.from_pretrained(run, device)
    judge = DigitJudge(pipe.sample_size)
    digits = [i % DIGITS for i in range(images)]
    points, start = [], SampleConfig("ddpm", steps, guidance_scale=0.0, seed=seed, classifier=classifier)
    for variant in variants:
        for weight in weights:
            if weight == 0 and (none := next((p for p in points if p.weight == 0), None)):  # the same in all
                points.append(dataclasses.replace(none, variant=variant))
                continue
            settings = dataclasses.replace(start, classifier_scale=weight, **VARIANTS[variant])
            drawn = np.concatenate([to_uint8(part) for part in pipe.sample([caption(d) for d in digits], settings, batch_size=batch_size)])
            right = sum(read == asked for read, asked in zip(judge.read(drawn), digits, strict=True))
            points.append(Point(variant, weight, proportion(right, images), diversity(drawn, digits), drawn[:SHOWN]))
            say(f"{variant}, w = {weight:g}: {right} of {images} right, diversity {points[-1].diversity:.3f}")
    return points


def diversity(images: UInt8[np.ndarray, "n h w c"], labels: Sequence[int]) -> float:
    """Root-mean-square pixel distance, values in [0, 1], averaged over all pairs of one label, then over labels."""
    grey, own = images.astype(np.float64).mean(-1).reshape(len(images), -1) / 255, np.asarray(labels)
    means = []
    for label in sorted(set(labels)):
        of_label = grey[own == label]
        one, two = np.triu_indices(len(of_label), 1)
        means.append(np.sqrt(np.square(of_label[one] - of_label[two]).mean(1)).mean())
    return float(np.mean(means))


def real_diversity(side: int) -> float:
    """``diversity`` of the validation split's real digits, enlarged to ``side`` pixels."""
    source = DigitsSource(DataConfig(source="digits", image_size=side, image_channels=1), "validation")
    samples = [source[i] for i in range(source.length or 0)]
    return diversity(np.stack([s.image for s in samples]), [s.truth for s in samples])


def picture(points: Sequence[Point], real: float, file: Path) -> None:
    """Save accuracy and diversity over the weight, a curve for each variant, and below them rows of samples by weight.

    ``real``: the diversity of real digits, a dashed line.
    """
    from matplotlib.figure import Figure

    variants, weights = list(dict.fromkeys(p.variant for p in points)), list(dict.fromkeys(p.weight for p in points))
    figure = Figure(figsize=(4.2 * len(variants), 3.0 + 0.5 * len(weights)), dpi=110)
    parts: Any = figure.subfigures(2, 1, height_ratios=(2.6, 0.5 * len(weights)))
    above, below = parts
    left, right = above.subplots(1, 2)
    for variant in variants:
        mine = [p for p in points if p.variant == variant]
        at = [weights.index(p.weight) for p in mine]
        share = [p.accuracy["accuracy"] for p in mine]
        bars = [
            [a - p.accuracy["low"] for a, p in zip(share, mine, strict=True)],
            [p.accuracy["high"] - p.accuracy["accuracy"] for p in mine],
        ]
        left.errorbar(at, share, yerr=bars, marker=".", capsize=2, label=variant)
        right.plot(at, [p.diversity for p in mine], marker=".", label=variant)
    right.axhline(real, color="0.45", linewidth=1, linestyle="--", label="real digits")
    for axes, title in ((left, "read as the digit asked for"), (right, "diversity within a digit")):
        axes.set_xticks(range(len(weights)), [f"{w:g}" for w in weights])
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("classifier_scale w", fontsize=8)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    grids = below.subplots(len(weights), len(variants), squeeze=False)
    for point in points:
        axes = grids[weights.index(point.weight), variants.index(point.variant)]
        axes.imshow(plots.grid(point.images, len(point.images)), interpolation="nearest", aspect="equal")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_ylabel(f"w = {point.weight:g}", fontsize=7, rotation=0, ha="right", va="center")
        if point.weight == weights[0]:
            axes.set_title(point.variant, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, bbox_inches="tight")
