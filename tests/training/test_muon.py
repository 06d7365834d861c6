"""Muon: its steps against singular values in float64 and against torch's own, and a run that is cut and continued."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from autoencoder.config import AutoencoderConfig
from autoencoder.model import AutoencoderKL
from ldm.config import ConfigError, LoraConfig, TrainConfig, UNetConfig
from ldm.models.lora import Lora
from ldm.models.unet import UNet
from ldm.training.muon import hidden_matrices, orthogonalised
from ldm.training.optimizers import Optimizers


class Small(nn.Module):
    """Two hidden matrices, one of them a convolution, between an input and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(2, 6, 1)
        linear = nn.Linear(5, 8, bias=False)
        self.down_blocks = nn.ModuleList([nn.Conv2d(6, 5, 3), linear])
        self.linear = linear  # named after its block: that comes first
        self.conv_out = nn.Linear(8, 1)


def by_hand(singular: Tensor) -> Tensor:
    """Five of Jordan's quintics, on singular values."""
    for _ in range(5):
        singular = 3.4445 * singular - 4.7750 * singular**3 + 2.0315 * singular**5
    return singular


@pytest.mark.parametrize("shape", [(3, 5, 40), (1, 40, 5), (2, 7, 7)])
def test_orthogonalised_moves_singular_values_alone(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrices.double(), full_matrices=False)
    expected = u @ torch.diag_embed(by_hand(s / s.norm(dim=1, keepdim=True))) @ v
    torch.testing.assert_close(orthogonalised(matrices).double(), expected, rtol=0, atol=3e-4)


def test_orthogonalised_of_small_singular_values_and_of_nothing() -> None:
    u, _, v = torch.linalg.svd(torch.randn(1, 64, 300, generator=torch.Generator().manual_seed(1)), full_matrices=False)
    spread = torch.logspace(0, -6, 64)
    expected = u @ torch.diag_embed(by_hand(spread / spread.norm()))[None] @ v
    assert (orthogonalised(u @ torch.diag_embed(spread)[None] @ v) - expected).abs().max() < 1e-3 * expected.abs().max()
    assert torch.equal(orthogonalised(torch.zeros(1, 4, 6)), torch.zeros(1, 4, 6))


def test_orthogonalised_multiplies_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, multiply, held = [], torch.baddbmm, torch.backends.cuda.matmul.allow_tf32

    def watched(*arguments: Any, **settings: Any) -> Tensor:
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return multiply(*arguments, **settings)

    monkeypatch.setattr(torch, "baddbmm", watched)
    torch.backends.cuda.matmul.allow_tf32 = True  # monkeypatch cannot: it is no attribute of its own
    try:
        orthogonalised(torch.randn(1, 4, 6))
        assert seen == [False] * 5 and torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = held


def step(optimizers: Optimizers, network: nn.Module, update: int, finite: bool = True) -> None:
    generator = torch.Generator().manual_seed(update)
    optimizers.begin(update, lambda _: 1.0)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        if not finite:
            parameter.grad *= float("nan")
    optimizers.step(torch.tensor(finite))


def test_steps_are_those_of_the_formula() -> None:
    """Three updates in float64: momentum of Nesterov, orthogonalised, scaled to AdamW's size, weights that decay."""
    config = TrainConfig(optimizer="muon", lr=0.1, muon_lr=0.3, weight_decay=0.5)
    torch.manual_seed(0)
    network = Small()
    expected = {name: p.detach().double() for name, p in network.named_parameters() if name in MATRICES}
    buffers = {name: torch.zeros_like(w) for name, w in expected.items()}
    optimizers = Optimizers({"unet": network}, config, None)
    for update in range(3):
        step(optimizers, network, update)
        for name, p in network.named_parameters():
            if name in MATRICES:
                assert p.grad is not None
                buffers[name] = 0.95 * buffers[name] + p.grad
                nesterov = (p.grad + 0.95 * buffers[name]).flatten(1)
                u, s, v = torch.linalg.svd(nesterov, full_matrices=False)
                moved = (u @ torch.diag(by_hand(s / s.norm())) @ v).view(p.shape)
                size = 0.3 * 0.2 * max(nesterov.shape) ** 0.5
                expected[name] = expected[name] * (1 - 0.3 * 0.5) - size * moved
    for name, p in network.named_parameters():
        if name in MATRICES:
            torch.testing.assert_close(p.detach().double(), expected[name], rtol=1e-4, atol=1e-5)


MATRICES = ("down_blocks.0.weight", "down_blocks.1.weight")


def test_other_parameters_are_stepped_by_adamw() -> None:
    torch.manual_seed(0)
    network = Small()
    other = copy.deepcopy(network)
    pairs = [
        (network, TrainConfig(optimizer="muon", lr=0.1, weight_decay=0.5)),
        (other, TrainConfig(lr=0.1, weight_decay=0.5)),
    ]
    for model, config in pairs:
        optimizers = Optimizers({"unet": model}, config, None)
        for update in range(3):
            step(optimizers, model, update)
    for (name, a), b in zip(network.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) == (name not in MATRICES), name


def test_torchs_own_muon_takes_the_same_steps() -> None:
    """Torch's orthogonalises in bfloat16."""
    torch.manual_seed(0)
    network = Small()
    linear = nn.Parameter(network.linear.weight.detach().clone())
    theirs = torch.optim.Muon([linear], lr=0.1, weight_decay=0.5, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    optimizers = Optimizers({"unet": network}, TrainConfig(optimizer="muon", lr=0.1, weight_decay=0.5), None)
    for update in range(3):
        step(optimizers, network, update)
        assert network.linear.weight.grad is not None
        linear.grad = network.linear.weight.grad.clone()
        theirs.step()
    torch.testing.assert_close(network.linear.weight.detach(), linear.detach(), rtol=0, atol=5e-3)


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    torch.manual_seed(0)
    network = Small()
    optimizers = Optimizers({"unet": network}, TrainConfig(optimizer="muon", lr=0.1), None)
    step(optimizers, network, 0)
    state = optimizers.each["unet"].state

    def everything() -> list[Tensor]:
        moments: list[Any] = [moment for p in network.parameters() for moment in state[p].values()]
        return copy.deepcopy([*(p.detach() for p in network.parameters()), *moments])

    before = everything()
    step(optimizers, network, 1, finite=False)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))


def test_hidden_matrices_of_a_unet() -> None:
    """All that is between two hidden layers: blocks' convolutions, attention, feed-forward."""
    network = UNet(UNetConfig(channels=(8, 16), layers_per_level=1, heads=(2,), groups=4), 4, context_dim=6)
    held = {id(p) for p in hidden_matrices(network)}
    found = {name for name, p in network.named_parameters() if id(p) in held}
    left = {name for name, p in network.named_parameters() if p.ndim > 1} - found
    assert {name.split(".")[0] for name in found} == {"down_blocks", "mid_block", "up_blocks"}
    assert not any("time_emb_proj" in name for name in found)
    assert all(name.startswith(("conv_in", "conv_out", "time_embedding")) or "time_emb_proj" in name for name in left)
    assert {"mid_block.resnets.0.conv1.weight", "mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight"} <= found


def test_hidden_matrices_of_other_networks() -> None:
    """Of an autoencoder its blocks; of CLIP the layers of both towers; of a LoRA its changes within blocks."""
    autoencoder = AutoencoderKL(AutoencoderConfig(channels=(4, 8), layers_per_level=1, groups=1))
    size: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, "vocab_size": 20, "max_position_embeddings": 6}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config={**size, "image_size": 8, "patch_size": 4}))
    unet = UNet(UNetConfig(channels=(8,), layers_per_level=1, heads=(2,), groups=4), 4, context_dim=6)
    for network, outside in (
        (autoencoder, ("encoder.conv", "decoder.conv", "quant_conv", "post_quant_conv")),
        (clip, ("text_model.embeddings", "vision_model.embeddings", "text_projection", "visual_projection")),
        (Lora.fresh(unet, LoraConfig(rank=2)), ()),
    ):
        held = {id(p) for p in hidden_matrices(network)}
        matrices = {name: id(p) in held for name, p in network.named_parameters() if p.ndim >= 2}
        assert any(matrices.values())
        assert {name for name, hidden in matrices.items() if not hidden} == {
            name for name in matrices if name.startswith(outside)
        }


def test_a_network_without_hidden_matrices_is_adamws() -> None:
    optimizers = Optimizers({"schedule": nn.Linear(3, 3)}, TrainConfig(optimizer="muon"), None)
    assert type(optimizers.each["schedule"]) is torch.optim.AdamW


def test_muon_lr_is_for_muon() -> None:
    with pytest.raises(ConfigError, match="muon_lr is for optimizer: muon"):
        TrainConfig(muon_lr=1e-3)
    with pytest.raises(ConfigError, match="optimizer must be one of adamw, muon"):
        TrainConfig(optimizer="sgd")
