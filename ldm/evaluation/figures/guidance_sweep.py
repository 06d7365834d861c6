"""Sweep of classifier-free guidance of a run (docs/equations.md G4), and its page."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from ldm import config as configuration
from ldm.config import ConfigError, DiffusionTrainingConfig
from ldm.data.sources import open_source
from ldm.distributed.processes import ALONE, Processes
from ldm.evaluation.evaluate import JUDGES, Progress, check_judged
from ldm.evaluation.figures.page import CELL, EDGE, FONT, GAP, HEADER, Page, labels, spread, wrapped
from ldm.evaluation.figures.sweep import DIVERSITY, Setting, about, real_pictures, sweep
from ldm.evaluation.figures.sweep_panels import BELOW, Line, panels
from ldm.pipeline import Pipeline

EACH = 4  # images of a caption, if there are enough captions
SHOWN = 4  # captions in the picture
ACCURACY_COLOUR, DIVERSITY_COLOUR = "#0072B2", "#D55E00"


def guidance_sweep(
    run: Path, scales: Sequence[float], images: int, given: dict[str, Any], batch_size: int,
    progress: Progress | None = None, processes: Processes = ALONE, device: torch.device | None = None,
    parts: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], Page]:  # fmt: skip
    """Sweep classifier-free guidance of a run; returns the report and its page.

    Args:
        images: most images for each scale: EACH of every caption, or more if there are few captions.
        given: sampling settings that replace those of the run.
        parts: replacements for parts of the model (``vae``, ``text``), see ``Pipeline.from_pretrained``.

    Raises:
        ConfigError: there is no judge for the data, or the model is unconditional.
        FolderError: the run has no model.
    """
    data = configuration.load(DiffusionTrainingConfig, configuration.model_config_file(run)).data
    check_judged(data, run)
    pipe = Pipeline.from_pretrained(run, device, **(parts or {}))
    if pipe.text is None:
        raise ConfigError(f"{run}: this model is unconditional, there is nothing to guide")
    settings = dataclasses.replace(pipe.defaults, **given)
    pipe.check(settings)
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
        **about(run, pipe.hash, split, len(real), each),
        "sampling": sampling,
        "diversity": DIVERSITY,
        "scales": [dataclasses.asdict(setting) for setting in found],
    }
    sampled = f"{settings.sampler}, {settings.steps} steps, {report['images']} images for each γ"
    return report, guidance_page(found, dict(zip(real, first[:SHOWN], strict=False)), sampled)


def guidance_page(
    found: Sequence[Setting], pictures: dict[str, UInt8[np.ndarray, "scales h w c"]], sampled: str
) -> Page:
    """Page of accuracy and diversity over γ, with a row of samples for each caption, the same noise at every γ."""
    left = 200
    width = EDGE + left + spread(max(len(found), 7)) + EDGE
    page = Page(width, BELOW + HEADER + spread(len(pictures)) + EDGE)
    page.text(EDGE, EDGE + 8, f"Guidance: {sampled}, with 95 % intervals", fontsize=FONT + 1.5)
    _, varied = panels(page, [Line("", found, ACCURACY_COLOUR, DIVERSITY_COLOUR)], "guidance γ")
    varied.annotate(
        "as varied as real images", (1, 1), (0, 4), ("axes fraction", "data"), "offset points",
        fontsize=FONT - 1, ha="right", color="0.35",
    )  # fmt: skip
    labels(page, EDGE + left, BELOW, [f"γ = {setting.scale:g}" for setting in found])
    for i, (caption, row) in enumerate(pictures.items()):
        y = BELOW + HEADER + i * (CELL + GAP)
        page.text(EDGE, y + CELL / 2, wrapped(caption, 24), parse_math=False)
        page.pictures(EDGE + left, y, row[None])
    return page
