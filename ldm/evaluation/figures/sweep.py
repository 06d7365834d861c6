"""Sweep of a guidance scale: accuracy and diversity, with equal captions and noise (docs/equations.md G4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from ldm.config import ConfigError
from ldm.data.sample import Source, readable
from ldm.data.transforms import prepare, to_uint8
from ldm.distributed.processes import ALONE, Processes
from ldm.evaluation.evaluate import Judge, Progress
from ldm.evaluation.metrics import diversity, pairwise_distance, proportion

REAL = 16  # most real images of a caption
LOOKED_AT = 50_000  # most samples of a source searched for them
DIVERSITY = (
    "mean root-mean-square pixel difference of two images of the same caption with different noise,"
    " over that of two real validation images of the same caption (each mean taken per caption, then over captions)"
)

# (scale, captions, their numbers) → batches of images
Draw = Callable[[float, Sequence[str], Sequence[int]], Iterable[Tensor]]


@dataclass(frozen=True)
class Setting:
    """Results of a sweep at one guidance scale; 95 % intervals."""

    scale: float
    judged: dict[str, dict[str, float]]  # by attribute of the judge; `all`: the image shows what its caption says
    diversity: float  # 1: as varied as real images of the same caption
    diversity_low: float
    diversity_high: float


def real_pictures(source: Source, size: int, wanted: int) -> dict[str, UInt8[np.ndarray, "n h w c"]]:
    """Up to REAL images of each of the first ``wanted`` captions of a source, by caption.

    Raises ConfigError if a caption has only one image, which has no diversity.
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
                f"diversity needs two real images of a caption, but only {len(read)} of {text!r} can be read"
            )
        real[text] = to_uint8(torch.stack(read))
    return real


def about(run: Path, model: str, split: str, captions: int, each: int) -> dict[str, Any]:
    """Facts at the top of every sweep's report; ``each``: images of a caption at one scale."""
    return {
        "run": str(run),
        "model": model,
        "split": split,
        "captions": captions,
        "images_of_each": each,
        "images": each * captions,
    }


def sweep(
    draw: Draw, scales: Sequence[float], real: dict[str, np.ndarray], each: int, judge: Judge,
    processes: Processes = ALONE, progress: Progress | None = None,
) -> tuple[list[Setting], UInt8[np.ndarray, "captions scales h w c"]]:  # fmt: skip
    """Draw, judge and compare ``each`` images of every caption at every scale.

    Args:
        draw: draws images of captions with given numbers; a number has the same noise at every scale.
        real: real images by caption.

    Returns:
        the results by scale, and the first image of each caption and scale; the same on all processes.
    """
    texts = [text for text in real for _ in range(each)]
    real_distances = np.array([pairwise_distance(images) for images in real.values()])
    settings, first = [], []
    for k, scale in enumerate(scales):

        def work(share: range, k: int = k, scale: float = scale) -> list[tuple[dict[str, bool], np.ndarray]]:
            captions, drawn = [texts[i] for i in share], []
            for images in draw(scale, captions, share):
                drawn += list(to_uint8(images))
                if progress:
                    progress(k * len(share) + len(drawn), len(scales) * len(share), {})
            return list(zip(judge.right(np.stack(drawn), captions), drawn, strict=True))

        pairs = processes.over(len(texts), work)
        rows, images = [row for row, _ in pairs], np.stack([image for _, image in pairs])
        images = images.reshape(len(real), each, *images.shape[1:])
        judged = {name: proportion(sum(row[name] for row in rows), len(rows)) for name in rows[0]}
        distances = np.array([pairwise_distance(group) for group in images])
        settings.append(Setting(scale, judged, *diversity(distances, real_distances)))
        first.append(images[:, 0])
    return settings, np.stack(first, axis=1)
