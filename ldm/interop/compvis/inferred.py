"""Infer the configurations of a CompVis single file from the shapes of its tensors.

Head counts, groups, target and latent scale do not show in shapes: for the published families their
values are known, for other files they must be given as ``Hints``.
"""

from __future__ import annotations

import typing
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from autoencoder.config import AutoencoderConfig, at_least, shown
from autoencoder.layout import to_diffusers as autoencoder_to_diffusers
from ldm.config import ConfigError, ScheduleConfig, UNetConfig
from ldm.config.values import typed
from ldm.errors import FolderError
from ldm.interop.bundle import TEXT, UNET, VAE
from ldm.interop.compvis.extras import PUBLISHED_SCALE
from ldm.interop.compvis.shapes import Shapes, missing
from ldm.interop.diffusers.schedulers import scheduler_to_diffusers
from ldm.interop.diffusers.unet import unet_to_diffusers
from ldm.models.unet import NetworkSpec

PUBLISHED_FACTOR = 8  # image side over latent side of Stable Diffusion 1 and 2
PUBLISHED_GROUPS = 32  # groups of every GroupNorm in CompVis' code
HEAD_WIDTH = 64  # in the U-Net of Stable Diffusion 2, and in every published CLIP
SD1_HEADS = 8
OPENCLIP_WIDTH, OPENCLIP_LAYERS = 1024, 23  # Stable Diffusion 2's text encoder; a 24th block is not used
CLIP_WIDTH = 768  # Stable Diffusion 1's text encoder
WHICH_TARGET = (
    "give prediction: eps for Stable Diffusion 2.0-base, 2.1-base and 2-inpainting (512 px),"
    " v for 2.0 and 2.1 (768 px), and for a fine-tune the one of its base"
)


@dataclass(frozen=True)
class Hints:
    """Settings that the tensors of a file do not show.

    None: the published value, for a file of a published family.

    Attributes:
        prediction: eps, v or x0.
        heads: attention heads of the U-Net, one number or one per level.
        groups, vae_groups: GroupNorm groups of the U-Net and of the autoencoder.
        scale: factor on the autoencoder's latents.
        image_size: side of the training images in pixels.
        text_heads, text_layers, text_act: heads, layers in use and activation of the text encoder.
    """

    prediction: str | None = None
    heads: int | tuple[int, ...] | None = None
    groups: int | None = None
    vae_groups: int | None = None
    scale: float | None = None
    image_size: int | None = None
    text_heads: int | None = None
    text_layers: int | None = None
    text_act: str | None = None

    def check(self, parts: Collection[str]) -> None:
        """Raise ConfigError for a hint about a part that the file lacks."""
        about = {"prediction": UNET, "heads": UNET, "groups": UNET, "image_size": UNET, "vae_groups": VAE, "scale": VAE}
        for name, value in vars(self).items():
            if value is not None and (part := about.get(name, TEXT)) not in parts:
                raise ConfigError(f"{name} is about the {part}, which the file does not hold: leave it out")

    def __post_init__(self) -> None:
        types = typing.get_type_hints(Hints) | {"heads": tuple[int, ...] | None}
        for name, value in vars(self).items():
            object.__setattr__(self, name, typed(types[name], value, name))
        if self.prediction not in (None, "eps", "v", "x0"):
            raise ConfigError(f"prediction must be eps, v or x0, got {shown(self.prediction)}")
        at_least(self, 1, "groups", "vae_groups", "image_size", "text_heads", "text_layers")
        at_least(self, 1e-12, "scale")
        if any(heads < 1 for heads in self.heads or ()):  # type: ignore[union-attr]
            raise ConfigError(f"heads must be at least 1, got {shown(self.heads)}")


def _same(values: list[Any], what: str) -> Any:
    """The common value. Raises FolderError if the values differ."""
    if len(set(values)) != 1:
        raise FolderError(f"the U-Net has {what} {values}: they must be equal, or the file lacks tensors")
    return values[0]


# ---------------------------------------------------------------- U-Net


@dataclass(frozen=True)
class Family:
    """Settings of the published U-Nets with one projection and context width.

    Attributes:
        heads: attention heads, one number or one per level.
        prediction: eps; None where the family has models of either kind.
    """

    heads: tuple[int, ...]
    prediction: str | None


def infer_unet(
    shapes: Shapes, hints: Hints, latent_channels: int | None, factor: int | None
) -> tuple[dict[str, Any], str]:
    """unet/config.json of the tensors, and the target.

    ``latent_channels``, ``factor``: the autoencoder's, or None.

    Raises ConfigError naming the hint that is needed, FolderError for tensors that fit no U-Net.
    """
    levels = _levels(shapes)
    channels = tuple(level[0][0] for level in levels)
    depths = [depth for level in levels for _, depth in level if depth]
    depths.append(shapes.count("middle_block.1.transformer_blocks."))
    if shapes.has("middle_block.1.qkv."):
        raise ConfigError(
            "the U-Net is an unconditional one of latent-diffusion: its attention blocks cannot be expressed here"
        )
    cross = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    linear, context = shapes.dimensions("middle_block.1.proj_in.weight") == 2, shapes(cross, 1)

    # What no tensor shows: from the hints, or from the published family.
    family = _family(channels, linear, context)
    heads = hints.heads if hints.heads is not None else family and family.heads
    target = hints.prediction or (family and family.prediction)
    if heads is None:
        raise ConfigError(
            f"the U-Net is of no published family (its context is {context} wide, its projection"
            f" {'linear' if linear else 'a convolution'}): give heads, the number of attention heads"
        )
    if target is None:
        raise ConfigError(
            "a single file does not show what its U-Net predicts: "
            + (WHICH_TARGET if family else "give prediction: eps, v or x0")
        )

    # Channels beyond those of x_t are a concatenated condition; twice as many come out with a learned variance.
    into, out = shapes("input_blocks.0.0.weight", 1), shapes("out.2.weight", 0)
    x_channels = latent_channels or (into if out == 2 * into else out)
    if out not in (x_channels, 2 * x_channels) or into < x_channels:
        raise FolderError(
            f"the U-Net takes {into} channels and gives {out}, which does not fit a sample of {x_channels}"
        )
    config = UNetConfig(
        channels=channels,
        layers_per_level=_same([len(level) for level in levels], "residual blocks per level"),
        attention_levels=tuple(i for i, level in enumerate(levels) if any(depth for _, depth in level)),
        heads=(heads,) if isinstance(heads, int) else heads,
        transformer_layers=_same(depths, "transformer layers"),
        groups=_groups(hints.groups, channels, "U-Net", "groups"),
        linear_projection=linear,
        scale_shift=shapes("middle_block.0.emb_layers.1.weight", 0) == 2 * channels[-1],
        vector_dim=shapes("label_emb.0.0.weight", 1) if shapes.has("label_emb.0.") else None,
        concat_channels=into - x_channels,
        upcast_attention=_is_768_v(family, target),  # published so: it overflows in half precision
    )
    factor = factor or (PUBLISHED_FACTOR if family else 1)
    spec = NetworkSpec(config, x_channels, out, context)
    layout = unet_to_diffusers(spec, _image_size(hints, family, target) // factor)
    classes = {"num_class_embeds": shapes("label_emb.weight", 0)} if shapes.has("label_emb.weight") else {}
    return {**layout, **classes}, target


def _levels(shapes: Shapes) -> list[list[tuple[int, int]]]:
    """(channels, transformer layers) of each residual block of each level going down."""
    levels: list[list[tuple[int, int]]] = [[]]
    for block in range(1, shapes.count("input_blocks.")):
        if shapes.has(f"input_blocks.{block}.0.op."):
            levels.append([])
            continue
        channels = shapes(f"input_blocks.{block}.0.out_layers.3.weight", 0)
        levels[-1].append((channels, shapes.count(f"input_blocks.{block}.1.transformer_blocks.")))
    if not all(levels):
        raise missing("input_blocks.1.0.out_layers.3.weight", [])
    return levels


def _family(channels: tuple[int, ...], linear: bool, context: int) -> Family | None:
    """The published family of a U-Net, or None."""
    if not linear and context == CLIP_WIDTH:
        return Family((SD1_HEADS,), "eps")
    if linear and context == OPENCLIP_WIDTH:
        return Family(tuple(c // HEAD_WIDTH for c in channels), None)
    return None


def _is_768_v(family: Family | None, target: str) -> bool:
    """True for Stable Diffusion 2's U-Net for 768 pixels, which predicts v."""
    return family is not None and family.prediction is None and target == "v"


def _groups(given: int | None, channels: tuple[int, ...], part: str, option: str) -> int:
    """The hint, or the published number if it divides the channels. Raises ConfigError."""
    if given is None and any(c % PUBLISHED_GROUPS for c in channels):
        raise ConfigError(
            f"the {part}'s channels {list(channels)} are not multiples of {PUBLISHED_GROUPS}:"
            f" give {option}, the GroupNorm groups"
        )
    return given or PUBLISHED_GROUPS


def _image_size(hints: Hints, family: Family | None, target: str) -> int:
    """Side of the training images in pixels: the hint, or the published 512 or 768.

    Raises ConfigError.
    """
    if hints.image_size is None and family is None:
        raise ConfigError("the size of the training images is in no tensor: give image_size, in pixels")
    return hints.image_size or (768 if _is_768_v(family, target) else 512)


# ---------------------------------------------------------------- autoencoder, text encoder, scheduler


def infer_vae(shapes: Shapes, hints: Hints, given_scale: float | None) -> dict[str, Any]:
    """vae/config.json of the tensors. ``given_scale``: the latent scale in the file, or None.

    Raises ConfigError.
    """
    levels = range(shapes.count("encoder.down."))
    channels = tuple(shapes(f"encoder.down.{level}.block.0.conv1.weight", 0) for level in levels)
    config = AutoencoderConfig(
        image_channels=shapes("encoder.conv_in.weight", 1),
        latent_channels=shapes("decoder.conv_in.weight", 1),
        channels=channels,
        layers_per_level=shapes.count("encoder.down.0.block."),
        groups=_groups(hints.vae_groups, channels, "autoencoder", "vae_groups"),
        mid_attention=shapes.has("encoder.mid.attn_1."),
        attention_levels=tuple(level for level in levels if shapes.has(f"encoder.down.{level}.attn.")),
    )
    scale = given_scale if hints.scale is None else hints.scale
    if scale is None and (config.latent_channels, config.factor) != (4, 8):
        raise ConfigError(
            "the scale of this autoencoder's latents is in no tensor: give scale (1 leaves them as they are)"
        )
    return {**autoencoder_to_diffusers(config), "scaling_factor": PUBLISHED_SCALE if scale is None else scale}


def infer_text(shapes: Shapes, hints: Hints, openclip: bool) -> dict[str, Any]:
    """text_encoder/config.json of the tensors, in transformers' names or in OpenCLIP's.

    Raises ConfigError.
    """
    token, position = "text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight"
    if openclip:
        token, position = "token_embedding.weight", "positional_embedding"
    vocabulary, width = shapes(token, 0), shapes(token, 1)
    fc1 = "transformer.resblocks.0.mlp.c_fc.weight" if openclip else "text_model.encoder.layers.0.mlp.fc1.weight"
    layers = _text_layers(shapes, hints, openclip, width)
    published = width == (OPENCLIP_WIDTH if openclip else CLIP_WIDTH)
    if not published and (hints.text_heads is None or (hints.text_act is None and not openclip)):
        wanted = "text_heads" if openclip else "text_heads and text_act"
        raise ConfigError(f"the text encoder is {width} wide, unlike any published one in this layout: give {wanted}")
    heads = hints.text_heads or width // HEAD_WIDTH
    if heads < 1 or width % heads:
        raise ConfigError(f"text_heads: {heads} does not divide the text encoder's width {width}")
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes(fc1, 0),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": shapes(position, 0),
        "hidden_act": hints.text_act or ("gelu" if openclip else "quick_gelu"),
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 1,
        "projection_dim": width,
    }


def _text_layers(shapes: Shapes, hints: Hints, openclip: bool, width: int) -> int:
    """Number of layers in use: all in transformers' names, all but OpenCLIP's last block.

    Raises ConfigError.
    """
    held = shapes.count("transformer.resblocks." if openclip else "text_model.encoder.layers.")
    if hints.text_layers is not None or not openclip:
        return held if hints.text_layers is None else hints.text_layers
    if width != OPENCLIP_WIDTH or held not in (OPENCLIP_LAYERS, OPENCLIP_LAYERS + 1):
        raise ConfigError(
            f"the text encoder has {held} OpenCLIP blocks {width} wide: give text_layers, how many of them are used"
        )
    return OPENCLIP_LAYERS


def infer_scheduler(schedule: ScheduleConfig, target: str) -> dict[str, Any]:
    """scheduler_config.json with the published sampling grid."""
    return {**scheduler_to_diffusers(schedule, target), "timestep_spacing": "leading", "set_alpha_to_one": False}
