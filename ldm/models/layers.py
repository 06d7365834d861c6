"""Blocks of the U-Net. Parameter names and numbers are those of diffusers' UNet2DConditionModel."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn


def timestep_embedding(t: Shaped[Tensor, " b"], width: int) -> Float[Tensor, "b width"]:
    """[cos, sin](t · 10000^(−i/half)), i < half, float32 (N3; Vaswani et al. 2017)."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000) / half))
    angles = t.float()[:, None] * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, width - 2 * half))


class TimestepMLP(nn.Module):
    """Two linear layers with SiLU between: an embedding [b, width] to [b, out]."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, out)
        self.linear_2 = nn.Linear(out, out)

    def forward(self, x: Float[Tensor, "b width"]) -> Float[Tensor, "b out"]:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResidualBlock(nn.Module):
    """GroupNorm–SiLU–conv, twice.

    The timestep embedding is added between, or scales and shifts the second norm.
    """

    def __init__(self, channels_in: int, channels_out: int, time_dim: int, groups: int, scale_shift: bool) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = nn.GroupNorm(groups, channels_in, eps=1e-5)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, 2 * channels_out if scale_shift else channels_out)
        self.norm2 = nn.GroupNorm(groups, channels_out, eps=1e-5)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x: Float[Tensor, "b i h w"], time: Float[Tensor, "b d"]) -> Float[Tensor, "b o h w"]:
        h = self.conv1(F.silu(self.norm1(x)))
        time = self.time_emb_proj(F.silu(time))[:, :, None, None]
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + time)
        h = self.conv2(F.silu(h))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself, or to a context."""

    def __init__(self, width: int, heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim or width, width, bias=False)
        self.to_v = nn.Linear(context_dim or width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(
        self, x: Float[Tensor, "b n c"], context: Float[Tensor, "b l d"] | None = None
    ) -> Float[Tensor, "b n c"]:
        context = x if context is None else context
        q, k, v = (
            p.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for p in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """Linear to twice the width, one half gating the other through GELU (Shazeer 2020)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * out)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n o"]:
        x, gate = self.proj(x).chunk(2, dim=2)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # the second is dropout in diffusers
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        for layer in self.net:
            x = layer(x)
        return x


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention (with a context), feed-forward.

    Each residual, after LayerNorm.
    """

    def __init__(self, width: int, heads: int, context_dim: int | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads)
        if context_dim is not None:
            self.norm2 = nn.LayerNorm(width)
            self.attn2 = Attention(width, heads, context_dim)
        self.has_context = context_dim is not None
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Float[Tensor, "b n c"], context: Float[Tensor, "b l d"] | None) -> Float[Tensor, "b n c"]:
        x = x + self.attn1(self.norm1(x))
        if self.has_context:
            x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, residual."""

    def __init__(
        self, channels: int, heads: int, layers: int, context_dim: int | None, groups: int, linear_projection: bool
    ) -> None:
        super().__init__()
        self.linear_projection = linear_projection
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, heads, context_dim) for _ in range(layers))
        self.proj_out = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"], context: Float[Tensor, "b l d"] | None) -> Float[Tensor, "b c h w"]:
        height, width = x.shape[2:]
        h = self.norm(x)
        if not self.linear_projection:
            h = self.proj_in(h)
        h = h.permute(0, 2, 3, 1).flatten(1, 2)  # b (h w) c
        if self.linear_projection:
            h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, context)
        if self.linear_projection:
            h = self.proj_out(h)
        h = h.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # b c h w
        if not self.linear_projection:
            h = self.proj_out(h)
        return x + h


class Downsample(nn.Module):
    """Half the side by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour enlargement to ``size``, then a convolution.

    ``size`` is twice the side, or one less where the downsampling rounded up.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
