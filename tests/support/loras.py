"""A tiny model with random weights, LoRAs of it, and what they draw."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from support.pipelines import stir
from torch import Tensor, nn

from autoencoder.config import AutoencoderConfig
from autoencoder.model import AutoencoderKL
from ldm.cli.main import main
from ldm.config import ClipConfig, LoraConfig, SampleConfig, ScheduleConfig, UNetConfig
from ldm.data import rng as streams
from ldm.diffusion.condition import Condition
from ldm.interop.bundle import TEXT, UNET
from ldm.interop.lora_settings import TOWER
from ldm.models.clip import build_clip, from_clip, train_tokenizer
from ldm.models.lora import Lora
from ldm.models.text import TextEncoder
from ldm.models.unet import UNet
from ldm.pipeline import Pipeline
from ldm.pipeline.codec import LatentCodec

PROMPTS = ["a small red circle", "two blue stars above it", "a green square"]
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
ALL = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv_shortcut",
    "time_emb_proj",
    "conv",
)


def write_model(folder: Path) -> Path:
    """A model folder of tiny networks with random weights."""
    torch.manual_seed(0)
    config = ClipConfig(width=32, layers=2, heads=2, max_length=16, merges=20, patch_size=4, projection=8)
    tokenizer = train_tokenizer(PROMPTS, config.merges, config.max_length)
    clip = build_clip(config, tokenizer, 16, 3)
    stir(clip, 0.1)
    codec = LatentCodec(AutoencoderKL(AutoencoderConfig(3, 4, (16, 32), 1, 8)))
    unet = UNet(UNetConfig((16, 32), 1, (1,), (2,), groups=8), 4, 4, 32)
    stir(unet, 0.05)
    stir(codec.autoencoder, 0.05)
    encoder, defaults = from_clip(clip, tokenizer), SampleConfig(steps=5, guidance_scale=3.0)
    pipe = Pipeline(unet, ScheduleConfig(), "v", codec, encoder, 16, defaults)
    pipe.save_pretrained(folder, for_diffusers=True)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ``write_model``."""
    return write_model(tmp_path_factory.mktemp("written") / "model")


@pytest.fixture
def pipe(written: Path) -> Pipeline:
    """The model of ``written``, loaded anew for each test."""
    return Pipeline.from_pretrained(written, "cpu")


def text(pipe: Pipeline) -> TextEncoder:
    assert pipe.text is not None
    return pipe.text


def networks(pipe: Pipeline) -> dict[str, nn.Module]:
    return {UNET: pipe.unet, TEXT: text(pipe).tower}


def changed(network: nn.Module, targets: tuple[str, ...], rank: int = 3, alpha: float = 5.0, seed: int = 0) -> Lora:
    """A LoRA with random A and B."""
    torch.manual_seed(seed)
    lora = Lora.fresh(network, LoraConfig(rank, alpha, targets))
    for parameter in lora.parameters():
        parameter.data.normal_(std=0.2)
    return lora


def both(pipe: Pipeline) -> dict[str, Lora]:
    return {UNET: changed(pipe.unet, ALL), TEXT: changed(text(pipe).tower, TEXT_TARGETS, rank=2, alpha=1.0, seed=1)}


def inputs(n: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return (
        torch.randn(n, 4, 8, 8, generator=generator),
        torch.tensor([3, 700])[:n],
        torch.randn(n, 5, 32, generator=generator),
    )


def out(network: nn.Module) -> Tensor:
    x, t, context = inputs()
    return network(x, t, Condition(context=context))


def close(a: Tensor, b: Tensor) -> None:
    a, b = a.detach(), b.detach()
    assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


def pictures(pipe: Pipeline, **settings: Any) -> np.ndarray:
    return np.stack([np.asarray(p) for p in pipe(PROMPTS, sampler="ddim", steps=5, seed=3, **settings)]).astype(int)


def theirs(folder: Path, *loras: tuple[Path, float]) -> np.ndarray:
    """The same pictures by diffusers."""
    opened: Any = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    opened.set_progress_bar_config(disable=True)
    for i, (path, _) in enumerate(loras):
        opened.load_lora_weights(path, adapter_name=f"lora{i}")
    if loras:
        opened.set_adapters([f"lora{i}" for i in range(len(loras))], [scale for _, scale in loras])
    noise = torch.from_numpy(np.stack([streams.normal(3, "sample/x_T", i, (4, 8, 8)) for i in range(len(PROMPTS))]))
    drawn = opened(PROMPTS, num_inference_steps=5, guidance_scale=3.0, latents=noise, output_type="np")
    return (drawn.images * 255).round().astype(int)


def sampled(model: Path, lora: Path, folder: Path) -> int:
    """Exit code of `ldm sample` with a LoRA, two steps on the CPU."""
    options = ["--prompt", "x", "--steps", "2", "--device", "cpu", "--out", str(folder)]
    return main(["sample", str(model), "--lora", str(lora), *options])


def plain_keys(loras: dict[str, Lora]) -> dict[str, Tensor]:
    """diffusers' keys in peft's words."""
    return {
        f"{part}.{TOWER if part == TEXT else ''}{name}": v
        for part, lora in loras.items()
        for name, v in lora.state_dict().items()
    }


def alphas(loras: dict[str, Lora]) -> dict[str, float]:
    return {
        f"{part}.{TOWER if part == TEXT else ''}{n}": c.alpha
        for part, lora in loras.items()
        for n, c in lora.changes.items()
    }


def same(found: dict[str, Lora], expected: dict[str, Lora]) -> None:
    """Equal tensors and α."""
    assert found.keys() == expected.keys()
    for part, lora in expected.items():
        mine = found[part].state_dict()
        assert mine.keys() == lora.state_dict().keys()
        assert all(torch.equal(mine[name], value) for name, value in lora.state_dict().items())
        assert {n: (c.rank, c.alpha) for n, c in found[part].changes.items()} == {
            n: (c.rank, c.alpha) for n, c in lora.changes.items()
        }


def as_written(loras: dict[str, Lora]) -> dict[str, Lora]:
    """The same changes with α/r in B, as our files hold them."""
    loras = copy.deepcopy(loras)
    for lora in loras.values():
        for change in lora.changes.values():
            change.lora_B.weight.data *= change.alpha / change.rank  # type: ignore[operator,union-attr]
            change.alpha = float(change.rank)
    return loras
