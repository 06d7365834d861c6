"""The U-Net against diffusers' UNet2DConditionModel, by way of the configuration that a model folder holds."""

import json
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from ldm.config import ConfigError, UNetConfig
from ldm.diffusion.condition import Condition
from ldm.interop.diffusers.unet import unet_from_diffusers, unet_to_diffusers
from ldm.models.layers import timestep_embedding
from ldm.models.unet import NetworkSpec, UNet

# name: configuration, channels of x_t, context width, side of the sample
CASES: dict[str, tuple[UNetConfig, int, int | None, tuple[int, int]]] = {
    "sd1 in small": (UNetConfig((16, 32, 32), 2, (0, 1), (4,), groups=8), 4, 24, (8, 8)),
    "sd2 in small": (UNetConfig((16, 32), 1, (0,), (2, 4), 2, 4, linear_projection=True), 4, 12, (8, 4)),
    "odd sides": (UNetConfig((8, 16, 24), 1, (2,), (2,), groups=4), 3, 10, (5, 7)),
    "no attention but the middle": (UNetConfig((8, 16), 2, (), (2,), groups=4, scale_shift=True), 2, 6, (6, 6)),
    "unconditional": (UNetConfig((8, 16), 1, (), (1, 2), groups=8), 1, None, (4, 4)),
    "vector and concat": (UNetConfig((8, 16), 1, (1,), (2,), 1, 4, vector_dim=7, concat_channels=5), 4, 6, (9, 4)),
    "everything, one level": (UNetConfig((12,), 1, (0,), (3,), 2, 4, True, True, 5, 1), 2, 6, (3, 3)),
}


def build(name: str) -> tuple[UNet, Any]:
    """Ours and theirs with the same random weights, none at its initial value."""
    config, channels, context_dim, size = CASES[name]
    torch.manual_seed(0)
    ours = UNet(config, channels, channels, context_dim)
    for parameter in ours.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    layout = json.loads(json.dumps(unet_to_diffusers(NetworkSpec(config, channels, channels, context_dim), max(size))))
    theirs = diffusers.UNet2DConditionModel.from_config(layout)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def inputs(name: str) -> tuple[Tensor, Tensor, Condition]:
    config, channels, context_dim, size = CASES[name]
    torch.manual_seed(1)
    cond = Condition(
        context=None if context_dim is None else torch.randn(2, 5, context_dim),
        vector=None if config.vector_dim is None else torch.randn(2, config.vector_dim),
        concat=torch.randn(2, config.concat_channels, *size) if config.concat_channels else None,
    )
    return torch.randn(2, channels, *size), torch.tensor([0, 999]), cond


def call_theirs(theirs: Any, x: Tensor, t: Tensor, cond: Condition, **extra: Any) -> Tensor:
    sample = x if cond.concat is None else torch.cat([x, cond.concat], dim=1)
    return theirs(sample, t, encoder_hidden_states=cond.context, class_labels=cond.vector, **extra).sample


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_are_those_of_diffusers(name: str) -> None:
    ours, theirs = build(name)
    x, t, cond = inputs(name)
    both, seen = [], []
    for model in (ours, theirs):
        x_ = x.clone().requires_grad_()
        out = model(x_, t, cond) if model is ours else call_theirs(model, x_, t, cond)
        torch.manual_seed(2)
        (out * torch.randn_like(out)).sum().backward()
        both.append(out.detach())
        seen.append({"x": x_.grad, **{key: p.grad for key, p in model.named_parameters()}})
    assert_close(both[0], both[1])
    assert both[0].abs().max() > 0.1
    largest = max(g.abs().max().item() for g in seen[1].values())
    for key, gradient in seen[1].items():
        assert (seen[0][key] - gradient).abs().max() <= 1e-5 * max(gradient.abs().max().item(), 0.1 * largest), key


@pytest.mark.parametrize("name", CASES)
def test_the_layout_is_read_back(name: str) -> None:
    config, channels, context_dim, size = CASES[name]
    levels = len(config.channels)
    expected = NetworkSpec(config, channels, channels, context_dim)
    layout = json.loads(json.dumps(unet_to_diffusers(expected, max(size))))
    theirs = diffusers.UNet2DConditionModel.from_config(layout)
    for text in (json.dumps(layout), theirs.to_json_string()):  # as we write it, and as they do
        found = unet_from_diffusers(json.loads(text))
        heads = found.config.heads
        assert [heads[i if len(heads) > 1 else 0] for i in range(levels)] == list(config.heads * levels)[:levels]
        assert replace(found, config=replace(found.config, heads=config.heads)) == expected


def test_a_network_knows_what_it_was_built_with() -> None:
    """The four arguments arrive each in its place, and the variance is learned where twice the channels come out."""
    spec = NetworkSpec(UNetConfig((8,), 1, (0,), (1,), groups=4, concat_channels=5), 3, 6, 7)
    network = spec.make()
    assert network.spec == spec and spec.learned_variance and not replace(spec, out_channels=3).learned_variance
    assert network.conv_in.in_channels == 3 + 5 and network.conv_out.out_channels == 6
    assert network.state_dict()["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape == (8, 7)


def test_attention_without_a_context_is_ours_alone() -> None:
    """It equals the network with a context whose cross-attention is silenced; diffusers refuses to build it."""
    torch.manual_seed(0)
    config = UNetConfig((8, 16), 1, (0, 1), (1, 2), groups=8, transformer_layers=2)
    ours, silenced = UNet(config, 1, 1, None), UNet(config, 1, 1, 6)
    rest = silenced.load_state_dict(ours.state_dict(), strict=False)
    assert rest.unexpected_keys == [] and all(".attn2." in key or ".norm2." in key for key in rest.missing_keys)
    for key, parameter in silenced.named_parameters():
        if ".attn2.to_out." in key:
            torch.nn.init.zeros_(parameter)
    x, t = torch.randn(2, 1, 4, 4), torch.tensor([3, 700])
    assert_close(ours(x, t, Condition()), silenced(x, t, Condition(context=torch.randn(2, 3, 6))))
    layout = unet_to_diffusers(NetworkSpec(config, 1, 1, None), 4)
    assert layout["_class_name"] == "LatentDiffusionUNet"
    assert unet_from_diffusers(layout) == NetworkSpec(config, 1, 1, None)
    with pytest.raises(ValueError, match="cross_attention_dim must be specified"):
        diffusers.UNet2DConditionModel.from_config(layout)


def test_published_architectures_are_read() -> None:
    """The config.json of Stable Diffusion 1.5 and 2.1 as published, less what is not a setting of the network."""
    common = {
        "_class_name": "UNet2DConditionModel", "act_fn": "silu", "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
        "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    }  # fmt: skip
    one = {"attention_head_dim": 8, "cross_attention_dim": 768}
    assert unet_from_diffusers({**common, **one}) == NetworkSpec(UNetConfig(), 4, 4, 768)
    assert unet_from_diffusers({**common, **one, "attention_head_dim": 4}).config.heads == (4,)
    two = {
        "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "dual_cross_attention": False,
        "use_linear_projection": True,
        "num_class_embeds": None, "only_cross_attention": False, "upcast_attention": True,
    }  # fmt: skip
    published = UNetConfig(heads=(5, 10, 20, 20), linear_projection=True, upcast_attention=True)
    assert unet_from_diffusers({**common, **two}) == NetworkSpec(published, 4, 4, 1024)
    inpainting = unet_from_diffusers({**common, **one, "in_channels": 9})
    assert inpainting == NetworkSpec(UNetConfig(concat_channels=5), 4, 4, 768)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", "UNet2DModel"),
        ("act_fn", "gelu"),
        ("flip_sin_to_cos", False),
        ("downsample_padding", 0),
        ("freq_shift", 1),
        ("norm_eps", 1e-6),
        ("mid_block_type", None),
        ("mid_block_type", "UNetMidBlock2D"),
        ("down_block_types", ["DownBlock2D", "ResnetDownsampleBlock2D"]),
        ("up_block_types", ["UpBlock2D", "CrossAttnUpBlock2D"]),
        ("block_out_channels", None),
        ("class_embed_type", "timestep"),
        ("projection_class_embeddings_input_dim", None),
        ("num_class_embeds", 10),
        ("addition_embed_type", "text_time"),
        ("transformer_layers_per_block", [1, 2]),
        ("layers_per_block", [1, 2]),
        ("cross_attention_dim", [6, 8]),
        ("time_embedding_type", "fourier"),
        ("resnet_time_scale_shift", "spatial"),
        ("only_cross_attention", [True, False]),
        ("conv_in_kernel", 1),
        ("encoder_hid_dim", 32),
        ("a_later_invention", 3),
    ],
)
def test_what_we_cannot_express_is_refused_by_name(key: str, value: Any) -> None:
    config, channels, context_dim, _ = CASES["vector and concat"]
    layout = unet_to_diffusers(NetworkSpec(config, channels, channels, context_dim), 8)
    named = {"down_block_types": "ResnetDownsampleBlock2D", "_class_name": "UNet2DModel"}.get(key, key)
    with pytest.raises(ConfigError, match=f"unet: .*{named}"):
        unet_from_diffusers({**layout, key: value})


def test_timesteps_are_embedded_in_float32() -> None:
    """[cos, sin](t · 10000^(−i/half)), fractional t too, in float64 here."""
    t, half = torch.tensor([0.0, 1.0, 417.25, 999.0]), 6
    angles = t.double()[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    expected = torch.cat([angles.cos(), angles.sin(), torch.zeros(4, 1, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(timestep_embedding(t, 13).double(), expected, rtol=0, atol=1e-4)
    assert timestep_embedding(torch.tensor([3]), 12).dtype == torch.float32


def residuals(unet: UNet, x: Tensor, t: Tensor, cond: Condition) -> tuple[Tensor, ...]:
    """Zeros shaped like the skip connections and the middle, as a hook finds them."""
    shapes: list[torch.Size] = []
    hooks = [unet.conv_in.register_forward_hook(lambda m, i, o: shapes.append(o.shape))]
    for stage in unet.down_blocks:
        for i, resnet in enumerate(stage.resnets):
            last = stage.attentions[i] if stage.attentions is not None else resnet
            hooks.append(last.register_forward_hook(lambda m, i, o: shapes.append(o.shape)))
        if stage.downsamplers is not None:
            hooks.append(stage.downsamplers[0].register_forward_hook(lambda m, i, o: shapes.append(o.shape)))
    hooks.append(unet.mid_block.resnets[1].register_forward_hook(lambda m, i, o: shapes.append(o.shape)))
    with torch.no_grad():
        unet(x, t, cond)
    for hook in hooks:
        hook.remove()
    return tuple(torch.zeros(shape) for shape in shapes)


@pytest.mark.parametrize("name", ["sd1 in small", "odd sides", "unconditional"])
@torch.no_grad()
def test_control_is_added_to_the_skips_and_the_middle(name: str) -> None:
    ours, theirs = build(name)
    x, t, cond = inputs(name)
    zero = residuals(ours, x, t, cond)
    plain = ours(x, t, cond)
    assert torch.equal(ours(x, t, Condition(cond.context, cond.vector, cond.concat, zero)), plain)
    control = tuple(0.5 * torch.randn_like(r) for r in zero)
    actual = ours(x, t, Condition(cond.context, cond.vector, cond.concat, control))
    extra = {"down_block_additional_residuals": control[:-1], "mid_block_additional_residual": control[-1]}
    assert_close(actual, call_theirs(theirs, x, t, cond, **extra))
    middle_alone = ours(x, t, Condition(cond.context, cond.vector, cond.concat, (*zero[:-1], control[-1])))
    assert_close(
        middle_alone, call_theirs(theirs, x, t, cond, **{**extra, "down_block_additional_residuals": zero[:-1]})
    )
    assert (actual - plain).abs().max() > 1e-2 and (middle_alone - plain).abs().max() > 1e-2
    with pytest.raises(ValueError, match=f"control holds {len(zero) - 1} residuals, not {len(zero)}"):
        ours(x, t, Condition(cond.context, cond.vector, cond.concat, control[1:]))


@pytest.mark.parametrize("name", ["sd2 in small", "vector and concat"])
def test_checkpointing_changes_no_gradient(name: str) -> None:
    unet, _ = build(name)
    x, t, cond = inputs(name)
    gradients, recomputed = [], []
    hook = unet.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: recomputed.append(1))
    for on in (False, True):
        unet.gradient_checkpointing = on
        unet.zero_grad()
        unet(x, t, cond).square().sum().backward()
        gradients.append([p.grad.clone() for p in unet.parameters() if p.grad is not None])
    hook.remove()
    assert len(recomputed) == 3  # once without, forward and again backward with
    assert len(gradients[0]) == len(list(unet.parameters()))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["context", "vector", "concat"])
def test_a_condition_missing_or_not_expected_is_refused(kind: str) -> None:
    config = UNetConfig((8,), 1, (0,), (1,), groups=4)
    given = {"context": torch.zeros(1, 2, 6), "vector": torch.zeros(1, 3), "concat": torch.zeros(1, 2, 4, 4)}
    wanting = UNet(UNetConfig((8,), 1, (0,), (1,), groups=4, vector_dim=3, concat_channels=2), 1, 1, 6)
    plain = UNet(config, 1, 1, None)
    x, t = torch.zeros(1, 1, 4, 4), torch.tensor([0])
    wanting(x, t, Condition(**given))
    plain(x, t, Condition())
    with pytest.raises(ValueError, match=f"takes a {kind} condition, and none was given"):
        wanting(x, t, Condition(**{k: v for k, v in given.items() if k != kind}))
    with pytest.raises(ValueError, match=f"takes no {kind} condition, and one was given"):
        plain(x, t, Condition(**{kind: given[kind]}))


def test_samples_of_a_batch_do_not_mix() -> None:
    ours, _ = build("sd1 in small")
    x, t, cond = inputs("sd1 in small")
    with torch.no_grad():
        whole = ours(x, t, cond)
        for i in range(2):
            assert_close(ours(x[i : i + 1], t[i : i + 1], cond.map(lambda v, i=i: v[i : i + 1])), whole[i : i + 1])
