"""Gradient checkpointing: its saving of peak memory and its cost in time, as ratios.

    python benchmarks/gradient_checkpointing.py

Peak memory is that of a fresh process above its resident set before the step; gradients are compared.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from autoencoder.config import AutoencoderConfig
from autoencoder.model import AutoencoderKL
from ldm.config import UNetConfig
from ldm.diffusion.condition import Condition
from ldm.models.unet import UNet

ROUNDS = 3


def unet() -> tuple[nn.Module, Callable[[], Tensor]]:
    """A U-Net of moderate size on 8 latents of 32×32."""
    network = UNet(UNetConfig(channels=(64, 128, 128), heads=(2, 4, 4), attention_levels=(0, 1)), 4, 4, 128)
    x, t, cond = torch.randn(8, 4, 32, 32), torch.arange(8) * 120, Condition(context=torch.randn(8, 77, 128))
    return network, lambda: network(x, t, cond).square().mean()


def autoencoder() -> tuple[nn.Module, Callable[[], Tensor]]:
    """An autoencoder of moderate size on 8 images of 64×64."""
    network = AutoencoderKL(AutoencoderConfig(channels=(32, 64, 64), groups=8))
    image = torch.randn(8, 3, 64, 64)
    return network, lambda: (network(image)[0] - image).square().mean()


CASES: dict[str, Callable[[], tuple[nn.Module, Callable[[], Tensor]]]] = {"U-Net": unet, "autoencoder": autoencoder}


def step(name: str, flag: bool) -> tuple[float, float, list[list[float]]]:
    """Run in a fresh process: peak megabytes above those before, median seconds of a step, some gradients."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    network, loss = CASES[name]()
    network.gradient_checkpointing = flag  # type: ignore[assignment]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss().backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gradients = [p.grad.flatten()[:100].tolist() for p in network.parameters() if p.grad is not None]
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        loss().backward()
        seconds.append(time.perf_counter() - start)
    return (peak - before) / 1024, statistics.median(seconds), gradients


def main() -> None:
    """Measure both networks without and with checkpointing."""
    for name in CASES:
        measured = []
        for flag in (False, True):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                measured.append(pool.apply(step, (name, flag)))
        (memory, seconds, plain), (memory_with, seconds_with, recomputed) = measured
        print(f"{name}: peak {memory:.0f} MB without, {memory_with:.0f} MB with ({memory_with / memory:.2f}×)")
        print(f"    time {seconds_with / seconds:.2f}×; gradients {'equal' if plain == recomputed else 'DIFFER'}")


if __name__ == "__main__":
    main()
