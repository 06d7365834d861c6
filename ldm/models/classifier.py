"""A classifier of noisy samples, one network for all t: `classifier(x_t, t) -> logits`.

docs/equations.md L11.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ldm.config import ClassifierConfig
from ldm.models.layers import Downsample, ResidualBlock, TimestepMLP, timestep_embedding


class NoisyClassifier(nn.Module):
    """The down half of a U-Net, averaged over the image, and a linear layer.

    Dhariwal & Nichol 2021, section 4.1.

    Args:
        config: widths and depths.
        in_channels: c of x_t.
        classes: number of classes.
    """

    def __init__(self, config: ClassifierConfig, in_channels: int, classes: int) -> None:
        super().__init__()
        self.config, self.in_channels, self.classes = config, in_channels, classes
        width, time_dim = config.channels[0], 4 * config.channels[0]
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.time_embedding = TimestepMLP(width, time_dim)
        self.blocks = nn.ModuleList()
        for level, c in enumerate(config.channels):
            if level > 0:
                self.blocks.append(Downsample(width))
            for _ in range(config.layers_per_level):
                self.blocks.append(ResidualBlock(width, c, time_dim, config.groups, scale_shift=False))
                width = c
        self.norm_out = nn.GroupNorm(config.groups, width, eps=1e-5)
        self.linear = nn.Linear(width, classes)

    def forward(self, x_t: Float[Tensor, "b c h w"], t: Shaped[Tensor, " b"]) -> Float[Tensor, "b k"]:
        """Logits of the classes; ``t`` counts from 0."""
        time = self.time_embedding(timestep_embedding(t, self.config.channels[0]).to(self.conv_in.weight.dtype))
        h = self.conv_in(x_t)
        for block in self.blocks:
            h = block(h, time) if isinstance(block, ResidualBlock) else block(h)
        return self.linear(F.silu(self.norm_out(h)).mean((2, 3)))
