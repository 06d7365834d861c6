"""A LoRA trained here, drawn live, merged, and by diffusers from the same noise: the share of striped images.

python benchmarks/lora_side_by_side.py runs/demo runs/demo-lora --out docs/pictures/lora.png
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from ldm.config import DataConfig, SampleConfig
from ldm.data import rng
from ldm.data.shapes import Scene, caption, parse, stripe
from ldm.data.sources import open_source
from ldm.data.transforms import to_uint8
from ldm.evaluation.figures.plots import captioned
from ldm.evaluation.judges.shapes import ShapesJudge, agreement
from ldm.evaluation.metrics import proportion
from ldm.interop.diffusers.folder import find_model
from ldm.interop.lora import find_lora
from ldm.pipeline import Pipeline

SHOWN, STEPS, SEED, SIDE = 8, 20, 7, 32
DATA = DataConfig(source="shapes", image_size=SIDE)


def ours(pipe: Pipeline, prompts: list[str], settings: SampleConfig) -> np.ndarray:
    """Images of our pipeline, uint8."""
    return np.concatenate([to_uint8(images) for images in pipe.sample(prompts, settings, batch_size=50)])


def theirs(base: Path, lora: Path, prompts: list[str], settings: SampleConfig) -> np.ndarray:
    """Images of diffusers' pipeline from the same noise, uint8."""
    pipe: Any = StableDiffusionPipeline.from_pretrained(find_model(base))
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(find_lora(lora).parent))
    shape = (pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
    noise = torch.from_numpy(np.stack([rng.normal(SEED, "sample/x_T", i, shape) for i in range(len(prompts))]))
    drawn = pipe(
        prompts, num_inference_steps=STEPS, guidance_scale=settings.guidance_scale, latents=noise, output_type="np"
    )
    return (drawn.images * 255).round().astype(np.uint8)


def print_shares(name: str, pictures: np.ndarray, scenes: list[Scene]) -> None:
    """Print the share of striped images, and of those that show each attribute of their caption."""
    read = ShapesJudge(SIDE, 1, striped=True).read(pictures)
    rows = [agreement(found, scene, striped=True) for found, scene in zip(read, scenes, strict=True)]
    counts = {"striped": [scene.objects[0].striped for scene in read]}
    counts |= {key: [row[key] for row in rows] for key in ("background", "size", "colour", "shape", "all")}
    shares = {key: proportion(sum(values), len(values)) for key, values in counts.items()}
    texts = (f"{key} {s['accuracy']:.3f} ({s['low']:.3f}–{s['high']:.3f})" for key, s in shares.items())
    print(f"{name:34s} {'  '.join(texts)}", flush=True)


def reconstructed(pipe: Pipeline, images: np.ndarray) -> np.ndarray:
    """Drawings reconstructed by the autoencoder: the ceiling of samples."""
    assert pipe.codec is not None
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        posterior = pipe.codec.autoencoder.encode(x)
        latent = pipe.codec.latent(posterior, torch.zeros_like(posterior.mean))
        return to_uint8(pipe.codec.decode(latent))


def judge_drawings(base: Path, scenes: int) -> None:
    """Print the shares of real drawings, plain and striped, and of their reconstructions."""
    source = open_source(dataclasses.replace(DATA, source="shapes-striped"), "held_out")
    real = [source[i] for i in range(2 * scenes)]
    for striped in (False, True):
        some = [s for s in real if s.truth.objects[0].striped == striped]
        images, truths = np.stack([s.image for s in some]), [s.truth for s in some]
        print_shares(f"drawings, {'striped' if striped else 'plain'}", images, truths)
        decoded = reconstructed(Pipeline.from_pretrained(base, "cpu"), images)
        print_shares("  through the autoencoder", decoded, truths)


def main() -> None:
    """Draw, judge, compare, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("lora", type=Path)
    parser.add_argument("--images", type=int, default=200, help="of each kind of caption (default 200)")
    parser.add_argument("--out", type=Path, help="the picture (default LORA/lora.png)")
    arguments = parser.parse_args()
    plain = [parse(open_source(DATA, "held_out").text(i)) for i in range(arguments.images)]
    striped = [stripe(scene) for scene in plain]
    judge_drawings(arguments.base, arguments.images)

    base, live, merged = (Pipeline.from_pretrained(arguments.base, "cpu") for _ in range(3))
    live.load_lora(arguments.lora)
    merged.load_lora(arguments.lora)
    merged.merge_lora()
    settings = dataclasses.replace(base.defaults, sampler="ddim", steps=STEPS, eta=0.0, seed=SEED)
    rows: list[tuple[str, np.ndarray, list[str]]] = []
    for kind, scenes in (("plain", plain), ("striped", striped)):
        prompts = [caption(scene) for scene in scenes]
        drawn = {
            "base": ours(base, prompts, settings),
            "base + LoRA": ours(live, prompts, settings),
            "merged": ours(merged, prompts, settings),
            "diffusers": theirs(arguments.base, arguments.lora, prompts, settings),
        }
        for name, pictures in drawn.items():
            print_shares(f"{name}, {kind} captions", pictures, scenes)
            rows.append((name, pictures[:SHOWN], prompts[:SHOWN]))
        for name in ("merged", "diffusers"):
            difference = np.abs(drawn[name].astype(int) - drawn["base + LoRA"].astype(int)).max()
            print(f"{name} against live, {len(prompts)} images: largest difference {difference} of 255", flush=True)

    labels = [f"{name}: {prompt}" for name, _, prompts in rows for prompt in prompts]
    pictures = np.concatenate([pictures for _, pictures, _ in rows])
    captioned(pictures, labels, arguments.out or arguments.lora / "lora.png", columns=SHOWN)


if __name__ == "__main__":
    main()
