"""The autoencoder equals diffusers', its layout survives the round trip, and folding statistics changes no image."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch

from autoencoder import AutoencoderConfig, AutoencoderKL, DiagonalGaussian
from autoencoder.config import ConfigError
from autoencoder.layout import from_diffusers, to_diffusers

CONFIGS = {
    "factor2-5ch-plain": AutoencoderConfig(5, 3, (8, 16), 1, 4, mid_attention=False),
    "factor2-1ch": AutoencoderConfig(1, 2, (16, 16), 1, 8),
    "factor4": AutoencoderConfig(3, 4, (8, 16, 24), 1, 8),
    "factor8-two-layers": AutoencoderConfig(3, 4, (8, 12, 16, 16), 2, 4),
    "factor8-attention": AutoencoderConfig(3, 4, (8, 12, 16, 16), 2, 4, attention_levels=(2, 3)),
    "factor4-attention": AutoencoderConfig(1, 2, (8, 16, 24), 1, 4, mid_attention=False, attention_levels=(1,)),
    "factor32": AutoencoderConfig(1, 2, (4, 8, 8, 8, 12, 16), 1, 4),
    "factor32-plain": AutoencoderConfig(5, 6, (4, 8, 8, 8, 12, 16), 2, 2, mid_attention=False),
}
SMALL = CONFIGS["factor4"]


def perturbed(config: AutoencoderConfig, seed: int = 0) -> AutoencoderKL:
    """A network whose norms, biases and residual branches differ from their initial values, so that swaps show."""
    torch.manual_seed(seed)
    model = AutoencoderKL(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(10.0 if name.endswith("conv2.weight") else 1.0)
            p.add_(0.1 * torch.randn_like(p) * (1.0 if p.ndim == 1 else p.std()))
    return model


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max())


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_diffusers(name: str) -> None:
    config = CONFIGS[name]
    ours = perturbed(config)
    theirs = diffusers.AutoencoderKL.from_config(to_diffusers(config))
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    theirs.load_state_dict(ours.state_dict())
    image = torch.rand(2, config.image_channels, 64, 96) * 2 - 1
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        ours, theirs, image = ours.to(dtype), theirs.to(dtype), image.to(dtype)
        with torch.no_grad():
            posterior, expected = ours.encode(image), theirs.encode(image).latent_dist
            assert posterior.mean.shape[2:] == (64 // config.factor, 96 // config.factor)
            assert close(posterior.moments, torch.cat([expected.mean, expected.logvar], 1), tolerance)
            latent = torch.randn_like(expected.mean)
            assert close(ours.decode(latent), theirs.decode(latent).sample, tolerance)


def test_forward_decodes_mean_or_sample() -> None:
    model = perturbed(SMALL)
    image = torch.rand(2, 3, 16, 8) * 2 - 1
    noise = torch.randn(2, 4, 4, 2)
    with torch.no_grad():
        posterior = model.encode(image)
        assert torch.equal(model(image)[0], model.decode(posterior.mean))
        assert torch.equal(
            model(image, noise)[0], model.decode(posterior.mean + torch.exp(posterior.logvar / 2) * noise)
        )
        assert not torch.allclose(model(image)[0], model(image, noise)[0])


def test_refuses_sizes_and_channels() -> None:
    model = AutoencoderKL(SMALL)
    with pytest.raises(ValueError, match=r"height 18 is not a multiple of the autoencoder's factor 4"):
        model.encode(torch.zeros(1, 3, 18, 16))
    with pytest.raises(ValueError, match=r"width 15"):
        model.encode(torch.zeros(1, 3, 16, 15))
    with pytest.raises(ValueError, match=r"3 image channels, got 1"):
        model.encode(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match=r"4 latent channels, got 3"):
        model.decode(torch.zeros(1, 3, 4, 4))


def test_checkpointing_keeps_gradients() -> None:
    model = perturbed(SMALL)
    image, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 4, 4)
    saved, grads = [], []
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        model.zero_grad()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            reconstruction, posterior = model(image, noise)
        (reconstruction.square().mean() + posterior.kl().mean()).backward()
        saved.append(sum(sizes))
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert saved[1] < 0.6 * saved[0]


def latent_statistics(posterior: DiagonalGaussian) -> tuple[torch.Tensor, torch.Tensor]:
    mean = posterior.mean.mean(dim=(0, 2, 3))
    variance = posterior.mean.var(dim=(0, 2, 3), correction=0) + posterior.std.square().mean(dim=(0, 2, 3))
    return mean, variance.sqrt()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
def test_fold_normalises_latents_and_keeps_images(dtype: torch.dtype, tolerance: float) -> None:
    model = perturbed(SMALL, seed=3).to(dtype)
    with torch.no_grad():
        model.quant_conv.weight.mul_(5.0)  # a scale worth folding
    image = (torch.rand(16, 3, 16, 16) * 2 - 1).to(dtype)
    noise = torch.randn(16, 4, 4, 4).to(dtype)
    folded = copy.deepcopy(model)
    with torch.no_grad():
        before = model.encode(image)
        mean, std = latent_statistics(before)
        assert (mean.abs() > 1e-2).any() and ((std - 1).abs() > 0.1).any()
        folded.fold_statistics(mean, std)
        after = folded.encode(image)
        m, s = mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)
        assert close(after.mean, (before.mean - m) / s, tolerance)
        assert close(after.std, before.std / s, tolerance)
        new_mean, new_std = latent_statistics(after)
        assert new_mean.abs().max() < tolerance and (new_std - 1).abs().max() < tolerance
        for a, b in ((None, None), (noise, noise)):
            assert close(folded(image, a)[0], model(image, b)[0], tolerance)
        assert close(folded.decode(noise), model.decode(noise * s + m), tolerance)


def test_whiten_decorrelates_the_channels() -> None:
    torch.manual_seed(0)
    model, images = AutoencoderKL(SMALL), torch.rand(8, 3, 64, 64) * 2 - 1
    posterior, decoded = model.encode(images), model.decode(torch.ones(1, 4, 8, 8))
    before = torch.corrcoef(posterior.mean.transpose(0, 1).flatten(1))
    assert (before - torch.eye(4)).abs().max() > 0.3  # random channels repeat each other
    model.whiten(posterior.mean)
    latent = model.encode(images).mean.transpose(0, 1).flatten(1)
    assert latent.mean(1).abs().max() < 1e-4
    assert torch.allclose(torch.cov(latent), torch.eye(4), atol=1e-3)
    assert torch.equal(model.encode(images).logvar, posterior.logvar)
    assert torch.equal(model.decode(torch.ones(1, 4, 8, 8)), decoded)
    model.whiten(torch.zeros(1, 4, 8, 8))  # nothing to tell apart: finite all the same
    assert all(p.isfinite().all() for p in model.parameters())


def test_fold_refuses_bad_statistics() -> None:
    model = AutoencoderKL(SMALL)
    with pytest.raises(ValueError, match=r"shape \(4,\), got \(3,\)"):
        model.fold_statistics(torch.zeros(3), torch.ones(3))
    for std in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="positive"):
            model.fold_statistics(torch.zeros(4), torch.tensor([1.0, 1.0, 1.0, std]))


@pytest.mark.parametrize("config", [*CONFIGS.values(), AutoencoderConfig()])
def test_layout_round_trip(config: AutoencoderConfig) -> None:
    layout = to_diffusers(config)
    assert from_diffusers(layout) == config
    with torch.device("meta"):
        read = diffusers.AutoencoderKL.from_config(layout)
    assert {k: v for k, v in layout.items() if k != "_diffusers_version"}.items() <= {
        **read.config,
        "_class_name": "AutoencoderKL",
    }.items()
    assert read.config.scaling_factor == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "relu"}, "act_fn is 'relu'"),
        ({"use_quant_conv": False}, "use_quant_conv is False"),
        ({"use_post_quant_conv": False}, "use_post_quant_conv"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "up_block_types .* mirror of down_block_types"),
        (
            {"up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"]},
            "up_block_types .* mirror",
        ),
        ({"down_block_types": ["DownBlock2D"] * 3}, "down_block_types"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 2}, "up_block_types"),
        ({"out_channels": 1}, "out_channels 1 differs from in_channels 3"),
        ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
        ({"norm_type": "spatial"}, "unknown key 'norm_type'"),
        ({"norm_num_groups": 5}, "groups 5"),
    ],
)
def test_layout_refuses_what_it_cannot_express(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_diffusers({**to_diffusers(SMALL), **change})


def test_attention_levels() -> None:
    assert AutoencoderConfig(channels=(32, 64)).attention_levels == ()  # configurations of before read as they did
    layout = to_diffusers(AutoencoderConfig(channels=(32, 32, 64), attention_levels=(2,)))
    assert layout["down_block_types"] == ["DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"]
    assert layout["up_block_types"] == ["AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"]
    with pytest.raises(ConfigError, match=r"attention_levels: 3 is not a level of 3"):
        AutoencoderConfig(channels=(32, 32, 64), attention_levels=(3,))


def test_import_is_free_of_torch() -> None:
    code = "import sys, autoencoder, autoencoder.layout; autoencoder.LossConfig(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
