"""Samplers on a trained model: distances to a long reference from the same noise, and the cheapest close enough."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ldm import config as configuration
from ldm.config import ConfigError, DiffusionTrainingConfig, SampleConfig
from ldm.data.sources import open_source
from ldm.diffusion.samplers.registry import SAMPLERS
from ldm.evaluation.metrics import root_mean_square, sliced_wasserstein
from ldm.evaluation.samplers.conformance import Progress
from ldm.pipeline import Pipeline

REFERENCE_STEPS = 1000
REPORT_EVERY = 50  # steps between reports of progress
LEVELS = 127.5  # of 8 bits per unit of an image in [−1, 1]


def captions(run: Path, count: int) -> list[str]:
    """``count`` captions of the run: its prompts, or the first of its validation set, repeated if there are fewer.

    Raises ConfigError for a run of another command than train-ldm.
    """
    config = configuration.load_run(run)
    if not isinstance(config, DiffusionTrainingConfig):
        raise ConfigError(f"{run} is not a run of train-ldm: it has no sampler")
    texts = list(config.prompts)
    if not texts:
        source = open_source(config.data, "validation")
        texts = [source.text(i) for i in range(min(count, source.length or count))]
    return [texts[i % len(texts)] for i in range(count)]


def compare_samplers(
    pipe: Pipeline, prompts: Sequence[str], samplers: Sequence[str], steps: Sequence[int], within: float,
    batch_size: int, progress: Progress, grid: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Distances of each sampler and number of steps to a reference: DDIM, η = 0, 1,000 steps (or all T, if fewer).

    A deterministic sampler is compared image by image from the same x_T: root mean square difference of
    pixels over all images, in levels of 8 bits (0 to 255). A stochastic one ends in other images by
    design, so the two sets are compared: sliced Wasserstein distance of their pixels, in the same levels;
    ``floor`` is that between the reference and DDIM from other noise with a tenth of its steps.

    ``grid``: of all but the reference and DDIM from other noise; by default the model's own.
    """
    base_steps = min(REFERENCE_STEPS, pipe.schedule.num_steps)
    base = dataclasses.replace(pipe.defaults, sampler="ddim", eta=0.0, steps=base_steps)
    own = dataclasses.replace(base, grid=grid or base.grid)
    pairs = [(name, n) for name in samplers for n in steps if n >= SAMPLERS[name].fewest]
    wanted = [dataclasses.replace(own, sampler=name, steps=n) for name, n in pairs]
    for settings in (base, *wanted):
        pipe.check(settings)
    stochastic = any(SAMPLERS[name].stochastic for name in samplers)
    other = dataclasses.replace(base, seed=(base.seed + 1) % 2**63, steps=max(1, base.steps // 10))

    work = [base, *([other] if stochastic else []), *wanted]
    draw = _Drawing(pipe, prompts, batch_size, sum(map(_calls, work)), progress)
    reference = draw(base)
    floor = sliced_wasserstein(draw(other), reference) if stochastic else None
    rows = [_compared(settings, draw(settings), reference) for settings in wanted]
    return {
        "images": len(prompts),
        "reference": dataclasses.asdict(base),
        "grid": own.grid,
        "unit": "pixel levels of 255",
        "floor": floor,
        "within": within,
        "rows": rows,
        "cheapest": cheapest(rows, within),
    }


class _Drawing:
    """Draws images of the prompts with given settings, and reports progress over all calls.

    ``total``: network calls of all settings to come.
    """

    def __init__(self, pipe: Pipeline, prompts: Sequence[str], batch_size: int, total: int, progress: Progress) -> None:
        self.pipe, self.prompts, self.batch_size = pipe, prompts, batch_size
        self.total, self.progress, self.done = total, progress, 0

    def __call__(self, settings: SampleConfig) -> Float[Tensor, "n d"]:
        """Images as rows of pixels, in levels of 8 bits."""
        calls, batches = _calls(settings), -(-len(self.prompts) // self.batch_size)
        ended = 0

        def after_step(step: int, _: Tensor, __: Tensor) -> None:
            nonlocal ended
            ended += 1
            if ended % REPORT_EVERY == 0 or ended == batches * settings.steps:
                self.progress(self.done + round(calls * ended / (batches * settings.steps)), self.total, {})

        batched = self.pipe.sample(self.prompts, settings, batch_size=self.batch_size, callback=after_step)
        images = torch.cat(list(batched))
        self.done += calls
        return images.clamp(-1, 1).flatten(1).double().cpu() * LEVELS


def _calls(settings: SampleConfig) -> int:
    return SAMPLERS[settings.sampler].calls(settings.steps)


def _compared(settings: SampleConfig, images: Float[Tensor, "n d"], reference: Float[Tensor, "n d"]) -> dict[str, Any]:
    """One row of the report: the distance of these images to the reference."""
    row: dict[str, Any] = {"sampler": settings.sampler, "steps": settings.steps, "calls": _calls(settings)}
    if SAMPLERS[settings.sampler].stochastic:
        return row | {"sliced_wasserstein": sliced_wasserstein(images, reference)}
    return row | {"rms": root_mean_square(images, reference)}


def cheapest(rows: Sequence[dict[str, Any]], within: float) -> dict[str, Any] | None:
    """The row with the fewest network calls and rms ≤ ``within``, of equals the closest; None if there is none."""
    good = [row for row in rows if row.get("rms", float("inf")) <= within]
    return min(good, key=lambda row: (row["calls"], row["rms"]), default=None)
