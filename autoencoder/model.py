"""The KL autoencoder of latent diffusion (Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from autoencoder.blocks import EPS, DownLevel, MidBlock, ResBlock, UpLevel
from autoencoder.config import AutoencoderConfig
from autoencoder.posterior import DiagonalGaussian


class Encoder(nn.Module):
    """Image to unnormalised moments: levels of falling resolution, then the mid block."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels = config.channels
        self.conv_in = nn.Conv2d(config.image_channels, channels[0], 3, padding=1)
        inputs = channels[:1] + channels[:-1]
        self.down_blocks = nn.ModuleList(
            [DownLevel(a, b, config, level) for level, (a, b) in enumerate(zip(inputs, channels, strict=True))]
        )
        self.mid_block = MidBlock(channels[-1], config)
        self.conv_norm_out = nn.GroupNorm(config.groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, image: Float[Tensor, "b C H W"], checkpointing: bool = False) -> Float[Tensor, "b c2 h w"]:
        """Map [b, C, H, W] to [b, 2c, H/f, W/f]."""
        x = self.conv_in(image)
        for level in self.down_blocks:
            x = level(x, checkpointing)
        x = self.mid_block(x, checkpointing)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latent to image: the mid block, then levels of residual blocks at rising resolution."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels = config.channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], config)
        inputs = channels[:1] + channels[:-1]
        self.up_blocks = nn.ModuleList(
            [
                UpLevel(a, b, config, len(channels) - 1 - i)
                for i, (a, b) in enumerate(zip(inputs, channels, strict=True))
            ]
        )
        self.conv_norm_out = nn.GroupNorm(config.groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.image_channels, 3, padding=1)

    def forward(self, latent: Float[Tensor, "b c h w"], checkpointing: bool = False) -> Float[Tensor, "b C H W"]:
        """Map [b, c, h, w] to [b, C, f·h, f·w]."""
        x = self.mid_block(self.conv_in(latent), checkpointing)
        for level in self.up_blocks:
            x = level(x, checkpointing)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Encoder, decoder and the two 1×1 convolutions between them that carry the latent statistics.

    Parameter names, shapes and values of the forward pass are those of diffusers' AutoencoderKL.
    ``gradient_checkpointing`` trades a second forward pass of the residual blocks for their memory.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self._start_plain()

    @torch.no_grad()
    def _start_plain(self) -> None:
        """Start near a linear map (residual blocks add little), with posterior deviations near e⁻³.

        With PyTorch's own initial values the posterior is N(≈0, 1), and the first hundreds of
        updates are spent on making the signal exceed that noise.
        """
        for module in self.modules():
            if isinstance(module, ResBlock):
                module.conv2.weight *= 0.1
        _bias(self.quant_conv)[self.config.latent_channels :] -= 6.0

    @torch.no_grad()
    def whiten(self, latent: Float[Tensor, "b c h w"]) -> None:
        """Before training: give the posterior means zero mean and unit covariance over channels.

        ``latent`` holds the means that encode returns for some training images; only the encoder's
        1×1 convolution changes, in place. At random weights the channels are nearly copies of each
        other, and training leaves them so: some of the latent's few channels then carry next to
        nothing. Computed in float64.
        """
        c = self.config.latent_channels
        values = _float64(latent.transpose(0, 1).flatten(1))
        variances, axes = torch.linalg.eigh(torch.cov(values).view(c, c))
        floor = max(float(variances[-1]) * 1e-6, 1e-12)
        self._map_mean((axes / variances.clamp(min=floor).sqrt()).T, values.mean(1))

    def _map_mean(self, matrix: Float[Tensor, "c c"], mean: Float[Tensor, " c"]) -> None:
        """Let encode return matrix · (μ − mean) in place of the posterior mean μ.

        Both are float64 on the CPU.
        """
        c = self.config.latent_channels
        weight, bias = (_float64(p) for p in (self.quant_conv.weight, _bias(self.quant_conv)))
        weight[:c, :, 0, 0] = matrix @ weight[:c, :, 0, 0]
        bias[:c] = matrix @ (bias[:c] - mean)
        self.quant_conv.weight.copy_(weight)
        _bias(self.quant_conv).copy_(bias)

    @property
    def last_layer(self) -> Tensor:
        """The weight at which the adaptive adversarial weight compares gradients."""
        return self.decoder.conv_out.weight

    def encode(self, image: Float[Tensor, "b C H W"]) -> DiagonalGaussian:
        """Return the posterior over latents [b, c, H/f, W/f] of images in [−1, 1].

        Raises ValueError if a side is not a multiple of the factor f or the channels differ from
        the config's.
        """
        factor = self.config.factor
        if image.shape[1] != self.config.image_channels:
            raise ValueError(f"the autoencoder takes {self.config.image_channels} image channels, got {image.shape[1]}")
        for name, side in zip(("height", "width"), image.shape[2:], strict=True):
            if side == 0 or side % factor:
                raise ValueError(f"image {name} {side} is not a multiple of the autoencoder's factor {factor}")
        return DiagonalGaussian.from_moments(self.quant_conv(self.encoder(image, self._recompute)))

    def decode(self, latent: Float[Tensor, "b c h w"]) -> Float[Tensor, "b C H W"]:
        """Return images [b, C, f·h, f·w], about in [−1, 1], not clamped.

        Raises ValueError if the latent's channels differ from the config's.
        """
        if latent.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"the autoencoder takes {self.config.latent_channels} latent channels, got {latent.shape[1]}"
            )
        latent = latent.to(self.post_quant_conv.weight.dtype)  # a half-precision model still has a float32 posterior
        return self.decoder(self.post_quant_conv(latent), self._recompute)

    def forward(
        self, image: Float[Tensor, "b C H W"], noise: Float[Tensor, "b c h w"] | None = None
    ) -> tuple[Float[Tensor, "b C H W"], DiagonalGaussian]:
        """Return the reconstruction of images and their posterior.

        ``noise`` is standard normal, shaped like the latent; without it the posterior mean is
        decoded.
        """
        posterior = self.encode(image)
        return self.decode(posterior.mean if noise is None else posterior.sample(noise)), posterior

    @property
    def _recompute(self) -> bool:
        return self.gradient_checkpointing and torch.is_grad_enabled()

    @torch.no_grad()
    def fold_statistics(self, mean: Float[Tensor, " c"], std: Float[Tensor, " c"]) -> None:
        """Fold the latents' per-channel mean m and deviation s into the 1×1 convolutions, in place.

        Afterwards encode returns (mean − m)/s and logvar − 2 log s, and decode(z) is the former
        decode(z·s + m): latents have zero mean and unit variance when s² = Var(mean) + E[posterior
        variance], and decode(encode(x)) is unchanged to rounding. The clamp of the log-variance to
        [−30, 20] is not folded: an element outside it before or after keeps its mean and gets the
        limit as its log-variance. Computed in float64, then cast. Raises ValueError for wrong
        shapes, std ≤ 0 or non-finite values.
        """
        c = self.config.latent_channels
        if mean.shape != (c,) or std.shape != (c,):
            raise ValueError(
                f"latent mean and std must have shape ({c},), got {tuple(mean.shape)} and {tuple(std.shape)}"
            )
        m, s = _float64(mean), _float64(std)
        if not (m.isfinite().all() and s.isfinite().all() and (s > 0).all()):
            raise ValueError(
                f"latent mean must be finite and std finite and positive, got {m.tolist()} and {s.tolist()}"
            )
        self._map_mean(torch.diag(1.0 / s), m)
        bias = _float64(_bias(self.quant_conv))
        bias[c:] -= 2.0 * s.log()
        _bias(self.quant_conv).copy_(bias)

        weight, bias = (_float64(p) for p in (self.post_quant_conv.weight, _bias(self.post_quant_conv)))
        self.post_quant_conv.weight.copy_(weight * s.view(1, c, 1, 1))
        _bias(self.post_quant_conv).copy_(bias + weight[:, :, 0, 0] @ m)


def _float64(tensor: Tensor) -> Tensor:
    # on the CPU, since some devices have no float64; a copy, whatever the dtype was
    return tensor.detach().cpu().double().clone()


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None  # every convolution here has one, which the type of nn.Conv2d leaves open
    return conv.bias
