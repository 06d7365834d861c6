"""σ of p(x|z) for each channel, fitted to the errors of the decoder on training data (docs/equations.md L6)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ldm.config import DataConfig
from ldm.data import rng
from ldm.data.sample import Source, readable
from ldm.data.sources import open_source
from ldm.data.transforms import prepare
from ldm.diffusion.gaussian import discretised_log_probability
from ldm.distributed.processes import Processes
from ldm.errors import DataError
from ldm.files.json import read_json, write_json
from ldm.files.tensors.finite import finite
from ldm.interop.diffusers.folder import find_model
from ldm.pipeline import Pipeline
from ldm.pipeline.codec import LatentCodec

FILE = "likelihood.json"  # in the model folder
SEED = 2001
IMAGES = 128  # training images of the fit
PIXELS = 1024  # of each image, evenly spaced
AT_ONCE = 16  # images per batch, whatever that of the caller, so that the fit is always the same
SMALLEST = 1e-4  # σ of a reconstruction without error: a 40th of half a bin
ROUNDS = 32  # of the golden section: a bracket of a factor 300 shrinks to 1e-6


def of_run(
    run: Path, pipe: Pipeline, data: DataConfig, processes: Processes, say: Callable[[str], None]
) -> list[float]:
    """σ of each channel; fitted once for each autoencoder and data, and kept in the model folder."""

    def read_or_fit() -> list[float]:
        source, file = open_source(data, "train"), find_model(run) / FILE
        assert pipe.codec is not None
        key = {"autoencoder": pipe.codec.hash, "data": source.fingerprint, "image_size": data.image_size}
        if file.is_file() and (known := read_json(file)).items() >= key.items():
            return known["decoder_std"]
        say(f"fitting the decoder's standard deviation on {IMAGES} training images")
        image, decoded = pairs(pipe.codec, source, data.image_size, pipe.device)
        std = fit(image, decoded).tolist()
        write_json(file, {"decoder_std": std, "values": len(image), **key})
        return std

    return processes.each(lambda: read_or_fit() if processes.main else [])[0]


@torch.no_grad()
def pairs(
    codec: LatentCodec, source: Source, size: int, device: torch.device
) -> tuple[Float[Tensor, "n C"], Float[Tensor, "n C"]]:
    """Pixels of training images, and the same pixels decoded from a draw of the posterior."""
    samples = itertools.islice(readable(source), IMAGES)
    images, decoded = [], []
    while read := list(itertools.islice(samples, AT_ONCE)):
        image = torch.stack([prepare(sample.image, size) for _, sample in read]).to(device)
        posterior = codec.autoencoder.encode(image)
        noise = np.stack([rng.normal(SEED, "likelihood/fit", i, tuple(posterior.mean.shape[1:])) for i, _ in read])
        latent = codec.latent(posterior, torch.from_numpy(noise).to(device))
        reconstruction = finite(codec.decode(latent), "reconstructions of training images")
        place = torch.linspace(0, size**2 - 1, min(PIXELS, size**2)).round().long().to(device)
        images.append(image.flatten(2)[:, :, place].transpose(1, 2).flatten(0, 1).cpu())
        decoded.append(reconstruction.flatten(2)[:, :, place].transpose(1, 2).flatten(0, 1).cpu())
    if not images:
        raise DataError("no training image can be read: the decoder's standard deviation cannot be fitted")
    return torch.cat(images), torch.cat(decoded)


def fit(image: Float[Tensor, "n C"], decoded: Float[Tensor, "n C"]) -> Float[Tensor, " C"]:
    """σ of each channel under which the 8-bit pixels are likeliest (discretised, L5), by golden section on log σ.

    The RMS is not the answer: it counts overshoot beyond 0 and 255, which costs nothing, and the width
    of a bin.
    """
    rms = (image.double() - decoded.double()).square().mean(0).sqrt().clamp(min=SMALLEST)
    low, high = torch.log(rms / 100).clamp(min=math.log(SMALLEST)), torch.log(rms * 3)
    golden = (math.sqrt(5) - 1) / 2

    def cost(log_std: Tensor) -> Tensor:
        return -discretised_log_probability(image.double(), decoded.double(), 2 * log_std).mean(0)

    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = cost(left), cost(right)
    for _ in range(ROUNDS):
        below = at_left < at_right  # the minimum lies below `right`, else above `left`
        low, high = torch.where(below, low, left), torch.where(below, right, high)
        new = torch.where(below, high - golden * (high - low), low + golden * (high - low))
        at_new = cost(new)
        left, right = torch.where(below, new, right), torch.where(below, left, new)
        at_left, at_right = torch.where(below, at_new, at_right), torch.where(below, at_left, at_new)
    return torch.exp((low + high) / 2)
