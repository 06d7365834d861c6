"""Samplers on a trained model: how far each is from a long reference of the same noise, and which is the cheapest good enough."""

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
from ldm.evaluation.samplers.conformance import Progress, sliced_wasserstein
from ldm.pipeline import Pipeline

REFERENCE_STEPS = 1000
TOLD_EVERY = 50  # steps, of progress
LEVELS = 127.5  # of 8 bits, for one unit of an image in [−1, 1]


def captions(run: Path, count: int) -> list[str]:
    """``count`` captions of the run: its prompts, or the first of its validation set, over again where they are fewer.

    Raises ConfigError for what is not a run of train-ldm.
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
    pipe: Pipeline, prompts: Sequence[str], samplers: Sequence[str], steps: Sequence[int], within: float, batch_size: int,
    progress: Progress, grid: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Distances of each sampler and number of steps to DDIM with η = 0 and 1,000 steps (or all T, where they are fewer).

    A deterministic sampler is compared image by image from the same x_T: the root mean square difference of pixels, in
    levels of 8 bits (0 to 255), over all images. A stochastic one ends elsewhere by design, so the two sets are compared:
    the sliced Wasserstein distance of their pixels, in the same levels; ``floor`` is that between the reference and DDIM
    from other noise, with a tenth of its steps. ``grid`` is that of all but the reference and its like; it and everything
    else, left out, are the model's own defaults.
    """
    base = dataclasses.replace(
        pipe.defaults, sampler="ddim", eta=0.0, steps=min(REFERENCE_STEPS, pipe.schedule.num_steps)
    )
    own = dataclasses.replace(base, grid=grid or base.grid)
    wanted = [
        dataclasses.replace(own, sampler=name, steps=n)
        for name in samplers
        for n in steps
        if n >= SAMPLERS[name].fewest
    ]
    for settings in (base, *wanted):
        pipe.check(settings, pipe.sample_size)
    others = any(SAMPLERS[name].stochastic for name in samplers)
    second = dataclasses.replace(base, seed=(base.seed + 1) % 2**63, steps=max(1, base.steps // 10))
    work = [base, *([second] if others else []), *wanted]
    total, done = sum(SAMPLERS[s.sampler].calls(s.steps) for s in work), 0

    def images(settings: SampleConfig) -> Float[Tensor, "n d"]:
        nonlocal done
        calls, batches = SAMPLERS[settings.sampler].calls(settings.steps), -(-len(prompts) // batch_size)
        ended = 0

        def tell(step: int, _: Tensor, __: Tensor) -> None:
            nonlocal ended
            ended += 1
            if ended % TOLD_EVERY == 0 or ended == batches * settings.steps:
                progress(done + round(calls * ended / (batches * settings.steps)), total, {})

        drawn = torch.cat(list(pipe.sample(prompts, settings, batch_size=batch_size, callback=tell)))
        done += calls
        return drawn.clamp(-1, 1).flatten(1).double().cpu() * LEVELS

    reference, rows = images(base), []
    floor = sliced_wasserstein(images(second), reference) if others else None
    for settings in wanted:
        sampler = SAMPLERS[settings.sampler]
        found, row = (
            images(settings),
            {"sampler": settings.sampler, "steps": settings.steps, "calls": sampler.calls(settings.steps)},
        )
        if sampler.stochastic:
            rows.append({**row, "sliced_wasserstein": sliced_wasserstein(found, reference)})
        else:
            rows.append({**row, "rms": float((found - reference).square().mean().sqrt())})
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


def cheapest(rows: Sequence[dict[str, Any]], within: float) -> dict[str, Any] | None:
    """The row with the fewest network calls whose rms is at most ``within``; of equals the nearest. None: no row is."""
    good = [row for row in rows if row.get("rms", float("inf")) <= within]
    return min(good, key=lambda row: (row["calls"], row["rms"]), default=None)
