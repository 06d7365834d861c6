"""Single files in CompVis' layout: its names, its tables, what diffusers reads of ours, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.loaders import single_file_utils
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.single_files import (
    openclip_file,
    prefixed,
    published,
    scheduler,
    text_config,
    text_part,
    unet_part,
    vae_part,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from autoencoder.config import AutoencoderConfig
from autoencoder.layout import to_diffusers as vae_to_diffusers
from ldm.config import SCHEDULES, ConfigError, ScheduleConfig, UNetConfig
from ldm.diffusion.schedule import Schedule
from ldm.errors import FolderError
from ldm.interop.bundle import TEXT, UNET, VAE, Bundle, Part
from ldm.interop.compvis.inferred import Hints
from ldm.interop.compvis.layout import from_compvis, to_compvis
from ldm.interop.compvis.schedule import buffers
from ldm.interop.diffusers.schedulers import scheduler_to_diffusers
from ldm.interop.diffusers.unet import unet_to_diffusers
from ldm.models.clip import train_tokenizer
from ldm.models.unet import NetworkSpec

# ---------------------------------------------------------------- models


SD1 = unet_to_diffusers(NetworkSpec(UNetConfig((32, 32, 64, 64), heads=(8,)), 4, 4, 768), 64)
SD2 = unet_to_diffusers(
    NetworkSpec(UNetConfig((64, 64, 128, 128), heads=(1, 1, 2, 2), linear_projection=True), 4, 4, 1024), 96
)
KL8 = AutoencoderConfig(channels=(32, 32, 64, 64))


@pytest.fixture(scope="module")
def sd1() -> Bundle:
    """Stable Diffusion 1 to those who look at its kind of projection and context, and as small as that can be."""
    torch.manual_seed(0)
    unet = unet_to_diffusers(NetworkSpec(UNetConfig((32,), 1, (), (8,)), 4, 4, 768), 64)
    vae = AutoencoderConfig(channels=(32, 32, 32, 64), layers_per_level=1)
    return Bundle({UNET: unet_part(unet), VAE: vae_part(vae), TEXT: text_part(text_config(layers=1))}, scheduler())


def same(a: Bundle, b: Bundle) -> bool:
    """Equal bit for bit, configurations and all but what was left over."""
    assert a.parts.keys() == b.parts.keys()
    for name, part in a.parts.items():
        other = b.parts[name]
        assert part.tensors.keys() == other.tensors.keys()
        assert all(
            t.dtype == other.tensors[key].dtype and torch.equal(t, other.tensors[key])
            for key, t in part.tensors.items()
        )
        assert part.config == other.config, name
    return (a.scheduler, a.tokenizer, a.extra) == (b.scheduler, b.tokenizer, b.extra)


# ---------------------------------------------------------------- names

UNET_NAMES = {  # of the published Stable Diffusion 1.5: name there, name in diffusers, shape
    "time_embed.0.weight": ("time_embedding.linear_1.weight", (1280, 320)),
    "time_embed.2.bias": ("time_embedding.linear_2.bias", (1280,)),
    "input_blocks.0.0.weight": ("conv_in.weight", (320, 4, 3, 3)),
    "input_blocks.1.0.in_layers.0.weight": ("down_blocks.0.resnets.0.norm1.weight", (320,)),
    "input_blocks.1.0.in_layers.2.weight": ("down_blocks.0.resnets.0.conv1.weight", (320, 320, 3, 3)),
    "input_blocks.1.0.emb_layers.1.weight": ("down_blocks.0.resnets.0.time_emb_proj.weight", (320, 1280)),
    "input_blocks.1.0.out_layers.0.bias": ("down_blocks.0.resnets.0.norm2.bias", (320,)),
    "input_blocks.1.0.out_layers.3.weight": ("down_blocks.0.resnets.0.conv2.weight", (320, 320, 3, 3)),
    "input_blocks.1.1.norm.weight": ("down_blocks.0.attentions.0.norm.weight", (320,)),
    "input_blocks.1.1.proj_in.weight": ("down_blocks.0.attentions.0.proj_in.weight", (320, 320, 1, 1)),
    "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (
        "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k.weight", (320, 768),
    ),
    "input_blocks.2.1.transformer_blocks.0.ff.net.0.proj.weight": (
        "down_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj.weight", (2560, 320),
    ),
    "input_blocks.3.0.op.weight": ("down_blocks.0.downsamplers.0.conv.weight", (320, 320, 3, 3)),
    "input_blocks.4.0.skip_connection.weight": ("down_blocks.1.resnets.0.conv_shortcut.weight", (640, 320, 1, 1)),
    "input_blocks.8.1.transformer_blocks.0.attn1.to_out.0.bias": (
        "down_blocks.2.attentions.1.transformer_blocks.0.attn1.to_out.0.bias", (1280,),
    ),
    "input_blocks.9.0.op.bias": ("down_blocks.2.downsamplers.0.conv.bias", (1280,)),
    "input_blocks.11.0.out_layers.3.bias": ("down_blocks.3.resnets.1.conv2.bias", (1280,)),
    "middle_block.0.in_layers.2.weight": ("mid_block.resnets.0.conv1.weight", (1280, 1280, 3, 3)),
    "middle_block.1.transformer_blocks.0.norm3.weight": (
        "mid_block.attentions.0.transformer_blocks.0.norm3.weight", (1280,),
    ),
    "middle_block.2.emb_layers.1.bias": ("mid_block.resnets.1.time_emb_proj.bias", (1280,)),
    "output_blocks.0.0.skip_connection.weight": ("up_blocks.0.resnets.0.conv_shortcut.weight", (1280, 2560, 1, 1)),
    "output_blocks.2.1.conv.weight": ("up_blocks.0.upsamplers.0.conv.weight", (1280, 1280, 3, 3)),
    "output_blocks.3.1.proj_out.bias": ("up_blocks.1.attentions.0.proj_out.bias", (1280,)),
    "output_blocks.5.2.conv.weight": ("up_blocks.1.upsamplers.0.conv.weight", (1280, 1280, 3, 3)),
    "output_blocks.6.0.in_layers.0.weight": ("up_blocks.2.resnets.0.norm1.weight", (1920,)),
    "output_blocks.8.2.conv.bias": ("up_blocks.2.upsamplers.0.conv.bias", (640,)),
    "output_blocks.11.1.transformer_blocks.0.ff.net.2.bias": (
        "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.2.bias", (320,),
    ),
    "out.0.weight": ("conv_norm_out.weight", (320,)),
    "out.2.weight": ("conv_out.weight", (4, 320, 3, 3)),
}  # fmt: skip
VAE_NAMES = {
    "encoder.conv_in.weight": ("encoder.conv_in.weight", (128, 3, 3, 3)),
    "encoder.down.0.block.1.norm2.weight": ("encoder.down_blocks.0.resnets.1.norm2.weight", (128,)),
    "encoder.down.1.block.0.nin_shortcut.weight": (
        "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
        (256, 128, 1, 1),
    ),
    "encoder.down.2.downsample.conv.weight": ("encoder.down_blocks.2.downsamplers.0.conv.weight", (512, 512, 3, 3)),
    "encoder.mid.block_2.conv1.weight": ("encoder.mid_block.resnets.1.conv1.weight", (512, 512, 3, 3)),
    "encoder.mid.attn_1.norm.weight": ("encoder.mid_block.attentions.0.group_norm.weight", (512,)),
    "encoder.mid.attn_1.q.weight": ("encoder.mid_block.attentions.0.to_q.weight", (512, 512, 1, 1)),
    "decoder.mid.attn_1.k.weight": ("decoder.mid_block.attentions.0.to_k.weight", (512, 512, 1, 1)),
    "decoder.mid.attn_1.v.bias": ("decoder.mid_block.attentions.0.to_v.bias", (512,)),
    "decoder.mid.attn_1.proj_out.weight": ("decoder.mid_block.attentions.0.to_out.0.weight", (512, 512, 1, 1)),
    "encoder.norm_out.weight": ("encoder.conv_norm_out.weight", (512,)),
    "encoder.conv_out.weight": ("encoder.conv_out.weight", (8, 512, 3, 3)),
    "decoder.up.3.block.2.conv2.weight": ("decoder.up_blocks.0.resnets.2.conv2.weight", (512, 512, 3, 3)),
    "decoder.up.3.upsample.conv.weight": ("decoder.up_blocks.0.upsamplers.0.conv.weight", (512, 512, 3, 3)),
    "decoder.up.1.block.0.nin_shortcut.weight": (
        "decoder.up_blocks.2.resnets.0.conv_shortcut.weight",
        (256, 512, 1, 1),
    ),
    "decoder.up.0.block.0.nin_shortcut.bias": ("decoder.up_blocks.3.resnets.0.conv_shortcut.bias", (128,)),
    "decoder.norm_out.bias": ("decoder.conv_norm_out.bias", (128,)),
    "quant_conv.weight": ("quant_conv.weight", (8, 8, 1, 1)),
    "post_quant_conv.weight": ("post_quant_conv.weight", (4, 4, 1, 1)),
}
TEXT_NAMES = {
    name: ("text_model." + name, shape)
    for name, shape in {
        "embeddings.token_embedding.weight": (49408, 768),
        "embeddings.position_embedding.weight": (77, 768),
        "encoder.layers.11.self_attn.q_proj.weight": (768, 768),
        "encoder.layers.0.mlp.fc1.weight": (3072, 768),
        "final_layer_norm.bias": (768,),
    }.items()
}
PREFIXED = {
    **{"model.diffusion_model." + name: (UNET, *rest) for name, rest in UNET_NAMES.items()},
    **{"first_stage_model." + name: (VAE, *rest) for name, rest in VAE_NAMES.items()},
    **{"cond_stage_model.transformer.text_model." + name: (TEXT, *rest) for name, rest in TEXT_NAMES.items()},
}


def size(tensors: dict[str, Tensor], prefix: str) -> tuple[int, int]:
    """Tensors and numbers."""
    found = [t.numel() for name, t in tensors.items() if name.startswith(prefix)]
    return len(found), sum(found)


def test_names_and_shapes_of_stable_diffusion_1() -> None:
    text = {**text_config(layers=12, inner=3072), "vocab_size": 49408, "max_position_embeddings": 77}
    bundle = published(unet_to_diffusers(NetworkSpec(UNetConfig(), 4, 4, 768), 64), text)
    tensors, _ = to_compvis(bundle)
    assert size(tensors, "model.diffusion_model.") == (686, 859_520_964)
    assert size(tensors, "first_stage_model.") == (248, 83_653_863)
    assert size(tensors, "cond_stage_model.") == (196, 123_060_480)
    read = from_compvis(tensors)
    for place, (part, name, shape) in PREFIXED.items():
        assert tuple(tensors[place].shape) == shape, place
        given = bundle.parts[part].tensors[name]
        assert tensors[place]._base is given and read.parts[part].tensors[name]._base is given, place  # views
    assert read.parts[UNET].config == bundle.parts[UNET].config and read.scheduler == bundle.scheduler


def test_names_of_stable_diffusion_2() -> None:
    config = unet_to_diffusers(
        NetworkSpec(UNetConfig(heads=(5, 10, 20, 20), linear_projection=True, upcast_attention=True), 4, 4, 1024), 96
    )
    vocabulary = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "max_position_embeddings": 77}
    text = {**text_config(1024, 23, 16, "gelu", 4096), **vocabulary}
    tensors, _ = to_compvis(published(config, text), openclip=True)
    assert size(tensors, "model.diffusion_model.") == (686, 865_910_724)
    shapes = {
        "token_embedding.weight": (49408, 1024),
        "positional_embedding": (77, 1024),
        "ln_final.weight": (1024,),
        "transformer.resblocks.0.ln_1.weight": (1024,),
        "transformer.resblocks.22.attn.in_proj_weight": (3072, 1024),
        "transformer.resblocks.22.attn.in_proj_bias": (3072,),
        "transformer.resblocks.7.attn.out_proj.weight": (1024, 1024),
        "transformer.resblocks.7.mlp.c_fc.weight": (4096, 1024),
        "transformer.resblocks.7.mlp.c_proj.bias": (1024,),
    }
    for name, shape in shapes.items():
        assert tuple(tensors["cond_stage_model.model." + name].shape) == shape, name
    assert size(tensors, "cond_stage_model.") == (4 + 23 * 12, 340_387_840)
    read = from_compvis(tensors, hints=Hints(prediction="v"))
    assert (
        read.parts[UNET].config == config
        and read.parts[TEXT].config == text
        and read.scheduler["prediction_type"] == "v_prediction"
    )
    base = from_compvis(tensors, hints=Hints(prediction="eps"))
    assert (base.parts[UNET].config["sample_size"], base.scheduler["prediction_type"]) == (64, "epsilon")
    assert (
        base.parts[UNET].config["upcast_attention"] is False
    )  # as published, which v2.1 (768) needs in half precision


# ---------------------------------------------------------------- diffusers reads ours

STRUCTURES = {
    "sd1": SD1,
    "sd2": SD2,
    "inpainting": unet_to_diffusers(
        NetworkSpec(UNetConfig((32, 64), heads=(8,), attention_levels=(0,), concat_channels=5), 4, 4, 768), 64
    ),
    "vector": unet_to_diffusers(
        NetworkSpec(
            UNetConfig((32, 64), vector_dim=6, scale_shift=True, transformer_layers=2, attention_levels=(0, 1)),
            4,
            4,
            768,
        ),
        64,
    ),
    "attention elsewhere": unet_to_diffusers(
        NetworkSpec(
            UNetConfig((32, 32, 64, 64), attention_levels=(1, 3), layers_per_level=1, heads=(2, 4, 8, 1)), 4, 4, 20
        ),
        64,
    ),
    "classes": {
        **unet_to_diffusers(NetworkSpec(UNetConfig((32, 64), attention_levels=(1,)), 4, 4, 768), 64),
        "num_class_embeds": 10,
    },
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_diffusers_converts_our_unet_back(name: str) -> None:
    config = STRUCTURES[name]
    theirs = diffusers.UNet2DConditionModel.from_config(config)
    state = theirs.state_dict()
    bundle = Bundle({UNET: Part(config, state)}, scheduler())
    tensors, metadata = to_compvis(bundle)
    back = single_file_utils.convert_ldm_unet_checkpoint(dict(tensors), theirs.config)
    assert back.keys() == state.keys() and all(torch.equal(back[key], t) for key, t in state.items())
    assert same(from_compvis(tensors, metadata), bundle)


@pytest.mark.parametrize("config", [KL8, AutoencoderConfig(3, 4, (32, 64), 1)])
def test_diffusers_converts_our_vae_back(config: AutoencoderConfig) -> None:
    vae = vae_part(config)
    tensors, _ = to_compvis(Bundle({VAE: vae}))
    back = single_file_utils.convert_ldm_vae_checkpoint(dict(tensors), vae.config)
    assert back.keys() == vae.tensors.keys() and all(torch.equal(back[key], t) for key, t in vae.tensors.items())


@pytest.mark.parametrize("openclip", [False, True])
def test_diffusers_converts_our_text_encoder_back(openclip: bool) -> None:
    text = text_part(text_config(16, 3, 2, "gelu"))
    tensors, _ = to_compvis(Bundle({TEXT: text}), openclip)
    if openclip:
        with torch.device("meta"):
            network = CLIPTextModel(CLIPTextConfig(**text.config))
        back = single_file_utils.convert_open_clip_checkpoint(network, tensors)
    else:
        back = single_file_utils.convert_ldm_clip_checkpoint(tensors)
    assert back.keys() == text.tensors.keys() and all(torch.equal(back[key], t) for key, t in text.tensors.items())


def test_a_file_opens_as_a_diffusers_pipeline(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a red circle"], 4, 7)
    config = {**text_config(32, 2, 2), "vocab_size": len(tokenizer)}
    text = CLIPTextModel(CLIPTextConfig(**config))
    unet = diffusers.UNet2DConditionModel.from_config({**SD1, "cross_attention_dim": 32})
    vae = diffusers.AutoencoderKL.from_config(vae_to_diffusers(KL8))
    ddim = diffusers.DDIMScheduler.from_config(scheduler())
    pipe = diffusers.StableDiffusionPipeline(
        vae, text, tokenizer, unet, ddim, None, None, requires_safety_checker=False
    )
    pipe.save_pretrained(tmp_path / "folder")
    parts = {UNET: Part(dict(unet.config), unet.state_dict()), VAE: Part(dict(vae.config), vae.state_dict())}
    parts[TEXT] = Part(config, prefixed(text.state_dict()))
    tensors, metadata = to_compvis(Bundle(parts, dict(ddim.config)))
    save_file(tensors, tmp_path / "file.safetensors", metadata)
    read = diffusers.StableDiffusionPipeline.from_single_file(
        str(tmp_path / "file.safetensors"), config=str(tmp_path / "folder")
    )
    for a, b in ((pipe.unet, read.unet), (pipe.vae, read.vae), (pipe.text_encoder, read.text_encoder)):
        state = b.state_dict()
        assert all(torch.equal(t, state[name]) for name, t in a.state_dict().items()) and len(state) == len(
            a.state_dict()
        )


# ---------------------------------------------------------------- round trips


def any_model(draw: Callable[[st.SearchStrategy], Any]) -> Bundle:
    """Any small model that a single file holds, its tensors in mixed dtypes."""
    groups = draw(st.sampled_from([1, 2, 4]))
    levels = draw(st.sampled_from([1, 2, 2, 3]))
    channels = tuple(groups * 2 * k for k in draw(st.lists(st.integers(1, 3), min_size=levels, max_size=levels)))
    per_level = draw(st.booleans())
    divisors = [[h for h in range(1, c + 1) if c % h == 0] for c in channels]
    heads = tuple(draw(st.sampled_from(found)) for found in divisors) if per_level else (2,)
    layers = draw(st.sampled_from([1, 1, 2]))
    unet = UNetConfig(
        channels, layers, tuple(sorted(draw(st.sets(st.integers(0, levels - 1))))), heads, draw(st.integers(1, 2)),
        groups, draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([None, 3])),
        draw(st.sampled_from([0, 1, 5])),
    )  # fmt: skip
    vae = None
    if draw(st.booleans()):
        width = draw(st.lists(st.sampled_from([2, 4]), min_size=2, max_size=4))
        attention = tuple(sorted(draw(st.sets(st.integers(0, len(width) - 1)))))
        sizes = (draw(st.integers(1, 4)), draw(st.integers(1, 4)), tuple(width), draw(st.integers(1, 2)))
        vae = AutoencoderConfig(*sizes, 2, draw(st.booleans()), attention)
    channels_in, context = (vae.latent_channels if vae else draw(st.integers(1, 4))), draw(st.integers(1, 3)) * 2
    learned = draw(st.booleans())
    parts = {
        UNET: unet_part(unet_to_diffusers(NetworkSpec(unet, channels_in, (1 + learned) * channels_in, context), 8))
    }
    if vae is not None:
        parts[VAE] = vae_part(vae, draw(st.floats(0.1, 10.0)))
    tokenizer: dict[str, bytes] = {}
    if draw(st.booleans()):
        parts[TEXT] = text_part(
            text_config(context, draw(st.integers(1, 3)), 2, draw(st.sampled_from(["gelu", "quick_gelu"])))
        )
        tokenizer = {"vocab.json": draw(st.sampled_from(["", '{"ü": 1}'])).encode(), "merges.txt": b"#version: 0.2\n"}
    schedule = ScheduleConfig(
        draw(st.sampled_from(sorted(SCHEDULES))), draw(st.integers(25, 30)), zero_terminal_snr=draw(st.booleans())
    )
    target = draw(st.sampled_from(["v", "x0"] if schedule.zero_terminal_snr else ["eps", "v", "x0"]))
    dtypes = np.random.default_rng(draw(st.integers(0, 9)))
    kinds = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
    mixed = {
        name: Part(part.config, {key: t.to(kinds[dtypes.integers(4)]) for key, t in part.tensors.items()})
        for name, part in parts.items()
    }
    return Bundle(mixed, scheduler_to_diffusers(schedule, target), tokenizer, {"format": 1, "null_caption": "\u2603"})


def hints_for(bundle: Bundle) -> Hints:
    """All that a file does not say of this model."""
    unet, text, vae = (bundle.parts[name].config if name in bundle.parts else {} for name in (UNET, TEXT, VAE))
    names = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
    heads = unet["attention_head_dim"]
    return Hints(
        prediction=names[bundle.scheduler["prediction_type"]], heads=heads if isinstance(heads, int) else tuple(heads),
        groups=unet["norm_num_groups"],
        vae_groups=vae.get("norm_num_groups"), scale=vae.get("scaling_factor"),
        image_size=unet["sample_size"] * 2 ** (len(vae.get("block_out_channels", [0])) - 1),
        text_heads=text.get("num_attention_heads"), text_act=text.get("hidden_act"),
    )  # fmt: skip


@pytest.mark.parametrize(("given_channels", "concat"), [(3, 0), (6, 0), (3, 5)])
def test_pixel_models_with_and_without_a_learned_variance(given_channels: int, concat: int) -> None:
    config = unet_to_diffusers(
        NetworkSpec(UNetConfig((32,), 1, (), (8,), concat_channels=concat), 3, given_channels, 20), 64
    )
    tensors, _ = to_compvis(Bundle({UNET: unet_part(config)}, scheduler()))
    read = from_compvis(tensors, hints=Hints(prediction="eps", heads=8, image_size=64)).parts[UNET].config
    assert read == config and ("learned_variance" in read) == (given_channels == 6)


@pytest.mark.parametrize("examples", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_round_trips(examples: int) -> None:
    checks = settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    checks(given(data=st.data())(round_trip))()


def round_trip(data: st.DataObject) -> None:
    """Out and in again, with the header and without."""
    bundle = any_model(data.draw)
    tensors, metadata = to_compvis(bundle)
    assert set(map(type, metadata.values())) == {str} and metadata["format"] == "pt"
    read = from_compvis(tensors, metadata)
    assert same(read, bundle)
    assert set(read.unused) == set(buffers(Schedule.from_config(ScheduleConfig(num_steps=2)))) | (
        {"scale_factor"} if VAE in bundle.parts else set()
    )
    unet = bundle.parts[UNET].config
    if VAE not in bundle.parts and unet.get("learned_variance") and unet["in_channels"] != unet["out_channels"] / 2:
        return  # without an autoencoder nobody can tell a learned variance from concatenated channels
    guessed = from_compvis(tensors, {"format": "pt"}, hints=hints_for(bundle))
    assert same(
        dataclasses.replace(guessed, scheduler=None),
        dataclasses.replace(bundle, scheduler=None, tokenizer={}, extra={}),
    )


# ---------------------------------------------------------------- OpenCLIP


def openclip_states(tensors: dict[str, Tensor], ids: Tensor, heads: int) -> Tensor:
    """The text tower as open_clip has it, without its last block, then ln_final: what Stable Diffusion 2 takes."""
    tensors = {name.removeprefix("cond_stage_model.model."): t for name, t in tensors.items()}
    x = tensors["token_embedding.weight"][ids] + tensors["positional_embedding"]
    width, length = x.shape[2], ids.shape[1]
    mask = torch.full((length, length), float("-inf")).triu(1)
    blocks = max(int(name.split(".")[2]) for name in tensors if name.startswith("transformer.")) + 1
    for block in range(blocks - 1):
        own = {
            k.removeprefix(f"transformer.resblocks.{block}."): t
            for k, t in tensors.items()
            if f"resblocks.{block}." in k
        }
        attention = nn.MultiheadAttention(width, heads, batch_first=True)
        attention.load_state_dict({k.removeprefix("attn."): t for k, t in own.items() if k.startswith("attn.")})
        h = F.layer_norm(x, (width,), own["ln_1.weight"], own["ln_1.bias"])
        x = x + attention(h, h, h, attn_mask=mask, need_weights=False)[0]
        h = F.layer_norm(x, (width,), own["ln_2.weight"], own["ln_2.bias"])
        h = F.gelu(F.linear(h, own["mlp.c_fc.weight"], own["mlp.c_fc.bias"]))
        x = x + F.linear(h, own["mlp.c_proj.weight"], own["mlp.c_proj.bias"])
    return F.layer_norm(x, (width,), tensors["ln_final.weight"], tensors["ln_final.bias"])


def test_openclip_gives_the_same_states() -> None:
    tensors = openclip_file()
    read = from_compvis(tensors, hints=Hints(text_heads=2, text_layers=3))
    part = read.parts[TEXT]
    network = CLIPTextModel(CLIPTextConfig(**part.config)).eval()
    own = {name: name.removeprefix("text_model.") for name in part.tensors}
    flat = not any(name.startswith("text_model.") for name in network.state_dict())
    network.load_state_dict({own[name] if flat else name: t for name, t in part.tensors.items()})
    ids = torch.randint(40, (3, 7))
    with torch.no_grad():
        ours, expected = network(input_ids=ids).last_hidden_state, openclip_states(tensors, ids, 2)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    unused = {name for name in tensors if ".resblocks.3." in name}
    assert set(read.unused) == unused | {
        "cond_stage_model.model.text_projection",
        "cond_stage_model.model.logit_scale",
    }
    written, metadata = to_compvis(read, openclip=True)
    assert written.keys() == tensors.keys() - read.unused.keys()
    assert all(torch.equal(t, tensors[name]) for name, t in written.items())
    assert same(from_compvis(written, metadata), dataclasses.replace(read, unused={}))
    other, _ = to_compvis(read)
    assert "cond_stage_model.transformer.text_model.encoder.layers.2.self_attn.k_proj.bias" in other


def test_openclip_where_dtypes_differ() -> None:
    text = text_part(text_config(16, 1, 2, "gelu"))
    mixed = {name: t.half() if name.endswith("0.self_attn.q_proj.bias") else t for name, t in text.tensors.items()}
    with pytest.raises(ConfigError, match=r"resblocks\.0\.attn\.in_proj_bias joins several .*float16"):
        to_compvis(Bundle({TEXT: Part(text.config, mixed)}), openclip=True)


# ---------------------------------------------------------------- the schedule's tables


def compvis_tables(betas: np.ndarray) -> dict[str, np.ndarray]:
    """What `register_schedule` of latent-diffusion computes, in float64."""
    bar = np.cumprod(1 - betas)
    previous = np.append(1.0, bar[:-1])
    with np.errstate(divide="ignore"):
        variance = betas * (1 - previous) / (1 - bar)
        return {
            "betas": betas, "alphas_cumprod": bar, "alphas_cumprod_prev": previous, "sqrt_alphas_cumprod": np.sqrt(bar),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - bar), "log_one_minus_alphas_cumprod": np.log(1 - bar),
            "sqrt_recip_alphas_cumprod": np.sqrt(1 / bar), "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / bar - 1),
            "posterior_variance": variance, "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
            "posterior_mean_coef1": betas * np.sqrt(previous) / (1 - bar),
            "posterior_mean_coef2": (1 - previous) * np.sqrt(1 - betas) / (1 - bar),
        }  # fmt: skip


PUBLISHED_BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
TABLES = {name: torch.tensor(table).float() for name, table in compvis_tables(PUBLISHED_BETAS).items()}


def test_tables_are_those_of_latent_diffusion(sd1: Bundle) -> None:
    tensors, _ = to_compvis(sd1)
    for name, table in TABLES.items():
        torch.testing.assert_close(tensors[name], table, rtol=1e-6, atol=0)
    betas = np.append(np.linspace(1e-3, 0.3, 19), 1.0)
    tables, expected = buffers(Schedule(torch.tensor(betas))), compvis_tables(betas)
    assert tables.keys() == expected.keys()
    for name, table in expected.items():
        torch.testing.assert_close(tables[name], torch.tensor(table), rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_published_tables_are_recognised(sd1: Bundle, dtype: torch.dtype) -> None:
    tensors = to_compvis(sd1)[0] | {name: table.to(dtype) for name, table in TABLES.items()}
    read = from_compvis(tensors)
    assert read.scheduler == scheduler() and set(read.unused) == set(TABLES)


@pytest.mark.parametrize(
    "schedule", [ScheduleConfig(name, 50) for name in sorted(SCHEDULES)] + [ScheduleConfig(zero_terminal_snr=True)]
)
def test_other_tables_are_taken_as_they_are(sd1: Bundle, schedule: ScheduleConfig) -> None:
    tensors, _ = to_compvis(dataclasses.replace(sd1, scheduler=scheduler("v", schedule)))
    read = from_compvis(tensors, hints=Hints(prediction="v"))
    assert read.scheduler is not None
    torch.testing.assert_close(
        torch.tensor(read.scheduler["trained_betas"]), Schedule.from_config(schedule).betas.float()
    )
    assert set(TABLES) == set(read.unused)


@pytest.mark.parametrize("name", TABLES)
def test_a_changed_table_is_refused(sd1: Bundle, name: str) -> None:
    tensors, metadata = to_compvis(sd1)
    table = tensors[name].clone()
    table[500] *= 1.001
    for headers in ({}, metadata):
        with pytest.raises(FolderError, match=r"does not fit the schedule: at step \d+ it is") as caught:
            from_compvis({**tensors, name: table}, headers)
        assert (
            name in str(caught.value) or name == "betas"
        )  # another beta is another schedule, which the next table does not fit
        with pytest.raises(FolderError, match=rf"tensor {name} "):
            from_compvis({**tensors, name: table[:-1]}, metadata)


def test_weights_of_the_bound_and_log_variances(sd1: Bundle) -> None:
    tensors, _ = to_compvis(sd1)
    bar = np.cumprod(1 - PUBLISHED_BETAS)
    with np.errstate(divide="ignore"):
        bound = PUBLISHED_BETAS**2 / (
            2 * compvis_tables(PUBLISHED_BETAS)["posterior_variance"] * (1 - PUBLISHED_BETAS) * (1 - bar)
        )
    bound[0] = bound[1]
    extra = {"lvlb_weights": torch.tensor(bound).float(), "logvar": torch.zeros(1000)}
    assert {"lvlb_weights", "logvar"} <= set(from_compvis(tensors | extra).unused)
    with pytest.raises(FolderError, match="lvlb_weights does not fit"):
        from_compvis(tensors | extra, hints=Hints(prediction="v"))


# ---------------------------------------------------------------- EMA


def with_ema(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As LitEma names them: the wrapper's parameters without dots."""
    inside = {
        n.removeprefix("model.").replace(".", ""): t + 1
        for n, t in tensors.items()
        if n.startswith("model.diffusion_model.")
    }
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7, dtype=torch.int32)}
    return tensors | {"model_ema." + name: t for name, t in inside.items()} | counters


def test_ema_or_raw(sd1: Bundle) -> None:
    tensors, metadata = to_compvis(sd1)
    both = with_ema(tensors)
    assert "model_ema.diffusion_modelinput_blocks00weight" in both
    raw, ema, default = (from_compvis(both, metadata, weights) for weights in ("raw", "ema", None))
    assert same(raw, sd1) and same(ema, default)
    for name, t in sd1.parts[UNET].tensors.items():
        assert torch.equal(ema.parts[UNET].tensors[name], t + 1)
    flat = {name for name in both if name.startswith("model_ema.")}
    assert flat <= set(raw.unused) and not flat & set(tensors)
    assert {name for name in both if name.startswith("model.")} <= set(ema.unused)
    assert "their EMA was used" in ema.unused["model.diffusion_model.out.2.weight"]
    del both["model_ema.diffusion_modelout2bias"]
    with pytest.raises(
        FolderError,
        match=r"model_ema\.diffusion_modelout2bias is missing: the EMA has no copy of model\.diffusion_model\.out",
    ):
        from_compvis(both, metadata)
    assert same(from_compvis(both, metadata, "raw"), sd1)
    with pytest.raises(FolderError, match="holds no EMA"):
        from_compvis(tensors, metadata, "ema")
    with pytest.raises(FolderError, match=r"tensor model_ema\.diffusion_modelout9 belongs to no part"):
        from_compvis(with_ema(tensors) | {"model_ema.diffusion_modelout9": torch.zeros(1)}, metadata)


# ---------------------------------------------------------------- autoencoders alone


VAES = {  # of latent diffusion, an eighth as wide
    "kl-f4": (AutoencoderConfig(latent_channels=3, channels=(32, 64, 128)), 1.0),
    "kl-f8": (AutoencoderConfig(channels=(32, 64, 128, 128)), None),
    "kl-f16": (AutoencoderConfig(latent_channels=16, channels=(32, 32, 64, 64, 128), attention_levels=(4,)), 0.5),
}


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_autoencoder_alone(name: str, prefix: str) -> None:
    config, scale = VAES[name]
    bundle = Bundle({VAE: vae_part(config, 0.18215 if scale is None else scale)})
    tensors, metadata = to_compvis(bundle)
    assert same(from_compvis(tensors, metadata), bundle)
    if name == "kl-f16":
        assert (
            tensors["encoder.down.4.attn.1.q.weight"].shape == (128, 128, 1, 1)
            and "decoder.up.4.attn.2.proj_out.bias" in tensors
        )
    file = {prefix + key: t for key, t in tensors.items()}
    loss = {
        prefix + "loss.logvar": torch.zeros(()),
        prefix + "loss.discriminator.main.0.weight": torch.zeros(64, 3, 4, 4),
    }
    read = from_compvis(file | loss, hints=Hints(scale=scale))
    assert same(read, bundle) and set(read.unused) == set(loss)
    if scale is not None:
        with pytest.raises(ConfigError, match="give scale"):
            from_compvis(file)


def test_scale_of_the_latents(sd1: Bundle) -> None:
    vae = Part({**sd1.parts[VAE].config, "scaling_factor": 0.7}, sd1.parts[VAE].tensors)
    tensors, metadata = to_compvis(dataclasses.replace(sd1, parts={**sd1.parts, VAE: vae}))
    read = from_compvis(tensors)
    assert read.parts[VAE].config["scaling_factor"] == pytest.approx(0.7, rel=1e-7) and "scale_factor" in read.unused
    assert from_compvis(tensors, metadata).parts[VAE].config["scaling_factor"] == 0.7
    with pytest.raises(FolderError, match=r"scale_factor is 0\.8, .* says 0\.7"):
        from_compvis(tensors | {"scale_factor": torch.tensor(0.8)}, metadata)


# ---------------------------------------------------------------- refusals


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


U = "model.diffusion_model."
FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "extra": (
        lambda t: t.update({U + "out.3.weight": torch.zeros(1)}),
        r"tensor model\.diffusion_model\.out\.3\.weight belongs to no part of the model:"
        r" the nearest that does is .*\.out\.[02]\.weight",
    ),
    "extra of nothing": (
        lambda t: t.update({"depth_model.x": torch.zeros(1)}),
        r"tensor depth_model\.x belongs to no part",
    ),
    "missing": (
        renamed(U + "input_blocks.1.0.in_layers.0.bias", U + "input_blocks.1.0.in_layer.0.bias"),
        r"input_blocks\.1\.0\.in_layers\.0\.bias is missing \(there is .*\.input_blocks\.1\.0\.in_layer\.0\.bias\)",
    ),
    "missing in the autoencoder": (
        lambda t: t.pop("first_stage_model.decoder.up.2.block.1.conv1.weight"),
        "block.1.conv1.weight is missing",
    ),
    "missing in the text": (
        lambda t: t.pop("cond_stage_model.transformer.text_model.final_layer_norm.bias"),
        "norm.bias is missing",
    ),
    "missing first": (lambda t: t.pop(U + "input_blocks.0.0.weight"), r"input_blocks\.0\.0\.weight is missing"),
    "shape": (
        lambda t: t.update({U + "out.0.bias": torch.zeros(5)}),
        r"out\.0\.bias is \[5\], its configuration says \[32\]",
    ),
    "linear for conv": (
        lambda t: t.update({"first_stage_model.encoder.mid.attn_1.q.weight": torch.zeros(64, 64)}),
        r"attn_1\.q\.weight is \[64, 64\], its configuration says \[64, 64, 1, 1\]",
    ),
    "dimensions": (
        lambda t: t.update({"first_stage_model.encoder.conv_in.weight": torch.zeros(3)}),
        r"conv_in\.weight is \[3\]",
    ),
}


@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_is_refused(sd1: Bundle, fault: str, header: bool) -> None:
    tensors, metadata = to_compvis(sd1)
    change, message = FAULTS[fault]
    change(tensors)
    with pytest.raises(FolderError, match=message) as caught:
        from_compvis(tensors, metadata if header else {})
    assert "\n" not in str(caught.value)


def test_what_no_tensor_says_is_asked_for() -> None:
    sd2 = unet_to_diffusers(NetworkSpec(UNetConfig((64,), 1, (), (1,), linear_projection=True), 4, 4, 1024), 96)
    with pytest.raises(ConfigError, match=r"give prediction: eps for Stable Diffusion 2\.0-base.*v for 2\.0 and 2\.1"):
        from_compvis(to_compvis(Bundle({UNET: unet_part(sd2)}, scheduler("v")))[0])
    odd = unet_to_diffusers(
        NetworkSpec(UNetConfig((16, 16), heads=(2,), attention_levels=(1,), groups=4), 4, 4, 20), 64
    )
    tensors, metadata = to_compvis(Bundle({UNET: unet_part(odd)}, scheduler("v")))
    hints: dict[str, Any] = {}
    for name, value in (("heads", 2), ("prediction", "v"), ("groups", 4), ("image_size", 64)):
        with pytest.raises(ConfigError, match=f"give {name}"):
            from_compvis(tensors, hints=Hints(**hints))
        hints[name] = value
    assert from_compvis(tensors, hints=Hints(**hints)).parts[UNET].config == odd
    for options, message in (
        ({"hints": Hints(**{**hints, "heads": 3})}, "heads: 3 does not divide"),
        ({"metadata": metadata, "hints": Hints(heads=2)}, "header says all"),
        ({"hints": Hints(**hints, vae_groups=4)}, "vae_groups is about the vae"),
        ({"weights": "both"}, "weights must be ema or raw"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_compvis(tensors, **options)
    with pytest.raises(ConfigError, match="prediction must be"):
        Hints(prediction="epsilon")
    with pytest.raises(ConfigError, match="give text_heads and text_act"):
        from_compvis(to_compvis(Bundle({TEXT: text_part(text_config(32, heads=2))}))[0])
    with pytest.raises(ConfigError, match="give text_layers"):
        from_compvis(openclip_file(), hints=Hints(text_heads=2))
    with pytest.raises(FolderError, match="not a CompVis file"):
        from_compvis({"weight": torch.zeros(1)})


def without_context() -> dict[str, Any]:
    return unet_to_diffusers(NetworkSpec(UNetConfig((32,), heads=(8,), attention_levels=()), 3, 3, None), 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: dataclasses.replace(b, scheduler=scheduler("score")), "no score or flow target"),
        (lambda b: dataclasses.replace(b, scheduler=None), "without its scheduler"),
        (lambda b: dataclasses.replace(b, parts={UNET: unet_part(without_context())}), "without a context"),
        (lambda b: Bundle({VAE: Part({**b.parts[VAE].config, "shift_factor": 0.1}, b.parts[VAE].tensors)}),
         "shift_factor"),
        (lambda b: Bundle({VAE: Part({**b.parts[VAE].config, "latents_mean": [0.0]}, {})}), "latents_mean"),
        (lambda b: dataclasses.replace(b, parts={**b.parts, "controlnet": b.parts[UNET]}), "no part controlnet"),
        (lambda b: dataclasses.replace(b, tokenizer={"a.bin": b"\xff"}), "a.bin is not UTF-8"),
        (lambda b: Bundle({}), "without a network"),
    ],
)  # fmt: skip
def test_what_the_layout_cannot_hold(sd1: Bundle, change: Callable[[Bundle], Bundle], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_compvis(change(sd1))


def test_openclip_has_one_activation(sd1: Bundle) -> None:
    with pytest.raises(ConfigError, match="activation than gelu"):
        to_compvis(sd1, openclip=True)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("missing", "out.weight is missing"), ("extra", "conv_ou.weight belongs"), ("shape", r"is \[1\]")],
)
def test_a_bundle_that_does_not_fit_together(sd1: Bundle, kind: str, message: str) -> None:
    tensors = dict(sd1.parts[UNET].tensors)
    if kind == "missing":
        del tensors["conv_out.weight"]
    else:
        tensors["conv_ou.weight" if kind == "extra" else "conv_out.weight"] = torch.zeros(1)
    with pytest.raises(FolderError, match=message):
        to_compvis(dataclasses.replace(sd1, parts={UNET: Part(sd1.parts[UNET].config, tensors)}))


def header(**change: Any) -> dict[str, str]:
    said = {"format": 1, "parts": {VAE: vae_to_diffusers(KL8)}, "scheduler": None, "tokenizer": {}, "extra": {}}
    return {"ldm": json.dumps({**said, **change})}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"ldm": "{"}, "header .* cannot be read"),
        ({"ldm": "[]"}, "header .* cannot be read"),
        (header(format=2), "format 2"),
        (header(parts={}), "names the parts"),
        (header(parts={"controlnet": {}}), "controlnet"),
        (header(parts={VAE: 3}), "cannot be read"),
        (header(parts={VAE: {"block_out_channels": "wide"}}), "cannot be read|must name|down_block"),
        (header(parts={UNET: SD1}), "without its scheduler"),
        (header(parts={VAE: {**vae_to_diffusers(KL8), "norm_type": "x"}}), "norm_type"),
    ],
)  # fmt: skip
def test_a_header_that_cannot_be_trusted(sd1: Bundle, metadata: dict[str, str], message: str) -> None:
    tensors, _ = to_compvis(dataclasses.replace(sd1, parts={UNET: sd1.parts[UNET], VAE: sd1.parts[VAE]}))
    with pytest.raises((FolderError, ConfigError), match=message) as caught:
        from_compvis(tensors, metadata)
    assert "\n" not in str(caught.value)


def test_a_header_whose_scheduler_is_none(sd1: Bundle) -> None:
    tensors, metadata = to_compvis(sd1)
    said = json.loads(metadata["ldm"]) | {"scheduler": {"num_train_timesteps": "many"}}
    with pytest.raises(ConfigError, match="scheduler: num_train_timesteps must be a whole number, got 'many'"):
        from_compvis(tensors, {"ldm": json.dumps(said)})
