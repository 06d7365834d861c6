"""Verify that a converted model equals its source: hashes there and back, and a forward pass of each network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ldm.diffusion.condition import Condition
from ldm.errors import FolderError
from ldm.files.tensors.archive import tensor_hash
from ldm.interop.bundle import TEXT, UNET, VAE, Bundle, Part
from ldm.interop.compvis.extras import EMA_PREFIX, OPENCLIP_PREFIX
from ldm.interop.compvis.layout import PREFIXES, from_compvis, to_compvis
from ldm.interop.compvis.spelling import spelled
from ldm.interop.diffusers.unet import unet_from_diffusers
from ldm.interop.open import read_any
from ldm.interop.weights import fill
from ldm.pipeline.codec import codec_of

SIDE = 16  # of the latents of the forward pass


def verify(source: Bundle, target: Path, file: Mapping[str, Tensor] | None = None) -> list[str]:
    """Compare the model written at ``target`` with ``source``; returns a line for each comparison.

    ``file``: the tensors of the single file that ``source`` was read from; the written model is
    converted back to it.
    Raises FolderError naming the first tensor, configuration or output that differs.
    """
    written = read_any(target)
    lines = [f"verified: {_same_tensors(source, written)} tensors have the same hash"]
    if file is not None:
        count = _same_names(written, spelled(file), source.unused)
        lines.append(f"verified: turned back, {count} tensors of the file have the same hash")
    if target.is_file():
        count = _same_tensors(written, from_compvis(*to_compvis(written)))
        lines.append(f"verified: {count} tensors, back and forth once more")
    compared = [name for name in FORWARD if name in source.parts]
    for name in compared:
        _check_output(name, FORWARD[name], source, written)
    lines.append(f"verified: the same output of {', '.join(compared)} for random input, bit for bit")
    return lines


def _same_tensors(source: Bundle, target: Bundle) -> int:
    """Number of tensors, all equal in name, type, shape and value. Raises FolderError naming the first that is not."""
    if source.parts.keys() != target.parts.keys():
        raise FolderError(f"verify: {', '.join(source.parts)} became {', '.join(target.parts)}")
    count = 0
    for part in source.parts:
        before, after = source.parts[part].tensors, target.parts[part].tensors
        if missing := sorted(before.keys() ^ after.keys()):
            raise FolderError(f"verify: {part} {missing[0]} is on one side alone ({len(missing)} such tensors)")
        for name, tensor in before.items():
            if tensor_hash(tensor) != tensor_hash(after[name]):
                raise FolderError(f"verify: {part} {name} has changed")
        count += len(before)
    return count


def _same_names(written: Bundle, file: Mapping[str, Tensor], unused: Mapping[str, str]) -> int:
    """Number of tensors of a single file, all equal by name once ``written`` is converted back to its layout."""
    back, _ = to_compvis(written, openclip=any(name.startswith(OPENCLIP_PREFIX) for name in file))
    alone = "" if any(name.startswith("encoder.") for name in file) else PREFIXES[VAE]
    back = {alone + name if written.parts.keys() == {VAE} else name: tensor for name, tensor in back.items()}
    copies = {EMA_PREFIX + name.removeprefix("model.").replace(".", ""): tensor for name, tensor in back.items()}
    if any(name in file and name not in unused for name in copies):  # those were taken
        back = {**copies, **{name: tensor for name, tensor in back.items() if name not in unused}}
    names = [name for name in file if name not in unused]
    for name in names:
        if name not in back or tensor_hash(back[name]) != tensor_hash(file[name]):
            raise FolderError(f"verify: {name} of the file {'has changed' if name in back else 'is lost'}")
    return len(names)


@torch.no_grad()
def _check_output(name: str, forward: Callable[[Bundle], Tensor], source: Bundle, target: Bundle) -> None:
    """Raise FolderError where the network ``name`` computes something else from ``target``."""

    def output(bundle: Bundle) -> str:
        parts = {**bundle.parts, name: _copied(bundle.parts[name])}
        return tensor_hash(forward(replace(bundle, parts=parts)))  # of bits: NaN is equal to itself

    if output(source) != output(target):
        raise FolderError(f"verify: {name} computes another output once written: its configuration has changed")


def _copied(part: Part) -> Part:
    """The part with its tensors copied: their alignment in a file decides in what order a sum is taken."""
    return replace(part, tensors={name: tensor.clone() for name, tensor in part.tensors.items()}, files=(), sha256={})


def _unet(bundle: Bundle) -> Tensor:
    spec = unet_from_diffusers(bundle.parts[UNET].config)
    config, channels, context = spec.config, spec.in_channels, spec.context_dim
    unet = fill(spec.make, bundle.parts[UNET]).float()
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    condition = Condition(
        context=None if context is None else normal(1, 8, context),
        vector=None if config.vector_dim is None else normal(1, config.vector_dim),
        labels=torch.zeros(1, dtype=torch.int64) if config.num_labels or config.sinusoidal_labels else None,
        concat=normal(1, config.concat_channels, SIDE, SIDE) if config.concat_channels else None,
    )
    return unet(normal(1, channels, SIDE, SIDE), torch.tensor([500]), condition)


def _autoencoder(bundle: Bundle) -> Tensor:
    codec = codec_of(bundle.parts[VAE])
    config = codec.autoencoder.config
    side, random = 8 * config.factor, torch.Generator().manual_seed(0)
    image = torch.rand(1, config.image_channels, side, side, generator=random) * 2 - 1
    mean = codec.autoencoder.encode(image).mean
    return torch.cat([mean.flatten(), codec.decode(mean * codec.scale).flatten()])


def _text(bundle: Bundle) -> Tensor:
    from ldm.models.text import TextEncoder  # transformers takes seconds to import

    part = bundle.parts[TEXT]
    try:
        encoder = TextEncoder.from_tensors(part.config, part.tensors, bundle.tokenizer)
    except ValueError as error:
        raise FolderError(f"verify: {TEXT}: {error}") from None
    return encoder.encode(["a small red circle", ""])


FORWARD: Mapping[str, Callable[[Bundle], Tensor]] = {UNET: _unet, VAE: _autoencoder, TEXT: _text}
