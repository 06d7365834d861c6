"""Reconstructions of images by an autoencoder, with the PSNR of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from autoencoder.metrics import psnr
from autoencoder.model import AutoencoderKL
from ldm.data.sample import Source, readable
from ldm.data.transforms import prepare, to_uint8
from ldm.files.tensors.finite import finite

AT_ONCE = 16  # images per batch
SHOWN = 6  # images of each group


@dataclass(frozen=True)
class Batch:
    """Images and their reconstructions from the posterior mean, clipped to [−1, 1], with the PSNR in dB."""

    indices: list[int]
    image: Float[Tensor, "b C H W"]
    decoded: Float[Tensor, "b C H W"]
    psnr: list[float]
    captions: list[str]


@torch.no_grad()
def reconstructed(
    autoencoder: AutoencoderKL, source: Source, size: int, indices: Sequence[int], batch: int
) -> Iterator[Batch]:
    """Reconstruct the samples ``indices`` of a source at side ``size``, ``batch`` at a time.

    Samples that cannot be read are skipped. Raises NonFiniteError if a reconstruction is not finite.
    """
    device = next(autoencoder.parameters()).device
    for start in range(0, len(indices), batch):
        read = list(readable(source, indices[start : start + batch]))
        if not read:
            continue
        samples = [sample for _, sample in read]
        image = torch.stack([prepare(s.image, size) for s in samples]).to(device)
        what = f"the autoencoder's reconstruction of images {start} to {start + len(image) - 1}"
        decoded = finite(autoencoder(image)[0], what).clamp(-1, 1)
        yield Batch([i for i, _ in read], image, decoded, psnr(decoded, image).tolist(), [s.text for s in samples])


@dataclass(frozen=True)
class Pair:
    """An original and its reconstruction."""

    original: UInt8[np.ndarray, "h w c"]
    decoded: UInt8[np.ndarray, "h w c"]
    psnr: float
    caption: str


def extremes(
    autoencoder: AutoencoderKL,
    source: Source,
    size: int,
    n: int,
    progress: Callable[[int, int, Mapping[str, float]], None],
) -> tuple[list[float], dict[str, list[Pair]]]:
    """PSNR of the first ``n`` readable images, best first, and the best, median and worst pairs.

    Only the pairs shown are kept in memory: they are computed a second time. Raises NonFiniteError.
    """
    decibels: dict[int, float] = {}
    for part in reconstructed(autoencoder, source, size, range(n), AT_ONCE):
        decibels |= zip(part.indices, part.psnr, strict=True)
        progress(len(decibels), n, {})
    order = sorted(decibels, key=lambda i: decibels[i], reverse=True)
    n = len(order)
    shown = min(SHOWN, -(-n // 3))
    middle = (n - shown) // 2
    groups = {"best": order[:shown], "median": order[middle : middle + shown], "worst": order[n - shown :]}
    pairs = {name: _pairs(autoencoder, source, size, indices, decibels) for name, indices in groups.items()}
    return [decibels[i] for i in order], pairs


def _pairs(
    autoencoder: AutoencoderKL, source: Source, size: int, indices: list[int], decibels: Mapping[int, float]
) -> list[Pair]:
    if not indices:
        return []
    (part,) = reconstructed(autoencoder, source, size, indices, len(indices))
    rows = zip(indices, to_uint8(part.image), to_uint8(part.decoded), part.captions, strict=True)
    return [Pair(image, decoded, decibels[i], caption) for i, image, decoded, caption in rows]
