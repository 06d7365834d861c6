"""A full-size Stable Diffusion 1.5 or 2.1 with random weights, converted there and back, drawn beside diffusers.

    python benchmarks/stable_diffusion.py sd1 [--size 256] [--folder /where/10/GB/fit]

Writes a pipeline folder in float32 (4.3 or 5.2 GB) and a single file of the same size, both deleted
afterwards. Prints time and peak memory of `ldm convert --verify`, and the largest difference of a pixel
between the two images from the same noise (DDIM, 10 steps, guidance 7.5). The weights are random and so
is the image: its spread is printed to show that it is not constant.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTokenizer

from autoencoder.config import AutoencoderConfig
from autoencoder.layout import to_diffusers
from ldm.config import DiffusionTrainingConfig, ScheduleConfig, load
from ldm.data import rng
from ldm.interop.bundle import TEXT, UNET, VAE, Bundle, Part
from ldm.interop.compvis.names import shapes_of
from ldm.interop.diffusers.folder import write_folder
from ldm.interop.diffusers.schedulers import scheduler_to_diffusers
from ldm.interop.diffusers.unet import unet_to_diffusers
from ldm.models.text import save_tokenizer
from ldm.models.unet import NetworkSpec
from ldm.pipeline import Pipeline

VOCABULARY = 49408
TEXT_SIZES: dict[str, dict[str, Any]] = {
    "sd1": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
    },
    "sd2": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
}
PROMPT, STEPS, GUIDANCE, SEED = "a small red circle", 10, 7.5, 7
ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Write, convert, draw, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("sd1", "sd2"))
    parser.add_argument("--size", type=int, default=256, help="side of the picture in pixels")
    parser.add_argument("--folder", help="where to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        folder, single, back = (Path(place) / name for name in ("model", "single.safetensors", "back"))
        write_folder(random_bundle(arguments.model), folder)
        for source, target in ((folder, single), (single, back)):
            started = time.monotonic()
            command = [sys.executable, "-m", "ldm", "convert", str(source), str(target), "--verify"]
            subprocess.run(command, check=True, cwd=ROOT)
            seconds = time.monotonic() - started
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
            print(f"{source.name} to {target.name}: {seconds:.0f} s, peak memory so far {peak:.2f} GiB", flush=True)
        single.unlink()
        draw(back, arguments.size)


def random_bundle(model: str) -> Bundle:
    """The networks of configs/sd1 or sd2 with random weights, scaled to keep activations near unit variance."""
    config = load(DiffusionTrainingConfig, ROOT / f"configs/{model}/ldm.yaml")
    text = CLIPTextConfig(**TEXT_SIZES[model], vocab_size=VOCABULARY, projection_dim=512).to_dict()
    configs = {
        UNET: unet_to_diffusers(NetworkSpec(config.unet, 4, 4, text["hidden_size"]), 64),
        VAE: {**to_diffusers(AutoencoderConfig()), "sample_size": 512, "scaling_factor": 0.18215},
        TEXT: {**text, "architectures": ["CLIPTextModel"]},
    }
    random = torch.Generator().manual_seed(0)
    parts = {
        name: Part(layout, {key: _random(key, shape, random) for key, shape in shapes_of(name, layout).items()})
        for name, layout in configs.items()
    }
    return Bundle(parts, scheduler_to_diffusers(ScheduleConfig("scaled_linear"), "eps"), _tokenizer())


def _random(name: str, shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    """Norm weights near 1, biases near 0, matrices of unit gain."""
    values = torch.empty(shape).normal_(generator=random)
    if len(shape) == 1:
        return 1 + 0.1 * values if name.endswith("weight") else 0.1 * values
    return values * (1.0 if "embedding" in name and "text_model" in name else float(np.prod(shape[1:])) ** -0.5)


def _tokenizer() -> dict[str, bytes]:
    """A tokenizer with as many tokens as the published one; its merges are pairs of bytes in order."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = symbols + [s + "</w>" for s in symbols]
    merges = list(product(symbols, base))[: VOCABULARY - len(base) - 2]
    tokens = [*base, *("".join(pair) for pair in merges), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = CLIPTokenizer(
            vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=77
        )
        save_tokenizer(tokenizer, folder)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def draw(folder: Path, size: int) -> None:
    """Draw one image with each pipeline, one model in memory at a time; print the difference."""
    ours = Pipeline.from_pretrained(folder, "cpu")
    started = time.monotonic()
    settings = {"sampler": "ddim", "steps": STEPS, "guidance_scale": GUIDANCE, "seed": SEED, "size": size}
    a = np.asarray(ours([PROMPT], **settings)[0]).astype(int)
    seconds = time.monotonic() - started
    del ours
    diffusers = StableDiffusionPipeline.from_pretrained(folder)
    diffusers.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(rng.normal(SEED, "sample/x_T", 0, (4, size // 8, size // 8)))[None]
    started = time.monotonic()
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "height": size, "width": size}
    b = np.asarray(diffusers(PROMPT, latents=noise, **options).images[0]).astype(int)
    inside = float(((b > 0) & (b < 255)).mean())
    times = f"ours {seconds:.0f} s, diffusers {time.monotonic() - started:.0f} s"
    print(f"{size} px, DDIM {STEPS} steps, guidance {GUIDANCE:g}: largest difference {abs(a - b).max()} of 255")
    print(f"spread of the picture {b.std():.0f}, {inside:.0%} of its values inside 1…254; {times}")


if __name__ == "__main__":
    main()
