"""Encoding and decoding in strips against the whole, for every height of a strip, and what is kept in memory."""

import pytest
import torch
from torch import nn

from autoencoder.config import AutoencoderConfig
from autoencoder.model import AutoencoderKL
from autoencoder.strips import decode_in_strips, encode_in_strips

CONFIGS = {
    "factor 4": AutoencoderConfig(3, 4, (8, 16, 16), 1, 4),
    "factor 8, two layers": AutoencoderConfig(3, 4, (8, 8, 16, 24), 2, 4),
    "attention in a level": AutoencoderConfig(1, 3, (8, 16), 1, 4, attention_levels=(0,)),
    "no attention": AutoencoderConfig(3, 4, (8, 16), 2, 1, mid_attention=False),
}


def stirred(config: AutoencoderConfig) -> AutoencoderKL:
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(config).requires_grad_(False)
    for parameter in autoencoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return autoencoder


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16, 100])
def test_the_result_is_the_whole_one(name: str, rows: int) -> None:
    autoencoder = stirred(CONFIGS[name])
    factor = autoencoder.config.factor
    image = torch.randn(2, autoencoder.config.image_channels, 5 * factor, 3 * factor)
    posterior = autoencoder.encode(image)
    ours = encode_in_strips(autoencoder, image, rows)
    torch.testing.assert_close(ours.mean, posterior.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.logvar, posterior.logvar, rtol=1e-5, atol=1e-5)
    latent = posterior.mean.clone()
    whole = autoencoder.decode(latent)
    torch.testing.assert_close(
        decode_in_strips(autoencoder, latent, rows), whole, rtol=1e-5, atol=1e-5 * float(whole.std())
    )
    assert torch.equal(latent, posterior.mean)  # nothing given was overwritten


def test_tiles_alone_are_not_the_whole() -> None:
    """The reason for all this: half a picture, decoded alone, has other statistics."""
    autoencoder = stirred(CONFIGS["factor 4"])
    latent = torch.randn(1, 4, 16, 4)
    half = autoencoder.decode(latent[:, :, :8])
    whole = decode_in_strips(autoencoder, latent, 7)
    assert (half - whole[:, :, :32]).abs().mean() > 0.01 * whole.std()


def test_no_activation_is_held_whole_but_a_blocks_input_and_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every convolution at full resolution the strip that is read is no higher than the strip and its reach."""
    autoencoder = stirred(CONFIGS["no attention"])
    latent, seen = torch.randn(1, 4, 40, 2), []
    plain = nn.functional.conv2d

    def conv2d(x: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        seen.extend([x.shape[2]] if x.shape[3] == 4 else [])  # at full resolution
        return plain(x, *arguments, **options)

    monkeypatch.setattr(nn.functional, "conv2d", conv2d)
    decode_in_strips(autoencoder, latent, 4)
    assert len(seen) > 40 and max(seen) <= 4 + 8
