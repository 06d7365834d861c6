"""Draw from a trained model folder with our pipeline and diffusers' from the same noise, and compare.

    python benchmarks/diffusers_side_by_side.py runs/demo --out docs/pictures/diffusers.png

Both sample with DDIM, whatever the folder's scheduler. Writes the two grids and prints the largest
difference of a pixel.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from ldm.config import DiffusionTrainingConfig, load
from ldm.data import rng
from ldm.data.sources import open_source
from ldm.data.transforms import to_uint8
from ldm.evaluation.figures.plots import captioned
from ldm.interop.diffusers.folder import find_model
from ldm.pipeline import Pipeline

COUNT, SEED = 16, 7


def main() -> None:
    """Draw, compare, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, help="the picture (default RUN/diffusers.png)")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    arguments = parser.parse_args()
    steps = arguments.steps
    source = open_source(load(DiffusionTrainingConfig, arguments.run / "config.yaml").data, "held_out")
    prompts = [source[i].text for i in range(COUNT)]
    ours = Pipeline.from_pretrained(arguments.run, "cpu")
    settings = dataclasses.replace(
        ours.defaults, sampler="ddim", steps=steps, guidance_scale=arguments.guidance_scale, eta=0.0, seed=SEED
    )
    pictures = np.concatenate([to_uint8(images) for images in ours.sample(prompts, settings)])

    diffusers = StableDiffusionPipeline.from_pretrained(find_model(arguments.run))
    diffusers.scheduler = DDIMScheduler.from_config(diffusers.scheduler.config)
    diffusers.set_progress_bar_config(disable=True)
    side = ours.sample_size // ours.factor
    noise = np.stack([rng.normal(SEED, "sample/x_T", i, (ours.unet.in_channels, side, side)) for i in range(COUNT)])
    drawn = diffusers(
        prompts,
        num_inference_steps=steps,
        guidance_scale=settings.guidance_scale,
        latents=torch.from_numpy(noise),
        output_type="np",
    )
    other = (drawn.images * 255).round().astype(np.uint8)
    difference = np.abs(pictures.astype(int) - other.astype(int))
    sampled = f"{COUNT} images, DDIM {steps} steps, guidance {settings.guidance_scale:g}"
    print(f"{sampled}: largest difference {difference.max()} of 255")
    rows = np.concatenate([pictures[:8], other[:8], pictures[8:], other[8:]])
    labels = [f"{who}: {p}" for half in (prompts[:8], prompts[8:]) for who in ("ours", "diffusers") for p in half]
    captioned(rows, labels, arguments.out or arguments.run / "diffusers.png", columns=8)


if __name__ == "__main__":
    main()
