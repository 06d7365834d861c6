"""Samples of the same captions and noise at several strengths of guidance: how many are read right, how varied they are (G4)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ldm.config import ConfigError
from ldm.data.sample import Source, readable
from ldm.data.transforms import prepare, to_uint8
from ldm.distributed.processes import ALONE, Processes
from ldm.evaluation.evaluate import Judge, Progress
from ldm.evaluation.judges.shapes import proportion

REAL = 16  # real pictures of a caption, at most
LOOKED_AT = 50_000  # samples of a source whose captions are read in search of these
RESAMPLED = 1000  # bootstrap draws of the captions
DIVERSITY = (
    "mean root-mean-square pixel difference of two images of the same caption with different noise,"
    " over that of two real validation images of the same caption (each mean taken per caption, then over captions)"
)

Draw = Callable[
    [float, Sequence[str], Sequence[int]], Iterable[Tensor]
]  # (scale, captions, their numbers) → batches of images


@dataclass(frozen=True)
class Setting:
    """Results of a sweep at one guidance scale; 95 % intervals."""

    scale: float
    judged: dict[str, dict[str, float]]  # per attribute of the judge; `all`: the image is what its caption says
    diversity: float  # 1: as varied as real images of the same caption
    diversity_low: float
    diversity_high: float


def distance(images: UInt8[np.ndarray, "n h w c"]) -> float:
    """Mean over all pairs of the root-mean-square difference of pixels, in units of black to white. Needs n ≥ 2."""
    flat = images.reshape(len(images), -1).astype(np.float64) / 255
    return float(np.mean([np.sqrt(np.mean((a - b) ** 2)) for a, b in itertools.combinations(flat, 2)]))


def diversity(
    drawn: Float[np.ndarray, " captions"], real: Float[np.ndarray, " captions"]
) -> tuple[float, float, float]:
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
    real = {}
    for text, found in where.items():
        read = [prepare(sample.image, size) for _, sample in readable(source, found[:REAL])]
        if len(read) < 2:
            raise ConfigError(
                f"diversity needs two real images of a caption, but {text!r} has {len(read)} that can be read"
            )
        real[text] = to_uint8(torch.stack(read))
    return real


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
        settings.append(
            Setting(scale, judged, *diversity(np.array([distance(group) for group in images]), real_distances))
        )
        first.append(images[:, 0])
    return settings, np.stack(first, axis=1)
