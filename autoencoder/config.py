"""Every setting of the autoencoder and of its loss, with its range. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type, out of range, or at odds with another one."""

    exit_code = 2


# Upper limits of sizes and counts: beyond any use, and below what would hang, overflow or exhaust the machine.
MOST_CHANNELS, MOST_LAYERS, MOST_SIDE, MOST_UPDATES = 16_384, 100, 8192, 10**9


def shown(value: Any) -> str:
    """A value as an error quotes it, shortened: a number may have thousands of digits."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python refuses to write out such a number
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


def at_least(config: Any, low: float, *names: str) -> None:
    """Require each named field to be a finite number ≥ ``low`` (``None`` passes).

    For counts use ``between``.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not (value >= low and value < math.inf):
            raise ConfigError(f"{name} must be at least {low}, got {shown(value)}")


def between(config: Any, low: float, high: float, *names: str) -> None:
    """Require each named field to lie in [low, high] (``None`` passes)."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise ConfigError(f"{name} must lie between {low} and {high}, got {shown(value)}")


def one_of(config: Any, choices: tuple[str, ...], *names: str) -> None:
    """Require each named field to be one of ``choices``."""
    for name in names:
        value = getattr(config, name)
        if value not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {shown(value)}")


def divisible(channels: tuple[int, ...], groups: int) -> None:
    """Require one to ten levels, whose channels are multiples of the GroupNorm groups, not too many."""
    if not 1 <= len(channels) <= 10:
        raise ConfigError(f"channels must name at least one level and at most 10, got {len(channels)}")
    for c in channels:
        if not 1 <= c <= MOST_CHANNELS or c % groups:
            raise ConfigError(
                f"channels {shown(c)} is not a positive multiple of groups {groups}, at most {MOST_CHANNELS}"
            )


@dataclass(frozen=True)
class AutoencoderConfig:
    """The KL autoencoder, expressible as diffusers' AutoencoderKL.

    The reduction factor is ``2 ** (len(channels) - 1)``: each level but the last halves the side.
    """

    image_channels: int = 3
    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_level: int = 2  # residual blocks per level of the encoder; the decoder has one more
    groups: int = 32  # GroupNorm groups
    mid_attention: bool = True  # one self-attention block at the lowest resolution
    attention_levels: tuple[int, ...] = ()  # levels with self-attention after each residual block (0: full resolution)

    def __post_init__(self) -> None:
        between(self, 1, MOST_CHANNELS, "image_channels", "latent_channels", "groups")
        between(self, 1, MOST_LAYERS, "layers_per_level")
        divisible(self.channels, self.groups)
        if not 2 <= self.factor <= 32:
            raise ConfigError(
                f"channels has {len(self.channels)} levels, so the factor is {self.factor}: "
                "use 2 to 6 levels (factor 2 to 32)"
            )
        for level in self.attention_levels:
            if not 0 <= level < len(self.channels):
                last = len(self.channels) - 1
                raise ConfigError(
                    f"attention_levels: {shown(level)} is not a level of {len(self.channels)} (0 to {last})"
                )

    @property
    def factor(self) -> int:
        """Image side divided by latent side."""
        return 2 ** (len(self.channels) - 1)


PERCEPTUAL_NETS = ("alex", "vgg")


@dataclass(frozen=True)
class LossConfig:
    """Weights of the stage-1 loss (docs/equations.md L8). Every term is a MEAN per element.

    A published weight that goes with sums per image (1e-6 in latent diffusion) converts by the
    ratio of latent to image elements, c·h·w / (C·H·W): 1e-6 at factor 8 with 4 latent channels is
    2.1e-8 here.
    """

    l1: float = 1.0
    mse: float = 0.0  # squared error, for data without fine detail; latent diffusion published none
    lpips: float = 0.0
    lpips_net: str = "vgg"
    lpips_weights: str = "torchvision"  # a file; `torchvision`: its download cache; `random`: untrained, for tests
    kl: float = 2.1e-8
    gan: float = 0.0  # factor on top of the adaptive weight; 0: no discriminator
    gan_start: int = 0  # generator updates before the discriminator joins
    gan_ramp: int = 1000  # updates over which its weight then rises from 0 to `gan`
    disc_channels: int = 64
    disc_layers: int = 3
    disc_lr: float | None = None  # null: the autoencoder's

    def __post_init__(self) -> None:
        at_least(self, 0.0, "l1", "mse", "lpips", "kl", "gan", "disc_lr")
        between(self, 0, MOST_UPDATES, "gan_start", "gan_ramp")
        between(self, 1, MOST_CHANNELS, "disc_channels")
        between(self, 1, 10, "disc_layers")
        one_of(self, PERCEPTUAL_NETS, "lpips_net")
        if self.l1 == self.mse == self.lpips == 0.0:
            raise ConfigError("l1, mse and lpips are all 0: nothing would be reconstructed")
