"""The patch discriminator of the adversarial loss (Isola et al. 2017), without batch statistics."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

KERNEL = 4
SLOPE = 0.2
MAX_WIDENING = 8  # channels stop growing at this multiple of the first layer's


class PatchDiscriminator(nn.Module):
    """4×4 convolutions that give each patch a logit, positive for real.

    ``layers`` convolutions of stride 2 (the first from ``channels``, doubling up to 8 ×), one of
    stride 1, then the logits. GroupNorm over each image replaces BatchNorm, and there is no
    spectral norm by power iteration: a logit depends on its own image only, so the loss is the same
    however a batch is split.
    """

    def __init__(self, image_channels: int, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.image_channels = image_channels
        self.layers = layers
        body: list[nn.Module] = [nn.Conv2d(image_channels, channels, KERNEL, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        c_in = channels
        for i in range(1, layers + 1):
            c_out = channels * min(2**i, MAX_WIDENING)
            stride = 2 if i < layers else 1
            # one group: the norm removes an image's overall scale and keeps the ratios between channels
            body += [
                nn.Conv2d(c_in, c_out, KERNEL, stride, padding=1, bias=False),
                nn.GroupNorm(1, c_out),
                nn.LeakyReLU(SLOPE),
            ]
            c_in = c_out
        body.append(nn.Conv2d(c_in, 1, KERNEL, stride=1, padding=1))
        self.body = nn.Sequential(*body)
        for module in self.body:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def patches(self, side: int) -> int:
        """Logits along an image side of ``side`` pixels; 0 if it is too small."""
        for _ in range(self.layers):
            side //= 2
        return max(0, side - 2)  # the two convolutions of stride 1 take one each

    def forward(self, image: Float[Tensor, "b C H W"]) -> Float[Tensor, "b 1 h w"]:
        """Return logits [b, 1, h, w], positive for real, of images in [−1, 1].

        Raises ValueError if the channels differ or a side leaves no patch: at least 3 · 2^layers
        pixels are needed.
        """
        if image.shape[1] != self.image_channels:
            raise ValueError(f"the discriminator takes {self.image_channels} image channels, got {image.shape[1]}")
        height, width = image.shape[2:]
        if not (self.patches(height) and self.patches(width)):
            least = 3 * 2**self.layers
            raise ValueError(
                f"image {height}×{width} is too small for {self.layers} discriminator layers: "
                f"each side needs at least {least} pixels"
            )
        return self.body(image)
