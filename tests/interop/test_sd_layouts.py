"""Networks in the layouts of Stable Diffusion: the same numbers as diffusers, from its config.json to ours and back.

Random weights throughout, each moved from its initial value. The published sizes in full are marked slow.
"""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from autoencoder.config import AutoencoderConfig
from autoencoder.layout import from_diffusers, latent_scale, to_diffusers
from autoencoder.model import AutoencoderKL
from ldm import config as settings
from ldm.config import ConfigError, ScheduleConfig, UNetConfig
from ldm.diffusion.condition import Condition
from ldm.errors import FolderError
from ldm.interop.diffusers.unet import sample_side, unet_from_diffusers, unet_to_diffusers
from ldm.interop.text import read_text
from ldm.interop.weights import read_module
from ldm.models.clip import train_tokenizer
from ldm.models.layers import Attention
from ldm.models.text import save_tokenizer
from ldm.models.unet import NetworkSpec, UNet
from ldm.pipeline import Pipeline

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "diffusion_pytorch_model.safetensors"
SD1 = {
    "sample_size": 8, "block_out_channels": (8, 16, 16, 16), "cross_attention_dim": 12, "attention_head_dim": 2,
    "norm_num_groups": 4,
    "layers_per_block": 2, "in_channels": 4, "out_channels": 4,
}  # fmt: skip
SMALL = SD1 | {
    "block_out_channels": (8, 16), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1,
}  # fmt: skip


def blocks(attends: str) -> dict[str, Any]:
    """Block types, from one letter for each level: x attends, o does not."""
    down = tuple("CrossAttnDownBlock2D" if letter == "x" else "DownBlock2D" for letter in attends)
    return {"down_block_types": down, "up_block_types": tuple(name.replace("Down", "Up") for name in reversed(down))}


# name: what differs from UNet2DConditionModel's defaults, height and width of the sample
UNETS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "Stable Diffusion 1": (SD1, (8, 16)),
    "Stable Diffusion 2": (
        SD1 | {"attention_head_dim": (1, 2, 4, 4), "use_linear_projection": True, "upcast_attention": True,
               "dual_cross_attention": False},
        (16, 8),
    ),
    "inpainting": (SD1 | {"in_channels": 9}, (16, 8)),
    "class table": (SMALL | {"num_class_embeds": 5}, (4, 6)),
    "class number": (SMALL | {"class_embed_type": "timestep"}, (4, 6)),
    "class identity": (SMALL | {"class_embed_type": "identity"}, (4, 6)),
    "class projection": (
        SMALL | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 6}, (4, 6),
    ),
    "class simple projection": (
        SMALL | {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 6}, (4, 6),
    ),
    "three levels, odd heads and sides": (
        SMALL | blocks("oxx")
        | {"block_out_channels": (12, 20, 28), "attention_head_dim": (9, 5, 7), "sample_size": 11},
        (7, 11),
    ),
    "five levels, odd sides": (SMALL | blocks("xxoxo") | {"block_out_channels": (8,) * 5}, (19, 13)),
    "two transformer layers": (SMALL | {"transformer_layers_per_block": 2, "layers_per_block": 2}, (5, 4)),
    "scale and shift": (SMALL | {"resnet_time_scale_shift": "scale_shift"}, (4, 4)),
    "three residual blocks": (SMALL | {"layers_per_block": 3, "in_channels": 16, "out_channels": 16}, (6, 3)),
    "lists of one value": (
        SMALL | {"layers_per_block": (1, 1), "transformer_layers_per_block": (2, 2), "cross_attention_dim": (12, 12)},
        (4, 4),
    ),
}  # fmt: skip


@torch.no_grad()
def stir(module: nn.Module) -> None:
    """Random weights that keep activations near 1: matrices by their inputs, norms about 1, biases about 0."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.normal_(std=0.2).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)


def assert_same(actual: Tensor, expected: Tensor, what: str = "") -> None:
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max(), what


def plain(layout: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a config.json, one value for all levels written as such."""
    values = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in layout.items()
        if not key.startswith("_")
    }
    uniform = ("layers_per_block", "transformer_layers_per_block", "cross_attention_dim")
    return {key: value[0] if key in uniform and isinstance(value, list) else value for key, value in values.items()}


# ---------------------------------------------------------------- U-Net


def theirs_saved(name: str, folder: Path) -> Any:
    theirs = diffusers.UNet2DConditionModel(**UNETS[name][0])
    stir(theirs)
    theirs.save_pretrained(folder)
    return theirs


def read(folder: Path) -> UNet:
    spec = unet_from_diffusers(json.loads((folder / "config.json").read_text()))
    return read_module(spec.make, folder / WEIGHTS).train().requires_grad_()


def labels(config: UNetConfig, batch: int = 2) -> dict[str, Tensor]:
    """Random values of the condition that is added to the timestep embedding."""
    if config.vector_dim is not None:
        return {"vector": torch.randn(batch, config.vector_dim)}
    if config.num_labels is not None:
        return {"labels": torch.tensor([config.num_labels - 1, 0])}
    return {"labels": torch.tensor([3, 250])} if config.sinusoidal_labels else {}


@pytest.mark.parametrize("name", UNETS)
def test_unet_and_its_gradients_are_those_of_diffusers(name: str, tmp_path: Path) -> None:
    theirs: Any = theirs_saved(name, tmp_path)
    ours = read(tmp_path)
    torch.manual_seed(1)
    given = labels(ours.config)
    x, t, context = torch.randn(2, ours.in_channels, *UNETS[name][1]), torch.tensor([1, 801]), torch.randn(2, 5, 12)
    concat = torch.randn(2, ours.config.concat_channels, *UNETS[name][1]) if ours.config.concat_channels else None
    inputs = {"x": x, "context": context, **({} if concat is None else {"concat": concat})}
    outputs, gradients = [], []
    for model in (ours, theirs):
        leaf = {key: value.clone().requires_grad_() for key, value in inputs.items()}
        if model is ours:
            out = ours(leaf["x"], t, Condition(leaf["context"], concat=leaf.get("concat"), **given))
        else:
            sample = torch.cat([leaf[key] for key in ("x", "concat") if key in leaf], dim=1)
            out = theirs(sample, t, leaf["context"], class_labels=next(iter(given.values()), None)).sample
        torch.manual_seed(2)
        (out * torch.randn(out.shape)).sum().backward()
        outputs.append(out.detach())
        named = {**leaf, **dict(model.named_parameters())}
        gradients.append({key: value.grad for key, value in named.items() if value.grad is not None})
    assert_same(outputs[0], outputs[1])
    assert gradients[0].keys() == gradients[1].keys() == inputs.keys() | dict(ours.named_parameters()).keys()
    for key, expected in gradients[1].items():
        assert expected.abs().max() > 1e-3, key
        assert_same(gradients[0][key], expected, key)


@pytest.mark.parametrize("name", UNETS)
def test_unet_settings_go_there_and_back(name: str) -> None:
    with torch.device("meta"):
        before: Any = diffusers.UNet2DConditionModel(**UNETS[name][0])
        layout = json.loads(before.to_json_string())
        back = unet_to_diffusers(unet_from_diffusers(layout), sample_size=sample_side(layout))
        after: Any = diffusers.UNet2DConditionModel.from_config(back)
    assert plain(after.config) == plain(before.config)


@pytest.mark.parametrize("name", ["Stable Diffusion 2", "class table", "lists of one value"])
def test_unet_goes_from_diffusers_to_us_and_back(name: str, tmp_path: Path) -> None:
    """Every value of its config.json and every weight; written by the pipeline as any model is."""
    before: Any = theirs_saved(name, tmp_path / "theirs")
    side = sample_side(json.loads((tmp_path / "theirs/config.json").read_text()))
    Pipeline(read(tmp_path / "theirs"), ScheduleConfig(), "eps", None, None, side).save_pretrained(tmp_path / "ours")
    after: Any = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "ours", subfolder="unet")
    assert plain(after.config) == plain(before.config)
    mine, its = after.state_dict(), before.state_dict()
    assert mine.keys() == its.keys() and all(torch.equal(mine[key], its[key]) for key in its)


def test_every_setting_of_diffusers_is_known_by_name() -> None:
    """Each argument of their classes is read or has the one value that we can express; at their defaults, all are."""
    from ldm.interop.diffusers import unet

    for cls, known in (
        (diffusers.UNet2DConditionModel, unet._READ | set(unet._FIXED)),
        (diffusers.AutoencoderKL, set(to_diffusers(AutoencoderConfig()))),
    ):
        theirs = set(inspect.signature(cls.__init__).parameters) - {"self"}
        assert theirs <= known and {key for key in known - theirs if not key.startswith("_")} <= {"learned_variance"}
    defaults: Any = inspect.signature(diffusers.UNet2DConditionModel.__init__).parameters
    layout = {key: p.default for key, p in defaults.items() if key != "self"}
    assert unet_from_diffusers(layout) == NetworkSpec(UNetConfig(), 4, 4, 1280)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"upcast_atention": False}, "unet: unknown key upcast_atention: did you mean upcast_attention?"),
        ({"rank": None}, "unet: unknown key rank of a UNet2DConditionModel"),
        ({"addition_embed_type": "text_time"}, r"unet: addition_embed_type = 'text_time' cannot .*Stable Diffusion XL"),
        ({"num_attention_heads": 8}, r"unet: num_attention_heads = 8 cannot .*attention_head_dim"),
        (
            {"class_embeddings_concat": True},
            "unet: class_embeddings_concat = True cannot be expressed here, only False",
        ),
        ({"only_cross_attention": [False, True]}, "unet: only_cross_attention"),
        ({"dual_cross_attention": True}, "unet: dual_cross_attention"),
        ({"time_cond_proj_dim": 256}, "unet: time_cond_proj_dim"),
        ({"encoder_hid_dim": 12}, "unet: encoder_hid_dim"),
        ({"resnet_skip_time_act": True}, "unet: resnet_skip_time_act"),
        ({"mid_block_type": None}, "unet: mid_block_type = None"),
        ({"norm_eps": 1e-6}, "unet: norm_eps = 1e-06"),
        ({"norm_num_groups": None}, "unet.groups must be an integer, got None"),
        ({"attention_head_dim": None}, "unet.heads.* must be an integer, got None"),
        ({"attention_head_dim": 3}, "unet.heads: 3 does not divide channels 8"),
        ({"attention_head_dim": [2, 2, 2]}, "unet.heads must be one number or one per level"),
        ({"layers_per_block": "2"}, "unet.layers_per_level must be an integer, got '2'"),
        ({"layers_per_block": [1, 2]}, r"unet: layers_per_block \[1, 2\] differs between levels"),
        ({"transformer_layers_per_block": [1, 2]}, "unet: transformer_layers_per_block .* differs"),
        ({"in_channels": 3}, "unet: in_channels 3 is less than the 4 channels"),
        ({"out_channels": "4"}, "unet: out_channels must be a whole number"),
        ({"cross_attention_dim": "12"}, "unet: cross_attention_dim must be a whole number"),
        ({"block_out_channels": 8}, "unet: block_out_channels is missing, or not a list"),
        ({"class_embed_type": "sum"}, "unet: class_embed_type 'sum'"),
        ({"class_embed_type": "projection"}, "unet: projection_class_embeddings_input_dim is missing"),
        (
            {"class_embed_type": "identity", "num_class_embeds": 4},
            "unet: num_class_embeds = 4 has no meaning with .*'identity'",
        ),
        (
            {"projection_class_embeddings_input_dim": 4},
            "unet: projection_class_embeddings_input_dim = 4 has no meaning with .*None",
        ),
        ({"num_class_embeds": 0}, "unet.num_labels must lie between 1"),
    ],
)
def test_unet_settings_beyond_ours_are_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    layout = json.loads(json.dumps(SMALL))
    unet_from_diffusers(
        {**layout, "only_cross_attention": [False, False], "sample_size": None, "num_attention_heads": None}
    )
    with pytest.raises(ConfigError, match=message) as caught:
        unet_from_diffusers({**layout, **change})
    assert "\n" not in str(caught.value)


def test_side_of_the_sample() -> None:
    assert [
        sample_side(layout) for layout in ({}, {"sample_size": None}, {"sample_size": 96}, {"sample_size": [32, 32]})
    ] == [
        64,
        64,
        96,
        32,
    ]
    with pytest.raises(ConfigError, match=r"unet: sample_size \[64, 96\] is not a square"):
        sample_side({"sample_size": [64, 96]})


def test_one_class_embedding_at_most() -> None:
    with pytest.raises(ConfigError, match="vector_dim and num_labels exclude each other"):
        UNetConfig(vector_dim=3, num_labels=4)
    with pytest.raises(ConfigError, match="vector_map is for vector_dim"):
        UNetConfig(vector_map="linear")
    with pytest.raises(
        ConfigError, match=r"vector_dim must be 1280 \(4 · channels\[0\]\) for vector_map identity, got 3"
    ):
        UNetConfig(vector_dim=3, vector_map="identity")
    with pytest.raises(ConfigError, match="vector_map must be one of mlp, linear, identity"):
        UNetConfig(vector_dim=3, vector_map="none")


def test_labels_are_asked_for_and_refused() -> None:
    x, t = torch.zeros(1, 1, 4, 4), torch.tensor([0])
    labelled, without = (UNet(UNetConfig((8,), 1, (), (1,), groups=4, num_labels=n), 1, 1, None) for n in (3, None))
    with pytest.raises(ValueError, match="takes a label condition, and none was given"):
        labelled(x, t, Condition())
    with pytest.raises(ValueError, match="takes no label condition, and one was given"):
        without(x, t, Condition(labels=torch.tensor([2])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_attention_has_its_scores_in_float32(dtype: torch.dtype) -> None:
    """Scores beyond the largest half (65504) neither overflow nor lose more precision than the inputs."""
    torch.manual_seed(0)
    attention = Attention(32, 1).to(dtype)
    for linear, scale in ((attention.to_q, 40.0), (attention.to_k, 40.0)):
        linear.weight.copy_(scale * torch.eye(32))
    attention.to_v.weight.copy_(torch.eye(32))
    attention.to_out[0].weight.copy_(torch.eye(32))
    attention.to_out[0].bias.zero_()
    x = (0.3 + torch.rand(1, 64, 32)).mul(3).to(dtype)
    q = attention.to_q(x)
    if dtype is torch.float16:
        assert (q @ q.mT).isinf().any()
    scores = q.float() @ q.float().mT / 32**0.5
    expected = scores.softmax(2) @ x.float()
    assert_close = torch.testing.assert_close
    assert_close(attention(x).float(), expected, rtol=2e-2, atol=2e-2)


# ---------------------------------------------------------------- autoencoder

VAE = {
    "block_out_channels": (8, 16, 16, 16), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 4, "sample_size": 32,
}  # fmt: skip
VAES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "kl-f8": (VAE, (16, 24)),
    "16 latent channels": (
        VAE | {"latent_channels": 16, "scaling_factor": 0.36, "shift_factor": 0.1, "layers_per_block": 1}, (16, 16),
    ),
    "grey, no attention": (
        VAE | {"in_channels": 1, "out_channels": 1, "mid_block_add_attention": False, "layers_per_block": 3}, (8, 16),
    ),
    "kl-f4": ({**VAE, "block_out_channels": (8, 16, 12), "down_block_types": ("DownEncoderBlock2D",) * 3,
               "up_block_types": ("UpDecoderBlock2D",) * 3, "latent_channels": 3}, (12, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", VAES)
def test_autoencoder_and_its_gradients_are_those_of_diffusers(name: str, tmp_path: Path) -> None:
    """Posterior means, log-variances, decoded images, and their gradients by every parameter and input."""
    theirs: Any = diffusers.AutoencoderKL(**VAES[name][0])
    stir(theirs)
    theirs.save_pretrained(tmp_path)
    config = from_diffusers(json.loads((tmp_path / "config.json").read_text()))
    ours = read_module(lambda: AutoencoderKL(config), tmp_path / WEIGHTS).train().requires_grad_()
    torch.manual_seed(1)
    image = torch.randn(2, config.image_channels, *VAES[name][1])
    latent = torch.randn(2, config.latent_channels, *(side // config.factor for side in VAES[name][1]))
    outputs, gradients = [], []
    for model in (ours, theirs):
        x, z = image.clone().requires_grad_(), latent.clone().requires_grad_()
        posterior = ours.encode(x) if model is ours else theirs.encode(x).latent_dist
        decoded = ours.decode(z) if model is ours else theirs.decode(z).sample
        outputs.append([posterior.mean, posterior.logvar, decoded])
        torch.manual_seed(2)
        sum((out * torch.randn(out.shape)).sum() for out in outputs[-1]).backward()  # type: ignore[union-attr]
        gradients.append({"x": x.grad, "z": z.grad, **{key: p.grad for key, p in model.named_parameters()}})
    for actual, expected in zip(*outputs, strict=True):
        assert_same(actual, expected)
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients[1].values())
    for key, expected in gradients[1].items():
        if key.endswith("to_k.bias"):  # a softmax does not see it: zero but for rounding
            assert max(gradients[0][key].abs().max(), expected.abs().max()) < 1e-5 * largest
        else:
            assert_same(gradients[0][key], expected, key)


@pytest.mark.parametrize("name", VAES)
def test_autoencoder_settings_go_there_and_back(name: str) -> None:
    """All but what is the pipeline's to say: the scale, and the size of a tile."""
    layout = dict(diffusers.AutoencoderKL(**VAES[name][0]).config)
    scale, shift = latent_scale(layout)
    back = {
        **to_diffusers(from_diffusers(layout)),
        "scaling_factor": scale,
        "shift_factor": shift or None,
        "sample_size": 32,
    }
    assert plain(diffusers.AutoencoderKL.from_config(back).config) == plain(layout)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_quant_conv": False}, "use_quant_conv is False: only True can be expressed"),
        ({"use_post_quant_conv": False}, "use_post_quant_conv is False"),
        ({"latents_mean": [0.1, 0.2, 0.3, 0.4]}, r"latents_mean is \[0.1.*only None can be expressed"),
        ({"latents_std": [1, 1, 1, 1]}, "latents_std"),
        ({"act_fn": "gelu"}, "act_fn is 'gelu'"),
        (
            {"scale_factor": None},
            "unknown key 'scale_factor' in the config of an AutoencoderKL: did you mean 'scaling_factor'",
        ),
        ({"latent_channels": "4"}, "latent_channels is '4': expected a whole number from 1"),
        ({"layers_per_block": 0}, "layers_per_block is 0"),
    ],
)
def test_autoencoder_settings_beyond_ours_are_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        from_diffusers({**VAE, **change})
    assert "\n" not in str(caught.value)


def test_an_absent_setting_has_the_default_of_diffusers() -> None:
    """What a config.json leaves out, taken one by one from their signature, changes nothing."""
    two = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (64, 64),
    }
    for cls, read_, given in (
        (diffusers.UNet2DConditionModel, unet_from_diffusers, {}),
        (diffusers.AutoencoderKL, from_diffusers, two),
    ):
        arguments: Any = inspect.signature(cls.__init__).parameters
        defaults = {name: p.default for name, p in arguments.items() if name != "self"} | given
        least = {name: defaults[name] for name in two}
        assert read_(least) == read_(defaults) and len(defaults) > 15
        for name, value in defaults.items():
            assert read_(least | {name: value}) == read_(least), name


def test_the_latent_scale_has_diffusers_defaults() -> None:
    assert latent_scale({}) == (0.18215, 0.0) and latent_scale({"scaling_factor": 1, "shift_factor": None}) == (
        1.0,
        0.0,
    )
    assert latent_scale({"scaling_factor": 0.36, "shift_factor": -0.5}) == (0.36, -0.5)
    for key, value in (
        ("scaling_factor", None),
        ("scaling_factor", 0.0),
        ("scaling_factor", "1"),
        ("shift_factor", float("nan")),
    ):
        with pytest.raises(ConfigError, match=f"{key} is {value!r}: expected a finite number"):
            latent_scale({key: value})


# ---------------------------------------------------------------- text

CAPTIONS = ["a small red circle", "", "two blue stars " * 40]


def saved_tower(folder: Path, layers: int = 3, shard: str = "1GB", **change: Any) -> Any:
    """A text encoder written by transformers, with only vocab.json and merges.txt, as in published folders."""
    tokenizer = train_tokenizer(["a small red circle", "two blue stars"], 12, 77)
    save_tokenizer(tokenizer, folder / "tokenizer")
    (folder / "tokenizer/tokenizer.json").unlink()
    written = folder / "tokenizer/tokenizer_config.json"
    written.write_text(
        json.dumps({**json.loads(written.read_text()), "pad_token": "!", "model_max_length": 77})
    )  # as SD 2's
    tower = {
        "hidden_size": 16,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "projection_dim": 8,
    }
    config = transformers.CLIPTextConfig(vocab_size=len(tokenizer), **{**tower, **change})
    model: Any = transformers.CLIPTextModel(config).eval()
    stir(model)
    model.save_pretrained(folder / "text_encoder", max_shard_size=shard)
    return model


@torch.no_grad()
def states(weights: Mapping[str, Tensor], ids: Tensor, layers: int, heads: int, activation: Any) -> Tensor:
    """CLIP's text tower made of torch's own encoder layers: pre-norm, causal, a final norm (Radford et al. 2021)."""
    w = {key.removeprefix("text_model."): value for key, value in weights.items()}
    x = w["embeddings.token_embedding.weight"][ids] + w["embeddings.position_embedding.weight"][: ids.shape[1]]
    mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
    names = {
        "linear1": "mlp.fc1",
        "linear2": "mlp.fc2",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "self_attn.out_proj": "self_attn.out_proj",
    }
    for i in range(layers):
        own = {
            key.removeprefix(f"encoder.layers.{i}."): value
            for key, value in w.items()
            if key.startswith(f"encoder.layers.{i}.")
        }
        layer = nn.TransformerEncoderLayer(
            x.shape[2], heads, own["mlp.fc1.bias"].numel(), 0.0, activation, 1e-5, True, True, device="meta"
        )
        state = {f"{mine}.{kind}": own[f"{its}.{kind}"] for mine, its in names.items() for kind in ("weight", "bias")}
        for kind in ("weight", "bias"):
            state[f"self_attn.in_proj_{kind}"] = torch.cat([own[f"self_attn.{letter}_proj.{kind}"] for letter in "qkv"])
        layer.load_state_dict(state, assign=True)
        x = layer.train()(x, src_mask=mask)  # in eval mode torch takes a fused path of its own
    return F.layer_norm(x, x.shape[2:], w["final_layer_norm.weight"], w["final_layer_norm.bias"])


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize(
    ("change", "activation"),
    [
        (
            {"hidden_act": "quick_gelu", "eos_token_id": 2, "bos_token_id": 0, "projection_dim": 768},
            quick_gelu,
        ),  # Stable Diffusion 1's file
        ({"hidden_act": "gelu", "num_attention_heads": 4, "projection_dim": 512}, F.gelu),  # Stable Diffusion 2's
    ],
)
@pytest.mark.parametrize("shard", ["1GB", "8KB"])
def test_text_states_are_those_of_the_published_tower(
    change: dict[str, Any], activation: Any, shard: str, tmp_path: Path
) -> None:
    theirs = saved_tower(tmp_path, shard=shard, **change)
    assert (tmp_path / "text_encoder/model.safetensors.index.json").is_file() == (shard == "8KB")
    ours = read_text(tmp_path)
    ids, cut = ours.tokenize(CAPTIONS)
    assert ids.shape == (3, 77) and cut == 1 and ids[1, 2:].eq(ours.tokenizer.convert_tokens_to_ids("!")).all()
    with torch.no_grad():
        expected = theirs(ids).last_hidden_state
    assert_same(ours.encode(CAPTIONS), expected)
    assert_same(expected, states(theirs.state_dict(), ids, 3, change.get("num_attention_heads", 2), activation))
    ours.save(tmp_path / "again")
    again: Any = transformers.CLIPTextModel.from_pretrained(tmp_path / "again/text_encoder")
    for key, value in theirs.config.to_dict().items():
        if key not in ("_name_or_path", "transformers_version"):
            assert again.config.to_dict()[key] == value, key
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), theirs.state_dict().values(), strict=True)
    )


def test_a_tokenizer_of_two_files_is_that_of_one(tmp_path: Path) -> None:
    """vocab.json and merges.txt, as published, or tokenizer.json alone: the same tokens."""
    saved_tower(tmp_path)
    expected = read_text(tmp_path)
    save_tokenizer(expected.tokenizer, tmp_path / "other")
    (tmp_path / "other/vocab.json").unlink()
    (tmp_path / "other/merges.txt").unlink()
    (tmp_path / "tokenizer").rename(tmp_path / "two files")
    (tmp_path / "other").rename(tmp_path / "tokenizer")
    assert torch.equal(read_text(tmp_path).tokenize(CAPTIONS)[0], expected.tokenize(CAPTIONS)[0])


def test_half_precision_and_a_text_tower_nested_in_a_whole_clip(tmp_path: Path) -> None:
    theirs = saved_tower(tmp_path)
    theirs.half().save_pretrained(tmp_path / "text_encoder")
    half = read_text(tmp_path)
    assert half.model.dtype == torch.float32
    file = tmp_path / "text_encoder/config.json"
    tower = json.loads(file.read_text()) | {
        "use_cache": True,
        "torchscript": False,
        "num_beams": 1,
        "pruned_heads": {},
        "dropout": 0.0,
    }
    file.write_text(
        json.dumps({"model_type": "clip", "text_config": tower, "vision_config": {}, "logit_scale_init_value": 2.6592})
    )
    assert torch.equal(read_text(tmp_path).encode(CAPTIONS), half.encode(CAPTIONS))
    ids = half.tokenize(CAPTIONS)[0]
    with torch.no_grad():
        assert_same(half.encode(CAPTIONS), theirs.float()(ids).last_hidden_state)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("text_encoder/config.json", {"hiden_size": 16}, "unknown key hiden_size: did you mean hidden_size?"),
        ("text_encoder/config.json", {"rotary": None}, "unknown key rotary of a CLIP text encoder"),
        ("text_encoder/config.json", {"hidden_act": "relu6"}, "hidden_act is 'relu6', but CLIP has quick_gelu or gelu"),
        ("text_encoder/config.json", {"num_hidden_layers": 2}, "layers.2.* belongs to no layer"),
        ("text_encoder/config.json", {"num_hidden_layers": "3"}, "num_hidden_layers"),
        ("text_encoder/config.json", {"num_attention_heads": 3}, "hidden size"),
        (
            "text_encoder/config.json",
            {"vocab_size": 49408},
            r"token_embedding.* is \[526, 16\], config.json says \[49408, 16\]",
        ),
        (
            "tokenizer/merges.txt",
            None,
            r"tokenizer holds no tokenizer.*merges\.txt \(vocab\.json alone is half of one\)",
        ),
        ("tokenizer/vocab.json", None, r"holds no tokenizer.*\(merges\.txt alone is half of one\)"),
        ("tokenizer/vocab.json", {"another</w>": 526}, "tokens but the text encoder"),
        ("tokenizer/vocab.json", "{", "tokenizer: "),
    ],
)
def test_faulty_text_folders_are_refused_in_one_line(file: str, change: Any, message: str, tmp_path: Path) -> None:
    saved_tower(tmp_path)
    path = tmp_path / file
    if change is None:
        path.unlink()
    else:
        path.write_text(change if isinstance(change, str) else json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FolderError, match=message) as caught:
        read_text(tmp_path)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- the published sizes

PUBLISHED = {  # the settings of the files as published, and how many parameters they give
    "unet of Stable Diffusion 1.5": (
        {"attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64},
        859_520_964,
    ),
    "unet of Stable Diffusion 2.1": (
        {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "sample_size": 96,
         "use_linear_projection": True,
         "upcast_attention": True},
        865_910_724,
    ),
    "vae": (
        {"block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
         "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 32,
         "sample_size": 512, "in_channels": 3, "out_channels": 3, "act_fn": "silu"},
        83_653_863,
    ),
    "text of Stable Diffusion 1.5": (
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
         "hidden_act": "quick_gelu",
         "projection_dim": 768, "eos_token_id": 2, "bos_token_id": 0, "vocab_size": 49408},
        123_060_480,
    ),
    "text of Stable Diffusion 2.1": (
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
         "hidden_act": "gelu",
         "projection_dim": 512, "eos_token_id": 2, "bos_token_id": 0, "vocab_size": 49408},
        340_387_840,
    ),
}  # fmt: skip
UNET_1, UNET_2, _, TEXT_1, TEXT_2 = PUBLISHED


def published_unet(name: str) -> dict[str, Any]:
    common = {
        "act_fn": "silu", "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False,
        "downsample_padding": 1,
        "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
        "mid_block_scale_factor": 1, "norm_eps": 1e-05,
        "norm_num_groups": 32, "out_channels": 4, **{key: list(value) for key, value in blocks("xxxo").items()},
    }  # fmt: skip
    return {**common, **PUBLISHED[name][0]}


def both(name: str) -> tuple[nn.Module, Any]:
    """The network of a published file, ours and theirs, on the meta device."""
    with torch.device("meta"):
        if name == "vae":
            return AutoencoderKL(from_diffusers(PUBLISHED[name][0])), diffusers.AutoencoderKL(**PUBLISHED[name][0])
        layout = published_unet(name)
        return unet_from_diffusers(layout).make(), diffusers.UNet2DConditionModel(**layout)


def share_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """The very same random tensors for both, no copy."""
    ours.to_empty(device="cpu")
    stir(ours)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    pairs = zip(
        ours.parameters(), (dict(theirs.named_parameters())[key] for key, _ in ours.named_parameters()), strict=True
    )
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", [UNET_1, UNET_2, "vae"])
def test_published_networks_have_their_parameters(name: str) -> None:
    ours, theirs = both(name)
    assert count(ours) == PUBLISHED[name][1]
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    if name != "vae":
        layout = published_unet(name)
        back = unet_to_diffusers(unet_from_diffusers(layout), sample_size=sample_side(layout))
        assert {key: plain(back)[key] for key in layout} == layout


@pytest.mark.parametrize("name", [TEXT_1, TEXT_2])
def test_published_text_encoders_have_their_parameters(name: str) -> None:
    with torch.device("meta"):
        assert (
            count(transformers.CLIPTextModel(transformers.CLIPTextConfig(**PUBLISHED[name][0]))) == PUBLISHED[name][1]
        )


@pytest.mark.parametrize(
    ("file", "name", "context_dim"),
    [("sd1/ldm.yaml", UNET_1, 768), ("sd2/ldm.yaml", UNET_2, 1024), ("sd1/autoencoder.yaml", "vae", None)],
)
def test_shipped_configurations_have_the_published_sizes(file: str, name: str, context_dim: int | None) -> None:
    path = ROOT / "configs" / file
    with torch.device("meta"):
        if context_dim is None:
            run = settings.load(settings.AutoencoderTrainingConfig, path)
            ours, theirs = AutoencoderKL(run.model), both(name)[0]
            assert run.model == from_diffusers(PUBLISHED[name][0])
        else:
            run = settings.load(settings.DiffusionTrainingConfig, path)
            ours, theirs = UNet(run.unet, 4, 4, context_dim), both(name)[0]
            assert run.unet == unet_from_diffusers(published_unet(name)).config
    assert count(ours) == PUBLISHED[name][1]
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    assert run.data.image_size % 8 == 0 and f"{PUBLISHED[name][1] / 1e6:.2f} M" in path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "width"), [(UNET_1, 768), (UNET_2, 1024)])
@torch.no_grad()
def test_published_unet_in_full(name: str, width: int) -> None:
    ours, theirs = both(name)
    share_weights(ours, theirs)
    x, t, context = torch.randn(1, 4, 32, 32), torch.tensor([801]), torch.randn(1, 77, width)
    assert_same(ours.eval()(x, t, Condition(context)), theirs.eval()(x, t, context).sample)


@pytest.mark.slow
@torch.no_grad()
def test_published_autoencoder_in_full() -> None:
    ours, theirs = both("vae")
    share_weights(ours, theirs)
    assert isinstance(ours, AutoencoderKL)
    posterior, expected = ours.encode(image := torch.randn(1, 3, 128, 128)), theirs.encode(image).latent_dist
    assert_same(posterior.mean, expected.mean)
    assert_same(posterior.logvar, expected.logvar)
    assert_same(ours.decode(expected.mean), theirs.decode(expected.mean).sample)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "activation"), [(TEXT_1, quick_gelu), (TEXT_2, F.gelu)])
def test_published_text_encoder_in_full(name: str, activation: Any, tmp_path: Path) -> None:
    """Written by transformers, read by us; its states are those of transformers' own model and of torch's layers."""
    tokenizer = transformers.CLIPTokenizer(
        vocab={**{f"token {i}": i for i in range(49406)}, "<|startoftext|>": 49406, "<|endoftext|>": 49407},
        merges=[],
        model_max_length=77,
    )
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    with torch.device("meta"):
        theirs: Any = transformers.CLIPTextModel(transformers.CLIPTextConfig(**PUBLISHED[name][0])).eval()
    theirs.to_empty(device="cpu")
    stir(theirs)
    for module in theirs.modules():  # a buffer that is not saved, and so lost on the meta device
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(77)[None]
    theirs.save_pretrained(tmp_path / "text_encoder")
    ours = read_text(tmp_path)
    ids = torch.randint(49408, (2, 77))
    layers, heads = PUBLISHED[name][0]["num_hidden_layers"], PUBLISHED[name][0]["num_attention_heads"]
    with torch.no_grad():
        expected = theirs(ids).last_hidden_state
    assert_same(ours.encode_ids(ids), expected)
    assert_same(expected, states(theirs.state_dict(), ids, layers, heads, activation))
