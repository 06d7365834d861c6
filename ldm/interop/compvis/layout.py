"""CompVis single files (latent-diffusion, Stable Diffusion), read and written as a Bundle.

Files written here carry the configuration in their header; for other files it is inferred from the
tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from autoencoder.layout import from_diffusers as autoencoder_from_diffusers
from autoencoder.layout import latent_scale
from ldm.config import ConfigError
from ldm.errors import FolderError
from ldm.interop.bundle import TEXT, UNET, VAE, Bundle, Part
from ldm.interop.compvis.extras import (
    OPENCLIP_PREFIX,
    PUBLISHED_SCALE,
    SCALE,
    Places,
    check_known,
    check_process,
    choose_weights,
    given_scale,
    process_of,
    unused_block,
)
from ldm.interop.compvis.header import Header, read_header, write_header
from ldm.interop.compvis.inferred import Hints, infer_scheduler, infer_text, infer_unet, infer_vae
from ldm.interop.compvis.names import Slot, text_slots, unet_slots, vae_slots
from ldm.interop.compvis.schedule import buffers, schedule_of
from ldm.interop.compvis.shapes import Shapes, missing, one_line
from ldm.interop.diffusers.schedulers import OWN_TARGETS
from ldm.interop.sizes import check_sizes
from ldm.interop.weights import check_tensors

PREFIXES = {UNET: "model.diffusion_model.", VAE: "first_stage_model.", TEXT: "cond_stage_model.transformer."}


def from_compvis(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    weights: str | None = None,
    hints: Hints | None = None,
) -> Bundle:
    """The model in a single file; each tensor is used, or listed in ``unused`` with the reason.

    The model's tensors are views of those given, in their dtype.

    Args:
        tensors: the tensors of the file by name.
        metadata: of its header; if it holds our configuration, nothing is inferred.
        weights: `ema` or `raw` weights of the U-Net; None: EMA if the file has it.
        hints: settings that the tensors of a file without our header do not show.

    Raises:
        FolderError: a tensor is missing, unknown, of a wrong shape, or differs from the schedule.
        ConfigError: a network that we cannot express, or a hint that is needed or does not apply.
    """
    if weights not in (None, "ema", "raw"):
        raise ConfigError(f"weights must be ema or raw, got {weights!r}")
    header = read_header(metadata or {})
    if header is not None and hints not in (None, Hints()):
        raise ConfigError("the file's header says all of its configuration: leave the hints out")
    prefixes = _prefixes(tensors)
    if header is None:
        header = _infer(tensors, prefixes, hints or Hints())
    for part, config in header.configs.items():
        check_sizes(part, config, tensors, "the file's header")
    places = _places(header.configs, {**PREFIXES, **prefixes})
    _check(tensors, places)
    source, copies = choose_weights(tensors, places.get(UNET, {}), weights)
    unused = copies | check_process(tensors, header)
    if prefixes.get(TEXT) == OPENCLIP_PREFIX:
        unused |= unused_block(tensors, header.configs[TEXT])
    check_known(tensors, {place for slots in places.values() for place in slots} | set(source.values()), unused)
    parts = {part: Part(header.configs[part], _inside(tensors, places[part], source)) for part in places}
    return Bundle(parts, header.scheduler, header.tokenizer, header.extra, unused)


def to_compvis(bundle: Bundle, openclip: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a single file and the metadata of its header.

    An autoencoder alone has no prefix, as in CompVis' files.

    ``openclip``: write the text encoder in OpenCLIP's names, which CompVis' code for Stable
    Diffusion 2 reads. OpenCLIP's unused last block, which we do not have, is left out; that code
    loads without it.

    Raises ConfigError naming what the layout cannot hold, FolderError if tensors and configurations
    disagree.
    """
    _check_expressible(bundle, openclip)
    prefixes = PREFIXES | ({TEXT: OPENCLIP_PREFIX} if openclip else {})
    if bundle.parts.keys() == {VAE}:
        prefixes = {VAE: ""}
    places = _places({name: part.config for name, part in bundle.parts.items()}, prefixes)
    tensors: dict[str, Tensor] = {}
    for name, slots in places.items():
        inside = bundle.parts[name].tensors
        check_tensors({inner: slot.inner for slot in slots.values() for inner in slot.holds}, bundle.parts[name])
        tensors |= {
            place: _joined([inside[inner] for inner in slot.holds], place).reshape(slot.shape)
            for place, slot in slots.items()
        }
    if UNET in bundle.parts:
        assert bundle.scheduler is not None  # _check_expressible
        schedule, _ = process_of(bundle.scheduler)
        tensors |= {name: table.float() for name, table in buffers(schedule).items()}

    # Stable Diffusion's own code knows the published scale; any other stands in the file.
    if {UNET, VAE} <= bundle.parts.keys() and (scale := latent_scale(bundle.parts[VAE].config)[0]) != PUBLISHED_SCALE:
        tensors[SCALE] = torch.tensor(scale)
    return tensors, write_header(bundle)


def _places(configs: Mapping[str, Mapping[str, Any]], prefixes: Mapping[str, str]) -> Places:
    """The slots of every tensor of these networks.

    Raises ConfigError naming what we cannot express, or FolderError.
    """
    slots = {}
    try:
        if UNET in configs:
            slots[UNET] = unet_slots(configs[UNET])
        if VAE in configs:
            slots[VAE] = vae_slots(configs[VAE])
        if TEXT in configs:
            slots[TEXT] = text_slots(configs[TEXT], prefixes[TEXT] == OPENCLIP_PREFIX)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise FolderError(f"the configuration of the model cannot be read: {one_line(error)}") from None
    return {part: {prefixes[part] + slot.name: slot for slot in held} for part, held in slots.items()}


# ---------------------------------------------------------------- reading


def _prefixes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The parts whose tensors are in the file, with their prefixes.

    Raises FolderError if there are none.
    """
    names = [n for n in tensors if not n.endswith("position_ids")]  # may be left over from a removed text encoder
    found = {part: prefix for part, prefix in PREFIXES.items() if any(name.startswith(prefix) for name in names)}
    if any(name.startswith(OPENCLIP_PREFIX + "transformer.") for name in names):
        found[TEXT] = OPENCLIP_PREFIX
    if not found and any(name.startswith(("encoder.", "decoder.")) for name in names):
        found[VAE] = ""
    if not found:
        prefixes = ", ".join(PREFIXES.values())
        raise FolderError(
            f"not a CompVis file: no tensor's name begins with {prefixes},"
            " nor with encoder. or decoder. of an autoencoder alone"
        )
    return found


def _infer(tensors: Mapping[str, Tensor], prefixes: Mapping[str, str], hints: Hints) -> Header:
    """Infer the configurations of a file without our header.

    Raises ConfigError naming the hint that is needed, or FolderError.
    """
    hints.check(prefixes)
    configs: dict[str, dict[str, Any]] = {}
    scheduler, latent_channels, factor = None, None, None
    if VAE in prefixes:
        configs[VAE] = infer_vae(Shapes(tensors, prefixes[VAE]), hints, given_scale(tensors))
        config = autoencoder_from_diffusers(configs[VAE])
        latent_channels, factor = config.latent_channels, config.factor
    if TEXT in prefixes:
        configs[TEXT] = infer_text(Shapes(tensors, prefixes[TEXT]), hints, prefixes[TEXT] == OPENCLIP_PREFIX)
    if UNET in prefixes:
        configs[UNET], target = infer_unet(Shapes(tensors, prefixes[UNET]), hints, latent_channels, factor)
        scheduler = infer_scheduler(schedule_of(tensors), target)
    return Header(configs, scheduler)


def _check(tensors: Mapping[str, Tensor], places: Places) -> None:
    """Raise FolderError for the first tensor that is missing or has a wrong shape."""
    every = {place for slots in places.values() for place in slots}
    for slots in places.values():
        for place, slot in slots.items():
            if place not in tensors:
                raise missing(place, [name for name in tensors if name not in every])
            if tuple(tensors[place].shape) != slot.shape:
                raise FolderError(
                    f"tensor {place} is {list(tensors[place].shape)}, its configuration says {list(slot.shape)}"
                )


def _inside(tensors: Mapping[str, Tensor], slots: Mapping[str, Slot], source: Mapping[str, str]) -> dict[str, Tensor]:
    """The network's tensors, as views of the file's.

    ``source``: name → the copy (EMA) to use instead.
    """
    inside = {}
    for place, slot in slots.items():
        pieces = tensors[source.get(place, place)].chunk(len(slot.holds))
        inside |= {name: piece.view(slot.inner) for name, piece in zip(slot.holds, pieces, strict=True)}
    return inside


# ---------------------------------------------------------------- writing


def _check_expressible(bundle: Bundle, openclip: bool) -> None:
    """Raise ConfigError naming the first property that a single file cannot hold."""
    unknown = [name for name in bundle.parts if name not in PREFIXES]
    unet, vae, text = (bundle.parts[name].config if name in bundle.parts else {} for name in (UNET, VAE, TEXT))
    context = unet.get("cross_attention_dim", 1280)
    faults = {
        f"no part {', '.join(unknown)}": bool(unknown),
        "no model without a network": not bundle.parts,
        "no U-Net without its scheduler": bool(unet) and bundle.scheduler is None,
        "no U-Net without a context (CompVis' unconditional one has other attention blocks)": bool(unet)
        and all(width is None for width in (context if isinstance(context, (list, tuple)) else [context])),
        "no score or flow target, only eps, v and x0": bundle.scheduler is not None
        and bundle.scheduler.get("prediction_type") in OWN_TARGETS,
        "no shift of the latents, only a scale (shift_factor)": bool(vae.get("shift_factor")),
        "no mean and deviation per latent channel (latents_mean, latents_std)": vae.get("latents_mean") is not None
        or vae.get("latents_std") is not None,
        "no OpenCLIP text encoder with another activation than gelu": openclip
        and text.get("hidden_act", "quick_gelu") != "gelu",
    }
    for fault, holds in faults.items():
        if holds:
            raise ConfigError(f"a CompVis single file holds {fault}")


def _joined(held: list[Tensor], place: str) -> Tensor:
    """The one tensor, or several concatenated. Raises ConfigError if their dtypes differ."""
    if len({t.dtype for t in held}) > 1:
        raise ConfigError(
            f"tensor {place} joins several of the model's, which are {', '.join(str(t.dtype) for t in held)}:"
            " cast the model to one of these types"
        )
    return held[0] if len(held) == 1 else torch.cat(held)
