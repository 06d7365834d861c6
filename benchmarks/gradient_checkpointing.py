"""What gradient checkpointing saves and costs: bytes kept for the backward pass, and time, as ratios side by side.

    python benchmarks/gradient_checkpointing.py

Bytes are counted where autograd saves tensors, so the figure is the same on every device; gradients are compared.
"""

from __future__ import annotations

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

ROUNDS = 5


def kept_bytes(loss: Callable[[], Tensor]) -> int:
    """Bytes of distinct storages that autograd keeps during the forward pass, parameters included."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss().backward()
    return sum(seen.values())


def measure(name: str, network: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Print the ratios with and without, timed in turn."""
    figures: dict[bool, int] = {}
    gradients: dict[bool, list[Tensor]] = {}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for flag in (False, True):
        network.gradient_checkpointing = flag  # type: ignore[assignment]
        network.zero_grad()
        figures[flag] = kept_bytes(loss)
        gradients[flag] = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    for _ in range(ROUNDS):
        for flag in (False, True):
            network.gradient_checkpointing = flag  # type: ignore[assignment]
            start = time.perf_counter()
            loss().backward()
            seconds[flag].append(time.perf_counter() - start)
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    kept = {flag: (total - weights) / 1e6 for flag, total in figures.items()}
    worst = max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-12)) for a, b in zip(gradients[False], gradients[True], strict=True))
    slower = statistics.median(b / a for a, b in zip(seconds[False], seconds[True], strict=True))
    print(f"{name}: {kept[False]:.1f} MB kept without, {kept[True]:.1f} MB with ({kept[True] / kept[False]:.2f}×)")
    print(f"    time {slower:.2f}×; gradients differ by {worst:.1e} of the largest")


def main() -> None:
    """The U-Net and the autoencoder at moderate sizes."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig(channels=(64, 128, 128), heads=(2, 4, 4), attention_levels=(0, 1), layers_per_level=2), 4, 4, 128)
    x, t, cond = torch.randn(4, 4, 32, 32), torch.tensor([1, 200, 500, 900]), Condition(context=torch.randn(4, 77, 128))
    measure("U-Net, 4 × 32×32 latents", unet, lambda: unet(x, t, cond).square().mean())
    model = AutoencoderKL(AutoencoderConfig(channels=(32, 64, 64), groups=8, layers_per_level=2))
    image = torch.randn(4, 3, 64, 64)
    measure("autoencoder, 4 × 64×64", model, lambda: (model(image)[0] - image).square().mean())


if __name__ == "__main__":
    main()
