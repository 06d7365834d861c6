"""Encoding and decoding strip by strip: the whole result, to rounding, in a fraction of the memory.

Tiles that are decoded alone differ from the whole picture, since each has statistics of its own in
every GroupNorm. Here a strip of rows is computed with the rows around it that its convolutions
reach, and each GroupNorm with the statistics of all strips, which takes a pass of its own.
Attention, which sees every position, is computed whole. What is kept whole is the input of each
residual block, updated in place, and never an upsampled copy of it. The price is time: a convolution
before a GroupNorm is computed twice, one that doubles the side three times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from autoencoder.blocks import DownLevel, Downsample, ResBlock, UpLevel, Upsample
from autoencoder.model import AutoencoderKL
from autoencoder.posterior import DiagonalGaussian

REACH = 2  # rows that a residual block sees on either side: its two convolutions


@torch.no_grad()
def decode_in_strips(
    autoencoder: AutoencoderKL, latent: Float[Tensor, "b c h w"], rows: int
) -> Float[Tensor, "b C H W"]:
    """``autoencoder.decode(latent)``, computing ``rows`` rows at a time. No gradient is kept."""
    decoder = autoencoder.decoder
    latent = latent.to(autoencoder.post_quant_conv.weight.dtype)
    x = decoder.mid_block(decoder.conv_in(autoencoder.post_quant_conv(latent)))
    source = _Rows.of(x)
    for level in decoder.up_blocks:
        assert isinstance(level, UpLevel)
        source = _blocks(source, level, rows)
        for up in level.upsamplers:
            assert isinstance(up, Upsample)
            source = source.doubled().convolved(up.conv)
    return source.normed(decoder.conv_norm_out, rows).convolved(decoder.conv_out).whole(rows)


@torch.no_grad()
def encode_in_strips(autoencoder: AutoencoderKL, image: Float[Tensor, "b C H W"], rows: int) -> DiagonalGaussian:
    """``autoencoder.encode(image)``, computing ``rows`` rows at a time. No gradient is kept."""
    encoder = autoencoder.encoder
    source = _Rows.of(image).convolved(encoder.conv_in)
    for level in encoder.down_blocks:
        assert isinstance(level, DownLevel)
        source = _blocks(source, level, rows)
        for down in level.downsamplers:
            assert isinstance(down, Downsample)
            source = source.halved(down.conv)
    x = encoder.mid_block(source.whole(rows))
    x = encoder.conv_out(F.silu(encoder.conv_norm_out(x)))
    return DiagonalGaussian.from_moments(autoencoder.quant_conv(x))


@dataclass(frozen=True)
class _Rows:
    """A tensor [b, c, h, w] whose rows are computed when they are read.

    ``read(first, end)``: these rows. ``kept``: the tensor itself where it exists.
    """

    height: int
    read: Callable[[int, int], Tensor]
    kept: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor) -> _Rows:
        return cls(x.shape[2], lambda first, end: x[:, :, first:end], x)

    def strips(self, rows: int) -> Iterator[tuple[int, int]]:
        return ((first, min(first + rows, self.height)) for first in range(0, self.height, rows))

    def whole(self, rows: int) -> Tensor:
        """The tensor."""
        if self.kept is not None:
            return self.kept
        out: Tensor | None = None
        for first, end in self.strips(rows):
            strip = self.read(first, end)
            if out is None:
                out = strip.new_empty((*strip.shape[:2], self.height, strip.shape[3]))
            out[:, :, first:end] = strip
        assert out is not None
        return out

    def padded(self, first: int, end: int) -> Tensor:
        """Rows that may lie outside, where they are 0."""
        inside = self.read(max(first, 0), min(end, self.height))
        return F.pad(inside, (0, 0, max(-first, 0), max(end - self.height, 0)))

    def convolved(self, conv: nn.Conv2d) -> _Rows:
        """After a 3×3 convolution."""

        def read(first: int, end: int) -> Tensor:
            return F.conv2d(self.padded(first - 1, end + 1), conv.weight, conv.bias, padding=(0, 1))

        return _Rows(self.height, read)

    def doubled(self) -> _Rows:
        """Each position four times."""

        def read(first: int, end: int) -> Tensor:
            x = F.interpolate(self.read(first // 2, (end + 1) // 2), scale_factor=2.0, mode="nearest")
            return x[:, :, first % 2 : first % 2 + end - first]

        return _Rows(2 * self.height, read)

    def halved(self, conv: nn.Conv2d) -> _Rows:
        """After a 3×3 convolution of stride 2, padded right and below."""

        def read(first: int, end: int) -> Tensor:
            return F.conv2d(F.pad(self.padded(2 * first, 2 * end + 1), (0, 1)), conv.weight, conv.bias, stride=2)

        return _Rows(self.height // 2, read)

    def normed(self, norm: nn.GroupNorm, rows: int) -> _Rows:
        """After GroupNorm, with the statistics of all rows in float64, and SiLU."""
        count, first_moment = 0, torch.zeros((), dtype=torch.float64)
        second_moment = first_moment
        for first, end in self.strips(rows):
            x = self.read(first, end).unflatten(1, (norm.num_groups, -1)).flatten(2).double()
            count, first_moment = count + x.shape[2], first_moment + x.sum(2)
            second_moment = second_moment + x.square().sum(2)
        mean = first_moment / count  # [b, groups]
        deviation = (second_moment / count - mean.square()).clamp(min=0).add(norm.eps).sqrt()
        wide = norm.num_channels // norm.num_groups
        scale = norm.weight.double() / deviation.repeat_interleave(wide, 1)
        shift = norm.bias.double() - mean.repeat_interleave(wide, 1) * scale

        def read(first: int, end: int) -> Tensor:
            x = self.read(first, end)
            return F.silu(x * scale[..., None, None].to(x.dtype) + shift[..., None, None].to(x.dtype))

        return _Rows(self.height, read)


def _blocks(source: _Rows, level: DownLevel | UpLevel, rows: int) -> _Rows:
    """After the residual blocks of a level, with their attention."""
    for i, block in enumerate(level.resnets):
        assert isinstance(block, ResBlock)
        x = _residual(source, block, rows)
        source = _Rows.of(level.attentions[i](x) if len(level.attentions) else x)
    return source


def _residual(source: _Rows, block: ResBlock, rows: int) -> Tensor:
    """The output of a residual block, in the place of its input where that is kept and as large."""
    own = source.kept if block.conv_shortcut is None else None
    old = _Overwritten(own) if own is not None else None
    source = _Rows(source.height, old.read) if old is not None else source
    h = source.normed(block.norm1, rows).convolved(block.conv1)
    h = h.normed(block.norm2, rows).convolved(block.conv2)

    def read(first: int, end: int) -> Tensor:
        x = source.read(first, end)
        return h.read(first, end) + (x if block.conv_shortcut is None else block.conv_shortcut(x))

    if old is None:
        return _Rows(source.height, read).whole(rows)
    for first, end in source.strips(rows):
        old.write(first, end, read(first, end))
    return old.x


class _Overwritten:
    """A tensor that is replaced from its first row on, while the rows that the next strip reaches are still read."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.done, self.behind = x, 0, x[:, :, :0]

    def read(self, first: int, end: int) -> Tensor:
        """Rows as they were; of those that were replaced the last REACH."""
        if first >= self.done:
            return self.x[:, :, first:end]
        start = self.done - self.behind.shape[2]
        return torch.cat([self.behind[:, :, first - start : end - start], self.x[:, :, self.done : end]], dim=2)

    def write(self, first: int, end: int, strip: Tensor) -> None:
        """Replace the rows that follow those replaced so far."""
        kept = self.read(max(0, end - REACH), end).clone()
        self.x[:, :, first:end] = strip
        self.done, self.behind = end, kept
