"""Tiny pipelines, and diffusers' beside them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from autoencoder.config import AutoencoderConfig
from autoencoder.model import AutoencoderKL
from ldm.config import ClipConfig, SampleConfig, ScheduleConfig, UNetConfig
from ldm.data import rng as streams
from ldm.models.clip import build_clip, from_clip, train_tokenizer
from ldm.models.text import TextEncoder
from ldm.models.unet import UNet
from ldm.pipeline import Pipeline
from ldm.pipeline.codec import LatentCodec

PROMPTS = ["a small red circle", "two blue stars above it", "", "a green square on white"]


LATENT = (4, 8, 8)


def stir(module: nn.Module, amount: float) -> None:
    """Move every weight from its initial value, so that a lost one shows."""
    for parameter in module.parameters():
        parameter.data += amount * torch.randn_like(parameter)
    module.requires_grad_(False).eval()


def text_encoder() -> TextEncoder:
    config = ClipConfig(width=32, layers=1, heads=2, max_length=16, merges=20, patch_size=4, projection=8)
    tokenizer = train_tokenizer(PROMPTS, config.merges, config.max_length)
    clip = build_clip(config, tokenizer, 16, 3)
    stir(clip, 0.1)
    return from_clip(clip, tokenizer)


def make(
    target: str = "v", *, codec: bool = True, text: bool = True, steps: int = 1000,
    channels: tuple[int, ...] = (32, 64), fills: bool = False,
) -> Pipeline:  # fmt: skip
    torch.manual_seed(0)
    encoder = text_encoder() if text else None
    latent = LatentCodec(AutoencoderKL(AutoencoderConfig(3, 4, (16, 32), 1, 8))) if codec else None
    c = 4 if codec else 3
    config = UNetConfig(channels, 1, (1,), (2,), groups=8, concat_channels=1 + c if fills else 0)
    unet = UNet(config, c, c, encoder.width if encoder else None)
    stir(unet, 0.05)
    if latent:
        stir(latent.autoencoder, 0.05)
    process, defaults = ScheduleConfig(num_steps=steps), SampleConfig(steps=5, guidance_scale=3.0)
    dropout = 0.1 if text else None
    return Pipeline(unet, process, target, latent, encoder, 16, defaults, caption_dropout=dropout)


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return make()


@pytest.fixture(scope="module")
def written(pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "model"
    pipe.save_pretrained(folder, for_diffusers=True)
    return folder


def array(pictures: Sequence[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in pictures]).astype(int)


def noise(seed: int, n: int, name: str = "x_T") -> Tensor:
    return torch.from_numpy(np.stack([streams.normal(seed, f"sample/{name}", i, LATENT) for i in range(n)]))


def theirs(folder: Path) -> Any:
    opened = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    opened.set_progress_bar_config(disable=True)
    return opened
