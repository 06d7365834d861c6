"""Guidance against what the judge reads and against diversity (math.md G4), for any kind of guidance that has a scale."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ldm import config as configuration
from ldm.config import ConfigError, DiffusionRun
from ldm.data.images import prepare, to_uint8
from ldm.data.processes import ALONE, Processes
from ldm.data.sources import Source, open_source
from ldm.evaluation.evaluate import JUDGES, Judge, Progress
from ldm.evaluation.judge import proportion
from ldm.evaluation.page import CELL, EDGE, FONT, GAP, HEADER, Page, labels, spread, wrapped
from ldm.pipeline import Pipeline

EACH = 4  # images of a caption, where there are captions enough
REAL = 16  # real pictures of a caption, at most
LOOKED_AT = 50_000  # samples of a source whose captions are read in search of these
RESAMPLED = 1000  # bootstrap draws of the captions
SHOWN = 4  # captions in the picture
DIVERSITY = (
    "mean root-mean-square pixel difference of two images of the same caption with different noise,"
    " over that of two real validation images of the same caption (each mean taken per caption, then over captions)"
)
ACCURACY_COLOUR, DIVERSITY_COLOUR = "#0072B2", "#D55E00"

Draw = Callable[[float, Sequence[str], Sequence[int]], Iterable[Tensor]]  # (scale, captions, their numbers) → batches of images


@dataclass(frozen=True)
class Setting:
    """What a sweep found at one guidance scale; intervals are of 95 %."""

    scale: float
    judged: dict[str, dict[str, float]]  # per attribute of the judge; `all`: the image is what its caption says
    diversity: float  # 1: as varied as real images of the same caption
    diversity_low: float
    diversity_high: float


def distance(images: UInt8[np.ndarray, "n h w c"]) -> float:
    """Mean over all pairs of the root-mean-square difference of pixels, in units of black to white. Needs n ≥ 2."""
    flat = images.reshape(len(images), -1).astype(np.float64) / 255
    return float(np.mean([np.sqrt(np.mean((a - b) ** 2)) for a, b in itertools.combinations(flat, 2)]))


def diversity(drawn: Float[np.ndarray, " captions"], real: Float[np.ndarray, " captions"]) -> tuple[float, float, float]:
    """Mean distance among the images drawn over that among real ones, with its 95 % interval.

    Both are given per caption. The interval is a bootstrap over captions (Efron & Tibshirani 1993), with a fixed seed.
    """
    picks = np.random.default_rng(0).integers(len(drawn), size=(RESAMPLED, len(drawn)))
    low, high = np.quantile(drawn[picks].sum(1) / real[picks].sum(1), (0.025, 0.975))
    return float(drawn.sum() / real.sum()), float(low), float(high)


def real_pictures(source: Source, size: int, wanted: int) -> dict[str, UInt8[np.ndarray, "n h w c"]]:
    """Up to REAL pictures of each of the first ``wanted`` captions of a source, by caption, in its order.

    Raises ConfigError where a caption has only one: nothing can be said of how varied they are.
    """
    length = min(source.length or LOOKED_AT, LOOKED_AT)
    where: dict[str, list[int]] = {}
    for i in range(length):
        text = source.text(i)
        if text in where or len(where) < wanted:
            where.setdefault(text, []).append(i)
        if len(where) == wanted and all(len(found) >= REAL for found in where.values()):
            break
    for text, found in where.items():
        if len(found) < 2:
            raise ConfigError(f"diversity needs two real images of a caption, but {text!r} has one")
    return {text: to_uint8(torch.stack([prepare(source[i].image, size) for i in found[:REAL]])) for text, found in where.items()}


def sweep(
    draw: Draw, scales: Sequence[float], real: dict[str, np.ndarray], each: int, judge: Judge,
    processes: Processes = ALONE, progress: Progress | None = None,
) -> tuple[list[Setting], UInt8[np.ndarray, "captions scales h w c"]]:  # fmt: skip
    """``each`` images of every caption at every scale, judged and compared; and the first image of each.

    ``draw`` makes images of captions with given numbers within the seed; a number has the same noise at every scale.
    ``real``: real pictures by caption. Every process returns the same.
    """
    texts = [text for text in real for _ in range(each)]
    real_distances = np.array([distance(pictures) for pictures in real.values()])
    settings, first = [], []
    for k, scale in enumerate(scales):

        def share(mine: range, k: int = k, scale: float = scale) -> list[tuple[dict[str, bool], np.ndarray]]:
            captions, drawn = [texts[i] for i in mine], []
            for images in draw(scale, captions, mine):
                drawn += list(to_uint8(images))
                if progress:
                    progress(k * len(mine) + len(drawn), len(scales) * len(mine), {})
            return list(zip(judge.right(np.stack(drawn), captions), drawn, strict=True))

        pairs = processes.over(len(texts), share)
        rows, images = [row for row, _ in pairs], np.stack([image for _, image in pairs])
        images = images.reshape(len(real), each, *images.shape[1:])
        judged = {name: proportion(sum(row[name] for row in rows), len(rows)) for name in rows[0]}
        settings.append(Setting(scale, judged, *diversity(np.array([distance(group) for group in images]), real_distances)))
        first.append(images[:, 0])
    return settings, np.stack(first, axis=1)


def guidance_sweep(
    run: Path, scales: Sequence[float], images: int, given: dict[str, Any], batch_size: int,
    progress: Progress | None = None, processes: Processes = ALONE, device: torch.device | None = None,
) -> tuple[dict[str, Any], Page]:  # fmt: skip
    """Classifier-free guidance of a run, swept: the figures and their page. ``given``: sampling settings that replace the run's.

    ``images`` of each scale at most: EACH of every caption, or more where the captions are few.
    Raises ConfigError for data that no judge reads and for an unconditional model, FolderError for a run without a model.
    """
    data = configuration.load(DiffusionRun, run / "config.yaml").data
    if data.source not in JUDGES:
        raise ConfigError(f"{run}: there is a judge for {', '.join(JUDGES)}, not for {data.source}")
    pipe = Pipeline.from_pretrained(run, device)
    if pipe.text is None:
        raise ConfigError(f"{run}: this model is unconditional, there is nothing to guide")
    settings = dataclasses.replace(pipe.defaults, **given)
    pipe.check(settings, pipe.sample_size)
    judge = JUDGES[data.source](data.image_size)
    split = judge.splits[0][1]
    real = real_pictures(open_source(data, split), data.image_size, max(1, images // EACH))
    each = images // len(real)

    def draw(scale: float, captions: Sequence[str], numbers: Sequence[int]) -> Iterable[Tensor]:
        chosen = dataclasses.replace(settings, guidance_scale=scale)
        return pipe.sample(captions, chosen, batch_size=batch_size, indices=numbers)

    found, first = sweep(draw, scales, real, each, judge, processes, progress)
    sampling = {name: value for name, value in dataclasses.asdict(settings).items() if name != "guidance_scale"}
    report = {
        "run": str(run), "model": pipe.hash, "split": split, "captions": len(real), "images_of_each": each, "images": each * len(real),
        "sampling": sampling, "diversity": DIVERSITY, "scales": [dataclasses.asdict(setting) for setting in found],
    }  # fmt: skip
    sampled = f"{settings.sampler}, {settings.steps} steps, {report['images']} images for each γ"
    return report, guidance_page(found, dict(zip(real, first[:SHOWN], strict=False)), sampled)


def guidance_page(found: Sequence[Setting], pictures: dict[str, UInt8[np.ndarray, "scales h w c"]], sampled: str) -> Page:
    """Accuracy and diversity over γ, and below a row of samples of each caption, with the same noise at every γ."""
    left, high, top = 200, 270, 74
    below = top + high + 70
    width = EDGE + left + spread(max(len(found), 7)) + EDGE
    page = Page(width, below + HEADER + spread(len(pictures)) + EDGE)
    page.text(EDGE, EDGE + 8, f"Guidance: {sampled}, with 95 % intervals", fontsize=FONT + 1.5)
    half = (width - 2 * EDGE - 150) // 2
    scales = [setting.scale for setting in found]
    right = page.panel(EDGE + 50, top, half, high, title="read by the judge as the caption says", across="guidance γ")
    shares = [setting.judged["all"] for setting in found]
    _curve(right, scales, [(s["accuracy"], s["low"], s["high"]) for s in shares], ACCURACY_COLOUR)
    right.set_ylim(0, 1.03)
    right.set_ylabel("share of images", fontsize=FONT)
    varied = page.panel(width - EDGE - half, top, half, high, title="diversity within a caption", across="guidance γ")
    _curve(varied, scales, [(s.diversity, s.diversity_low, s.diversity_high) for s in found], DIVERSITY_COLOUR)
    varied.axhline(1, color="0.45", linewidth=1.2, linestyle="--")
    varied.set_ylim(0, max(1.15, varied.get_ylim()[1]))
    varied.set_ylabel("pixel distance / that of real images", fontsize=FONT)
    varied.annotate(
        "as varied as real images", (1, 1), (0, 4), ("axes fraction", "data"), "offset points", fontsize=FONT - 1, ha="right", color="0.35"
    )
    labels(page, EDGE + left, below, [f"γ = {scale:g}" for scale in scales])
    for i, (caption, row) in enumerate(pictures.items()):
        y = below + HEADER + i * (CELL + GAP)
        page.text(EDGE, y + CELL / 2, wrapped(caption, 24), parse_math=False)
        page.pictures(EDGE + left, y, row[None])
    return page


def _curve(axes: Any, scales: Sequence[float], values: Sequence[tuple[float, float, float]], colour: str) -> None:
    """Points with their intervals."""
    middle, low, high = np.array(values).T
    order = np.argsort(scales)
    axes.fill_between(np.array(scales)[order], low[order], high[order], color=colour, alpha=0.18, linewidth=0)
    axes.plot(np.array(scales)[order], middle[order], color=colour, marker="o", markersize=5, linewidth=1.8)
