"""Placement of a network: its device, memory format, recomputed activations, compilation."""

from __future__ import annotations

import torch
from torch import nn

from ldm.config import TrainConfig


def place(network: nn.Module, config: TrainConfig, device: torch.device) -> None:
    """Put a network on ``device`` and set it up as ``train`` says: channels_last, gradient_checkpointing, compile."""
    network.to(device)
    if config.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if hasattr(network, "gradient_checkpointing"):
        network.gradient_checkpointing = config.gradient_checkpointing  # type: ignore[assignment]
    if config.compile:
        network.compile()
