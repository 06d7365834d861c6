"""Precision, which the device must support, and the settings of torch's backends."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator

from ldm.config import ConfigError, TrainConfig


def accelerator_of(mixed_precision: str) -> Accelerator:
    """Make accelerate's Accelerator. Raises ConfigError for a precision that the device does not support.

    The first call fixes the precision of the process. It is cheap, so a command calls it before anything slow.
    """
    try:
        accelerator = Accelerator(mixed_precision=mixed_precision)
    except ValueError as error:
        raise ConfigError(f"train.mixed_precision {mixed_precision}: {' '.join(str(error).split())}") from None
    if mixed_precision != "no" and not accelerator.native_amp:  # accelerate would compute in float32
        raise ConfigError(
            f"train.mixed_precision {mixed_precision} is not supported on {accelerator.device}: use no or bf16"
        )
    return accelerator


def autocast(mixed_precision: str, device: torch.device) -> torch.autocast:
    """Precision of a frozen network in a training step; the trained ones get theirs from accelerate."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def set_backends(config: TrainConfig) -> None:
    """Configure torch for speed, or for reproducible numbers if ``train.deterministic`` is set."""
    torch.set_flush_denormal(True)  # denormals make CPU convolutions many times slower
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses to be deterministic
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    elif torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
