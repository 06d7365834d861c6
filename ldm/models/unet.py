"""The conditional U-Net (docs/equations.md N1): `model(x_t, t, cond) -> prediction`.

Parameter names and shapes are those of diffusers' UNet2DConditionModel, so that one folder serves
both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.config import UNetConfig
from ldm.diffusion.condition import NO_CONDITION, Condition
from ldm.models.layers import Downsample, ResidualBlock, SpatialTransformer, TimestepMLP, Upsample, timestep_embedding


@dataclass(frozen=True)
class NetworkSpec:
    """Everything that fixes the parameters of a UNet: its arguments, by name.

    Attributes:
        config: widths, depths and attention.
        in_channels: channels of x_t, without ``config.concat_channels``.
        out_channels: channels of the prediction: those of x_t, or twice as many where the variance
            is learned.
        context_dim: width of the cross-attended context; None: no cross-attention.
    """

    config: UNetConfig
    in_channels: int
    out_channels: int
    context_dim: int | None = None

    @property
    def learned_variance(self) -> bool:
        """True if the second half of the output channels is the reverse variance."""
        return self.out_channels == 2 * self.in_channels

    @property
    def fills(self) -> bool:
        """True if the further channels are a mask and a masked image, as of a model that fills parts of images."""
        return self.config.concat_channels == self.in_channels + 1

    def make(self) -> UNet:
        """A UNet with fresh weights."""
        return UNet(self.config, self.in_channels, self.out_channels, self.context_dim)


class Stage(nn.Module):
    """One level: residual blocks, each with a transformer if the level attends, and a resize."""

    def __init__(self, resnets: list[ResidualBlock], attentions: list[SpatialTransformer]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions) if attentions else None
        self.downsamplers: nn.ModuleList | None = None
        self.upsamplers: nn.ModuleList | None = None


class UNet(nn.Module):
    """Predicts ε, x_0 or v from a noisy sample, its timestep and a condition.

    Args:
        config: widths, depths and attention.
        in_channels: c of x_t; ``config.concat_channels`` come on top.
        out_channels: c of the prediction; None: as many as come in.
        context_dim: width of the cross-attended context; None: no cross-attention.
    """

    def __init__(
        self, config: UNetConfig, in_channels: int, out_channels: int | None = None, context_dim: int | None = None
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self.config, self.context_dim = config, context_dim
        self.in_channels, self.out_channels = in_channels, out_channels
        self.gradient_checkpointing = False
        channels, time_dim, levels = config.channels, config.time_dim, len(config.channels)
        heads = config.heads if len(config.heads) > 1 else config.heads * levels

        def resnet(i: int, o: int) -> ResidualBlock:
            return ResidualBlock(i, o, time_dim, config.groups, config.scale_shift)

        def transformer(level: int) -> SpatialTransformer:
            return SpatialTransformer(
                channels[level],
                heads[level],
                config.transformer_layers,
                context_dim,
                config.groups,
                config.linear_projection,
            )

        self.conv_in = nn.Conv2d(in_channels + config.concat_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepMLP(channels[0], time_dim)
        self.class_embedding = class_embedding(config)

        self.down_blocks = nn.ModuleList()
        skips = [channels[0]]  # channels of each skip connection
        for level, c in enumerate(channels):
            resnets = [resnet(skips[-1] if i == 0 else c, c) for i in range(config.layers_per_level)]
            attends = level in config.attending
            stage = Stage(resnets, [transformer(level) for _ in resnets] if attends else [])
            skips += [c] * config.layers_per_level
            if level < levels - 1:
                stage.downsamplers = nn.ModuleList([Downsample(c)])
                skips.append(c)
            self.down_blocks.append(stage)

        self.mid_block = Stage(
            [resnet(channels[-1], channels[-1]), resnet(channels[-1], channels[-1])], [transformer(levels - 1)]
        )

        self.up_blocks = nn.ModuleList()
        width = channels[-1]
        for level in reversed(range(levels)):
            resnets = []
            for _ in range(config.layers_per_level + 1):
                resnets.append(resnet(width + skips.pop(), channels[level]))
                width = channels[level]
            stage = Stage(resnets, [transformer(level) for _ in resnets] if level in config.attending else [])
            if level > 0:
                stage.upsamplers = nn.ModuleList([Upsample(width)])
            self.up_blocks.append(stage)

        self.conv_norm_out = nn.GroupNorm(config.groups, width, eps=1e-5)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    @property
    def spec(self) -> NetworkSpec:
        """The arguments that this network was built with."""
        return NetworkSpec(self.config, self.in_channels, self.out_channels, self.context_dim)

    def forward(
        self, x_t: Float[Tensor, "b c h w"], t: Shaped[Tensor, " b"], cond: Condition = NO_CONDITION
    ) -> Float[Tensor, "b o h w"]:
        """The prediction for each sample; ``t`` counts from 0.

        Raises ValueError if a condition is missing or not expected.
        """
        self._check(cond)
        time = self._embed(t, cond).to(x_t.dtype)
        context = cond.context
        h = self.conv_in(x_t if cond.concat is None else torch.cat([x_t, cond.concat], dim=1))
        skips = [h]
        for stage in cast("Iterable[Stage]", self.down_blocks):
            for i, resnet in enumerate(stage.resnets):
                h = self._run(resnet, h, time)
                if stage.attentions is not None:
                    h = self._run(stage.attentions[i], h, context)
                skips.append(h)
            if stage.downsamplers is not None:
                h = stage.downsamplers[0](h)
                skips.append(h)

        h = self._run(self.mid_block.resnets[0], h, time)
        h = self._run(self.mid_block.attentions[0], h, context)  # type: ignore[index]
        h = self._run(self.mid_block.resnets[1], h, time)

        if cond.control is not None:
            if len(cond.control) != len(skips) + 1:
                raise ValueError(
                    f"control holds {len(cond.control)} residuals, not {len(skips) + 1}: "
                    "one for each skip connection and one for the middle"
                )
            *residuals, middle = cond.control
            skips = [skip + r for skip, r in zip(skips, residuals, strict=True)]
            h = h + middle

        for stage in cast("Iterable[Stage]", self.up_blocks):
            for i, resnet in enumerate(stage.resnets):
                h = self._run(resnet, torch.cat([h, skips.pop()], dim=1), time)
                if stage.attentions is not None:
                    h = self._run(stage.attentions[i], h, context)
            if stage.upsamplers is not None:
                h = stage.upsamplers[0](h, skips[-1].shape[2:])
        return self.conv_out(F.silu(self.conv_norm_out(h)))

    def _embed(self, t: Tensor, cond: Condition) -> Tensor:
        time = self.time_embedding(self._sinusoid(t))
        if self.class_embedding is None:
            return time
        given = cond.vector if cond.labels is None else cond.labels
        if cond.labels is not None and self.config.sinusoidal_labels:
            given = self._sinusoid(cond.labels)
        return time + self.class_embedding(given)

    def _sinusoid(self, t: Tensor) -> Tensor:
        return timestep_embedding(t, self.config.channels[0]).to(self.conv_in.weight.dtype)

    def _run(self, block: Callable[..., Tensor], *inputs: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _check(self, cond: Condition) -> None:
        for name, given, wanted in (
            ("context", cond.context is not None, self.context_dim is not None),
            ("vector", cond.vector is not None, self.config.vector_dim is not None),
            ("label", cond.labels is not None, self.config.num_labels is not None or self.config.sinusoidal_labels),
            ("concat", cond.concat is not None, self.config.concat_channels > 0),
        ):
            if given != wanted:
                raise ValueError(
                    f"this U-Net takes {'a' if wanted else 'no'} {name} condition, "
                    f"and {'one' if given else 'none'} was given"
                )


def class_embedding(config: UNetConfig) -> nn.Module | None:
    """The module that embeds a vector or label condition, which is added to the timestep embedding.

    None without such a condition.
    """
    if config.num_labels is not None:
        return nn.Embedding(config.num_labels, config.time_dim)
    if config.sinusoidal_labels:
        return TimestepMLP(config.channels[0], config.time_dim)
    if config.vector_dim is None:
        return None
    if config.vector_map == "identity":
        return nn.Identity()
    kind = nn.Linear if config.vector_map == "linear" else TimestepMLP
    return kind(config.vector_dim, config.time_dim)
