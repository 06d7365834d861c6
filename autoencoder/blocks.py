"""The parts of the autoencoder, with the parameter names of diffusers' AutoencoderKL."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autoencoder.config import AutoencoderConfig

EPS = 1e-6  # of every GroupNorm here; the U-Net's differs


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1×1 convolution on x if channels change."""

    def __init__(self, c_in: int, c_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, EPS)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, EPS)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Float[Tensor, "b c h w"], checkpointing: bool = False) -> Float[Tensor, "b d h w"]:
        """Map [b, c_in, h, w] to [b, c_out, h, w].

        With checkpointing the backward pass recomputes the block.
        """
        if checkpointing:  # no randomness inside, so no generator state to keep
            return checkpoint(self._residual, x, use_reentrant=False, preserve_rng_state=False)
        return self._residual(x)

    def _residual(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Self-attention with one head over all positions, added to its input."""

    def __init__(self, c: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, EPS)
        self.to_q = nn.Linear(c, c)
        self.to_k = nn.Linear(c, c)
        self.to_v = nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])  # a list because the checkpoints name it to_out.0

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Map [b, c, h, w] to [b, c, h, w]; memory is linear in h·w where a fused kernel exists."""
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # [b, hw, c]
        q, k, v = (layer(h).unsqueeze(1) for layer in (self.to_q, self.to_k, self.to_v))  # [b, 1, hw, c]
        h = self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + h.transpose(1, 2).reshape(x.shape)


class MidBlock(nn.Module):
    """Residual block, attention (or none), residual block at the lowest resolution."""

    def __init__(self, c: int, config: AutoencoderConfig) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(c, config.groups)] if config.mid_attention else [])
        self.resnets = nn.ModuleList([ResBlock(c, c, config.groups) for _ in range(2)])

    def forward(self, x: Float[Tensor, "b c h w"], checkpointing: bool = False) -> Float[Tensor, "b c h w"]:
        """Map [b, c, h, w] to [b, c, h, w]."""
        x = self.resnets[0](x, checkpointing)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x, checkpointing)


class Downsample(nn.Module):
    """Halve the side: pad right and bottom by one, then a 3×3 convolution of stride 2."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c h w"]:
        """Map [b, c, H, W] to [b, c, H/2, W/2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the side: nearest neighbour, then a 3×3 convolution."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c H W"]:
        """Map [b, c, h, w] to [b, c, 2h, 2w]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def res_blocks(c_in: int, c_out: int, count: int, groups: int) -> nn.ModuleList:
    """``count`` residual blocks, the first of which changes the channels."""
    return nn.ModuleList([ResBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(count)])


def attention_blocks(c: int, count: int, groups: int, attends: bool) -> nn.ModuleList:
    """One attention block for each of ``count`` residual blocks if the level attends, else none."""
    return nn.ModuleList([Attention(c, groups) for _ in range(count)] if attends else [])


class DownLevel(nn.Module):
    """One encoder level: residual blocks, each with attention if it attends, and halving but at the last."""

    def __init__(self, c_in: int, c_out: int, config: AutoencoderConfig, level: int) -> None:
        super().__init__()
        count = config.layers_per_level
        self.attentions = attention_blocks(c_out, count, config.groups, level in config.attention_levels)
        self.resnets = res_blocks(c_in, c_out, count, config.groups)
        self.downsamplers = nn.ModuleList([] if level == len(config.channels) - 1 else [Downsample(c_out)])

    def forward(self, x: Float[Tensor, "b c H W"], checkpointing: bool = False) -> Float[Tensor, "b d h w"]:
        """Map [b, c_in, H, W] to [b, c_out, H/2, W/2], or to [b, c_out, H, W] on the last level."""
        for i, block in enumerate(self.resnets):
            x = block(x, checkpointing)
            x = self.attentions[i](x) if len(self.attentions) else x
        for down in self.downsamplers:
            x = down(x)
        return x


class UpLevel(nn.Module):
    """One decoder level: residual blocks, each with attention if it attends, and doubling.

    It has one block more than the encoder's; full resolution is not doubled.
    """

    def __init__(self, c_in: int, c_out: int, config: AutoencoderConfig, level: int) -> None:
        super().__init__()
        count = config.layers_per_level + 1
        self.attentions = attention_blocks(c_out, count, config.groups, level in config.attention_levels)
        self.resnets = res_blocks(c_in, c_out, count, config.groups)
        self.upsamplers = nn.ModuleList([] if level == 0 else [Upsample(c_out)])

    def forward(self, x: Float[Tensor, "b c h w"], checkpointing: bool = False) -> Float[Tensor, "b d H W"]:
        """Map [b, c_in, h, w] to [b, c_out, 2h, 2w], or to [b, c_out, h, w] at full resolution."""
        for i, block in enumerate(self.resnets):
            x = block(x, checkpointing)
            x = self.attentions[i](x) if len(self.attentions) else x
        for up in self.upsamplers:
            x = up(x)
        return x
