"""Each term of the stage-1 loss has the right value and sends gradient where it should and nowhere else."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import lpips
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from autoencoder import AutoencoderConfig, AutoencoderKL, DiagonalGaussian, LossConfig
from autoencoder.discriminator import PatchDiscriminator
from autoencoder.loss import (
    adaptive_weight,
    discriminator_hinge,
    gan_factor,
    generator_hinge,
    reconstruction_loss,
    reconstruction_terms,
    weighted_sum,
)
from autoencoder.perceptual import PerceptualLoss


@pytest.fixture(scope="module")
def perceptual() -> PerceptualLoss:
    return PerceptualLoss("alex", "random")


# ---------------------------------------------------------------- posterior


def test_kl_equals_torch_and_monte_carlo() -> None:
    torch.manual_seed(0)
    posterior = DiagonalGaussian.from_moments(torch.randn(2, 6, 2, 2, dtype=torch.float64))
    q = torch.distributions.Normal(posterior.mean, posterior.std)
    p = torch.distributions.Normal(0.0, 1.0)
    assert torch.allclose(posterior.kl(), torch.distributions.kl_divergence(q, p), atol=1e-12)
    z = posterior.mean + posterior.std * torch.randn(20_000, *posterior.mean.shape, dtype=torch.float64)
    draws = q.log_prob(z) - p.log_prob(z)
    error = (draws.mean(0) - posterior.kl()) / (draws.std(0) / math.sqrt(len(draws)))
    assert error.abs().max() < 4.5


def test_posterior_moments_clamp_and_sample() -> None:
    moments = torch.tensor([1.0, 2.0, -100.0, 100.0]).view(1, 4, 1, 1)
    posterior = DiagonalGaussian.from_moments(moments)
    assert posterior.mean.flatten().tolist() == [1.0, 2.0]
    assert posterior.logvar.flatten().tolist() == [-30.0, 20.0]
    assert posterior.moments.flatten().tolist() == [1.0, 2.0, -30.0, 20.0]
    wide = DiagonalGaussian.from_moments(torch.tensor([1.0, math.log(9.0)]).view(1, 2, 1, 1))
    assert wide.sample(torch.full((1, 1, 1, 1), 2.0)).item() == pytest.approx(7.0)
    assert DiagonalGaussian.from_moments(moments.bfloat16()).kl().dtype == torch.float32
    with pytest.raises(ValueError, match="even number of channels, got 3"):
        DiagonalGaussian.from_moments(torch.zeros(1, 3, 1, 1))


# ---------------------------------------------------------------- values


def logits(*values: float) -> Tensor:
    return torch.tensor(values).view(len(values), 1, 1, 1)


def test_hinge_values() -> None:
    assert generator_hinge(logits(1.0, -3.0)).item() == 1.0
    # real: relu(1 − 2) = 0, relu(1 − 0.5) = 0.5; fake: relu(1 − 2) = 0, relu(1 + 0.25) = 1.25
    assert discriminator_hinge(logits(2.0, 0.5), logits(-2.0, 0.25)).item() == pytest.approx(0.5 * (0.25 + 0.625))


def test_adaptive_weight() -> None:
    rec = torch.tensor([3.0, 4.0], requires_grad=True)
    weight = adaptive_weight(rec, torch.tensor([0.0, 2.0]))
    assert weight.item() == pytest.approx(5.0 / 2.0001)
    assert not weight.requires_grad
    assert adaptive_weight(rec, torch.zeros(2)).item() == 1e4
    assert adaptive_weight(torch.zeros(2), torch.zeros(2)).item() == 0.0


def test_gan_factor_ramp() -> None:
    config = LossConfig(gan=0.5, gan_start=100, gan_ramp=10)
    expected = {0: 0.0, 99: 0.0, 100: 0.0, 101: 0.05, 105: 0.25, 110: 0.5, 10_000: 0.5}
    assert {k: pytest.approx(gan_factor(k, config)) for k in expected} == expected
    step = LossConfig(gan=0.5, gan_start=100, gan_ramp=0)
    assert (gan_factor(99, step), gan_factor(100, step)) == (0.0, 0.5)


def test_published_kl_weight_converts() -> None:
    """L1 and KL summed per image with weight 1e-6, over the image elements: our means with the converted weight."""
    torch.manual_seed(0)
    a, b = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    posterior = DiagonalGaussian.from_moments(torch.randn(2, 8, 4, 4))
    published = ((a - b).abs().sum() + 1e-6 * posterior.kl().sum()) / 2 / (3 * 32 * 32)
    config = LossConfig(l1=1.0, kl=1e-6 * 4 * 4 * 4 / (3 * 32 * 32))
    assert config.kl == pytest.approx(LossConfig().kl, rel=0.02)
    ours = weighted_sum(reconstruction_terms(a, b, posterior, config), config)
    assert ours.item() == pytest.approx(published.item(), rel=1e-6)


def test_mse_is_the_mean_square() -> None:
    image, posterior = torch.zeros(2, 3, 8, 8), DiagonalGaussian.from_moments(torch.zeros(2, 2, 4, 4))
    image[0] = 2.0
    terms = reconstruction_terms(image, torch.zeros_like(image), posterior, LossConfig(mse=3.0))
    assert (terms["l1"].item(), terms["mse"].item()) == (1.0, 2.0)
    assert weighted_sum(terms, LossConfig(mse=3.0)).item() == pytest.approx(1.0 + 3.0 * 2.0)


def test_terms_need_the_perceptual_network() -> None:
    image = torch.zeros(1, 3, 32, 32)
    posterior = DiagonalGaussian.from_moments(torch.zeros(1, 2, 4, 4))
    assert set(reconstruction_terms(image, image, posterior, LossConfig())) == {"l1", "kl"}
    with pytest.raises(ValueError, match="pass the PerceptualLoss"):
        reconstruction_terms(image, image, posterior, LossConfig(lpips=1.0))


# ---------------------------------------------------------------- where gradients go


def reached(module: nn.Module) -> set[str]:
    """Parameters with a gradient that is not zero."""
    return {name for name, p in module.named_parameters() if p.grad is not None and bool(p.grad.abs().max() > 0)}


# Softmax ignores what is added to all keys, so these have no gradient but rounding.
KEY_BIASES = {f"{side}.mid_block.attentions.0.to_k.bias" for side in ("encoder", "decoder")}


def test_every_term_reaches_its_parameters_and_no_others(perceptual: PerceptualLoss) -> None:
    torch.manual_seed(0)
    model = AutoencoderKL(AutoencoderConfig(1, 4, (8, 16, 16), 1, 4))
    disc = PatchDiscriminator(1, 8, 2)
    with torch.no_grad():
        disc.body[-1].weight.mul_(50.0)  # logits on both sides of ±1: inside, the two halves cancel at the last bias
    image, noise = torch.rand(2, 1, 32, 32) * 2 - 1, torch.randn(2, 4, 8, 8)
    everything = {name for name, _ in model.named_parameters()} - KEY_BIASES
    inference = {name for name in everything if name.startswith(("encoder.", "quant_conv."))}
    assert set() < inference < everything
    config = LossConfig(mse=1.0, lpips=1.0, lpips_net="alex")

    def after(term: str) -> set[str]:
        model.zero_grad(set_to_none=True)
        disc.zero_grad(set_to_none=True)
        reconstruction, posterior = model(image, noise)
        terms = reconstruction_terms(reconstruction, image, posterior, config, perceptual)
        disc.requires_grad_(term == "discriminator")
        terms["generator"] = generator_hinge(disc(reconstruction))
        terms["discriminator"] = discriminator_hinge(disc(image), disc(reconstruction.detach()))
        terms[term].backward()
        return reached(model) - KEY_BIASES

    for term in ("l1", "mse", "lpips", "generator"):
        assert after(term) == everything, term
        assert not reached(disc), term
    assert after("kl") == inference
    assert after("discriminator") == set()
    assert reached(disc) == {name for name, _ in disc.named_parameters()}
    assert all(p.grad is None and not p.requires_grad for p in perceptual.parameters())


def test_reconstruction_loss_is_mean_l1() -> None:
    a = torch.tensor([1.0, -2.0]).view(1, 1, 1, 2).requires_grad_()
    reconstruction_loss(a, torch.zeros(1, 1, 1, 2)).backward()
    assert a.grad is not None and a.grad.flatten().tolist() == [0.5, -0.5]


# ---------------------------------------------------------------- discriminator


@pytest.mark.parametrize("training", [True, False])
def test_discriminator_is_blind_to_the_rest_of_the_batch(training: bool) -> None:
    torch.manual_seed(0)
    disc = PatchDiscriminator(3, 8, 3).train(training).double()
    image = torch.randn(4, 3, 32, 40).double()
    whole = disc(image)
    assert whole.shape == (4, 1, disc.patches(32), disc.patches(40)) == (4, 1, 2, 3)
    image[1:] *= 7.0
    assert torch.allclose(disc(image)[:1], whole[:1], atol=1e-12)
    assert torch.allclose(disc(image[:1]), whole[:1], atol=1e-12)
    assert list(disc.buffers()) == []


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_discriminator_smallest_image(layers: int) -> None:
    disc = PatchDiscriminator(1, 4, layers)
    least = 3 * 2**layers
    assert disc(torch.zeros(1, 1, least, least)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match=f"{least - 1}×{least} is too small for {layers} .* at least {least}"):
        disc(torch.zeros(1, 1, least - 1, least))
    with pytest.raises(ValueError, match="1 image channels, got 3"):
        disc(torch.zeros(1, 3, least, least))


def test_discriminator_initial_weights() -> None:
    disc = PatchDiscriminator(3, 64, 3)
    weights = torch.cat([p.flatten() for p in disc.parameters() if p.ndim == 4])
    assert abs(weights.mean()) < 1e-4 and weights.std().item() == pytest.approx(0.02, rel=0.01)


# ---------------------------------------------------------------- perceptual


@pytest.fixture(scope="module")
def alexnet() -> nn.Module:
    torch.manual_seed(5)
    return torchvision.models.alexnet(weights=None)


def light_file(network: nn.Module, path: Path) -> Path:
    """Save a state dict whose classifier, which LPIPS does not use, takes no room."""
    state = network.state_dict()
    torch.save(
        {k: torch.zeros(()).expand(v.shape) if k.startswith("classifier") else v for k, v in state.items()}, path
    )
    return path


def test_perceptual_equals_lpips_with_the_same_weights(
    alexnet: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings(action="ignore"):  # lpips calls torchvision the old way
        reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    ours_in_order = [m for m in alexnet.get_submodule("features").modules() if isinstance(m, nn.Conv2d)]
    for theirs, mine in zip(
        (m for m in reference.net.modules() if isinstance(m, nn.Conv2d)), ours_in_order, strict=True
    ):
        theirs.load_state_dict(mine.state_dict())
    a, b = torch.rand(2, 3, 40, 48) * 2 - 1, torch.rand(2, 3, 40, 48) * 2 - 1
    expected = reference(a, b).flatten()
    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    light_file(alexnet, checkpoints / "alexnet-owt-7be5be79.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    save_file(alexnet.state_dict(), tmp_path / "alex.safetensors")
    for weights in ("torchvision", tmp_path / "alex.safetensors"):
        loss = PerceptualLoss("alex", weights)
        assert loss.meaningful
        assert torch.allclose(loss(a, b), expected, rtol=1e-5)
    grey_a, grey_b = a[:, :1], b[:, :1]
    assert torch.allclose(
        loss(grey_a, grey_b), reference(grey_a.repeat(1, 3, 1, 1), grey_b.repeat(1, 3, 1, 1)).flatten(), rtol=1e-5
    )


def test_perceptual_random_is_fixed_frozen_and_leaves_the_generator(perceptual: PerceptualLoss) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    again = PerceptualLoss("alex", "random").train()
    assert torch.equal(torch.rand(3), expected)
    assert not again.meaningful
    assert not any(m.training for m in again.modules())
    a = (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
    b = torch.rand(2, 3, 32, 32) * 2 - 1
    distance = again(a, b)
    assert torch.equal(distance, perceptual(a, b)) and distance.shape == (2,)
    distance.sum().backward()
    assert a.grad is not None and (a.grad.abs().amax(dim=(1, 2, 3)) > 0).all()


def test_perceptual_refuses_bad_files(alexnet: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"not found at .*hub/checkpoints/vgg16-397923af\.pth: .*lpips_weights.*random"
    ):
        PerceptualLoss("vgg", "torchvision")
    with pytest.raises(ValueError, match="not found at nowhere"):
        PerceptualLoss("alex", "nowhere.pth")
    with pytest.raises(ValueError, match="must be one of alex, vgg"):
        PerceptualLoss("squeeze", "random")
    for name in ("noise.pth", "noise.safetensors"):
        (tmp_path / name).write_bytes(b"not weights at all")
        with pytest.raises(ValueError, match="cannot be read"):
            PerceptualLoss("alex", tmp_path / name)
    features = {k: v for k, v in alexnet.state_dict().items() if k.startswith("features")}
    for bogus in ({"some.key": torch.zeros(1)}, [1, 2], {"features.0.weight": "text"}, features):
        torch.save(bogus, tmp_path / "bogus.pth")
        with pytest.raises(ValueError, match=r"do not fit .*whole state dict of torchvision's alex"):
            PerceptualLoss("alex", tmp_path / "bogus.pth")
    with pytest.raises(ValueError, match=r"do not fit .*whole state dict of torchvision's vgg"):
        PerceptualLoss("vgg", light_file(alexnet, tmp_path / "alex.pth"))


def test_perceptual_refuses_sizes_and_channels(perceptual: PerceptualLoss) -> None:
    def zeros(c: int, side: int) -> Tensor:
        return torch.zeros(1, c, side, side)

    assert perceptual(zeros(3, 31), zeros(3, 31)).item() == 0.0
    with pytest.raises(ValueError, match="30×30 is too small for LPIPS with alex: each side needs at least 31"):
        perceptual(zeros(3, 30), zeros(3, 30))
    for channels in (2, 5):
        with pytest.raises(ValueError, match=f"1 or 3 channels, got {channels}"):
            perceptual(zeros(channels, 32), zeros(channels, 32))
    vgg = PerceptualLoss("vgg", "random")
    assert vgg(zeros(1, 16), zeros(1, 16)).item() == 0.0
    with pytest.raises(ValueError, match="at least 16"):
        vgg(zeros(3, 15), zeros(3, 15))
