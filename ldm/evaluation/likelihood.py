"""Bits per dimension of a run's validation images: the bound of the diffusion model, of the whole two-stage model (equations.md L3, L6).

Every draw is a function of (seed, index of the image, number of the draw), so neither the batch size nor the number of
processes changes a figure by more than rounding.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoencoder.posterior import DiagonalGaussian
from ldm import config as configuration
from ldm.config import ConfigError, DataConfig, DiffusionTrainingConfig
from ldm.data import rng as streams
from ldm.data.sample import Source, readable
from ldm.data.sources import open_source
from ldm.data.transforms import prepare
from ldm.diffusion import gaussian
from ldm.diffusion.likelihood import (
    all_steps,
    bits_per_dimension,
    bounds,
    drawn_steps,
    step_probabilities,
    two_stage_bound,
)
from ldm.distributed.processes import ALONE, Processes
from ldm.errors import DataError, NonFiniteError
from ldm.evaluation import decoder_noise
from ldm.evaluation.figures import plots
from ldm.files.json import read_json, write_json
from ldm.pipeline import Pipeline
from ldm.pipeline.codec import LatentCodec

SEED = 2000
SPLIT = "validation"
FIXED = ("posterior", "beta")
DRAWN = 32  # steps for each image
BINS = 40  # of t, in the report and the picture
PARTS = ("reconstruction", "prior", "denoising")

Progress = Callable[[int, int, Mapping[str, float]], None]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Nats:
    """One image in nats, summed over its dimensions. The first two and ``standard`` are 0 in pixel space.

    Attributes:
        image: −log p(x|z), the decoder's.
        posterior: E log q(z|x), in the normalised latent.
        standard: KL(q(z|x) ‖ N(0, I)), what the latent costs without a diffusion model.
        prior: F4.
        reconstruction: the last step's −log p(z|z_1), or of the image itself, with each reverse variance.
        t: the steps evaluated.
        denoising: their weighted KLs with each reverse variance.
    """

    image: float
    posterior: float
    standard: float
    prior: float
    reconstruction: dict[str, float]
    t: list[int]
    denoising: dict[str, list[float]]

    def diffused(self, variance: str) -> float:
        """The bound of what is diffused (L3)."""
        return self.reconstruction[variance] + self.prior + sum(self.denoising[variance])

    def terms(self, variance: str) -> dict[str, float]:
        """Every term of the bound; their sum is the whole."""
        return {
            "image": self.image,
            "posterior": self.posterior,
            "latent_reconstruction": self.reconstruction[variance],
            "latent_prior": self.prior,
            "latent_denoising": sum(self.denoising[variance]),
        }

    def parts(self, variance: str) -> dict[str, float]:
        """The terms grouped as L3 has them."""
        reconstruction = self.image + self.posterior + self.reconstruction[variance]
        return dict(zip(PARTS, (reconstruction, self.prior, sum(self.denoising[variance])), strict=True))


def likelihood(
    run: Path, images: int, timesteps: int | None, variance: str | None, batch_size: int, seed: int, progress: Progress, say: Say,
    processes: Processes = ALONE, device: torch.device | None = None, parts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Bound −log p(image | caption) for validation images; writes report.json (its ``likelihood``) and likelihood.png.

    ``timesteps``: steps drawn for each image, 0 for all; left out, DRAWN or as many as there are.
    ``variance``: of the reverse steps; left out, learned where the model has learned it, else beta for latents and
    posterior for pixels: at the steps of least noise a latent is still a smooth density, and a pixel is known.
    ``parts``: of the model, as ``Pipeline.from_pretrained`` takes them (``vae``, ``text``).
    Raises ConfigError for a setting that does not fit the model, DataError where no image can be read.
    """
    started = time.monotonic()
    config = configuration.load(DiffusionTrainingConfig, run / "config.yaml")
    pipe = Pipeline.from_pretrained(run, device, **(parts or {}))
    if config.train.channels_last:  # as in training
        pipe.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if pipe.schedule_config.blind_at_the_end(pipe.target):
        raise ConfigError(
            f"{run}: the bound of a model that predicts {pipe.target} is infinite where its schedule leaves no signal"
        )
    last = pipe.schedule.num_steps - 1
    timesteps = min(DRAWN, last) if timesteps is None else timesteps
    if not 0 <= timesteps <= last:
        raise ConfigError(f"timesteps must lie between 1 and {last}, or be 0 for all of them, got {timesteps}")
    variances = (*FIXED, "learned") if pipe.learned_variance else FIXED
    if variance is not None and variance not in variances:
        raise ConfigError(f"variance must be one of {', '.join(variances)} for this model, got {variance}")
    std = decoder_noise.of_run(run, pipe, config.data, processes, say) if pipe.codec else None
    source = open_source(config.data, SPLIT)

    def share(mine: range) -> list[Nats | None]:
        found: list[Nats | None] = []
        for start in range(0, len(mine), batch_size):
            indices = mine[start : start + batch_size]
            known = measure(pipe, source, config.data, indices, timesteps, variances, std, seed)
            found += [known.get(i) for i in indices]
            progress(len(found), len(mine), {})
        return found

    rows = [row for row in processes.over(min(images, source.length or images), share) if row is not None]
    if not rows:
        raise DataError(f"{run}: none of its {SPLIT} images can be read")
    chosen = variance or ("learned" if pipe.learned_variance else "beta" if pipe.codec else "posterior")
    found = summary(pipe, config.data, rows, variances, chosen)
    settings = {"variance": chosen, "timesteps": timesteps or last, "images": len(rows), "split": SPLIT, "seed": seed}
    given = {"given": "caption" if pipe.text else "nothing", "model": pipe.hash}
    found |= (
        settings | given | ({"decoder_std": std} if std else {}) | {"seconds": round(time.monotonic() - started, 1)}
    )
    if processes.main:
        file = run / "report.json"
        write_json(file, (read_json(file) if file.is_file() else {}) | {"likelihood": found})
        plots.likelihood(found, run / "likelihood.png")
    return found


@torch.no_grad()
def measure(
    pipe: Pipeline, source: Source, data: DataConfig, indices: Sequence[int], timesteps: int, variances: Sequence[str],
    std: list[float] | None, seed: int,
) -> dict[int, Nats]:  # fmt: skip
    """The images ``indices`` in one batch, by index; those that cannot be read are left out."""
    read = list(readable(source, indices))
    if not read:
        return {}
    numbers = [i for i, _ in read]
    image = torch.stack([prepare(sample.image, data.image_size) for _, sample in read]).to(pipe.device)
    gaussian.check_pixels(image)
    zero = torch.zeros(len(image), dtype=torch.float64)
    x0, log_p, log_q, standard = image, zero, zero, zero
    if pipe.codec:
        assert std is not None
        posterior = normalised(pipe.codec, pipe.codec.autoencoder.encode(image))
        x0 = posterior.sample(normal(seed, "z", numbers, posterior.mean))
        log_p = image_log_likelihood(image, pipe.codec.decode(x0), std).cpu()
        log_q = -_summed(
            gaussian.entropy(posterior.logvar.double())
        ).cpu()  # its expectation, which no draw need estimate
        standard = _summed(posterior.kl().double()).cpu()
    captions = [sample.text for _, sample in read]
    denoiser = pipe.denoiser(captions, dataclasses.replace(pipe.defaults, guidance_scale=1.0))
    steps = all_steps(pipe.schedule, len(x0))
    if timesteps:
        uniform = np.stack([streams.generator(seed, "likelihood/t", i).random(timesteps) for i in numbers])
        steps = drawn_steps(pipe.schedule, torch.from_numpy(uniform).to(pipe.device))
    found = bounds(
        denoiser, x0, lambda k: normal(seed, f"noise {k}", numbers, x0), steps, variances, pixels=pipe.codec is None
    )
    by_variance = dict(zip(variances, found, strict=True))
    rows = {
        n: Nats(
            -float(log_p[i]), float(log_q[i]), float(standard[i]), float(found[0].prior[i]),
            {name: float(bound.reconstruction[i]) for name, bound in by_variance.items()}, steps.t[i].tolist(),
            {name: bound.denoising[i].tolist() for name, bound in by_variance.items()},
        ) for i, n in enumerate(numbers)
    }  # fmt: skip
    for n, row in rows.items():
        if not all(math.isfinite(row.terms(name)[term]) for name in variances for term in row.terms(name)):
            raise NonFiniteError(f"the bound of image {n}: not finite (NaN or infinite)")
    return rows


def normalised(codec: LatentCodec, posterior: DiagonalGaussian) -> DiagonalGaussian:
    """The posterior of the latent that is diffused, (z − shift)·scale: a change of variables by the scale alone (L6)."""
    return DiagonalGaussian(
        (posterior.mean - codec.shift) * codec.scale, posterior.logvar + 2 * math.log(abs(codec.scale))
    )


def image_log_likelihood(image: Tensor, decoded: Tensor, std: Sequence[float]) -> Tensor:
    """log p(x|z) of 8-bit images [b, C, H, W], a discretised Gaussian around the decoder's output, one σ for each channel; [b]."""
    log_variance = 2 * torch.tensor(std, dtype=torch.float64, device=image.device).log().reshape(1, -1, 1, 1)
    return _summed(gaussian.discretised_log_probability(image.double(), decoded.double(), log_variance))


def normal(seed: int, name: str, numbers: Sequence[int], like: Tensor) -> Tensor:
    """Standard normal draws of the shape of ``like``, one array for each image by its number."""
    drawn = np.stack([streams.normal(seed, f"likelihood/{name}", n, tuple(like.shape[1:])) for n in numbers])
    return torch.from_numpy(drawn).to(like)


def summary(
    pipe: Pipeline, data: DataConfig, rows: Sequence[Nats], variances: Sequence[str], chosen: str
) -> dict[str, Any]:
    """The figures of the report, in bits per dimension of the image, but for ``latent``, which is per latent dimension."""
    dimensions = data.image_channels * data.image_size**2
    diffused = dimensions // pipe.factor**2 // data.image_channels * pipe.unet.in_channels
    image, posterior = _float64([row.image for row in rows]), _float64([row.posterior for row in rows])
    latent = {name: _float64([row.diffused(name) for row in rows]) for name in variances}
    totals = {name: two_stage_bound(-image, posterior, bound) for name, bound in latent.items()}
    mean, error = _bits(totals[chosen], dimensions)
    found: dict[str, Any] = {"bits_per_dim": mean, "error": error}
    found["parts"] = {name: _bits([row.parts(chosen)[name] for row in rows], dimensions)[0] for name in PARTS}
    if pipe.codec:
        terms = [row.terms(chosen) for row in rows]
        found["terms"] = {name: _bits([row[name] for row in terms], dimensions)[0] for name in terms[0]}
        found["latent"] = dict(zip(("bits_per_dim", "error"), _bits(latent[chosen], diffused), strict=True)) | {
            "dimensions": diffused
        }
        found["with_standard_normal_prior"] = _bits([row.image + row.standard for row in rows], dimensions)[0]  # L12
    found["by_variance"] = {name: _bits(values, dimensions)[0] for name, values in totals.items()}
    found["by_t"] = by_t(pipe, rows, chosen, dimensions)
    return found


def by_t(pipe: Pipeline, rows: Sequence[Nats], variance: str, dimensions: int) -> list[dict[str, float]]:
    """The denoising part in up to BINS bins of t, each drawn about equally often; the bins sum to the part."""
    cumulative = step_probabilities(pipe.schedule).cumsum(0).cpu()
    count = len(cumulative)
    ends = list(range(1, count + 1))  # the last t of each bin
    if count > BINS:
        ends = torch.searchsorted(cumulative, torch.arange(1, BINS, dtype=torch.float64) / BINS).tolist()
        ends = sorted({*(end + 1 for end in ends), count})
    sums = np.zeros((len(rows), len(ends)))
    for i, row in enumerate(rows):
        np.add.at(sums[i], np.searchsorted(ends, row.t), row.denoising[variance])
    bins = []
    for k, (start, end) in enumerate(zip([1, *(e + 1 for e in ends[:-1])], ends, strict=True)):
        mean, error = _bits(sums[:, k], dimensions)
        bins.append({"from": start, "to": end, "bits_per_dim": mean, "error": error})
    return bins


def _bits(nats: Sequence[float] | np.ndarray | Tensor, dimensions: int) -> tuple[float, float | None]:
    """Mean over images in bits per dimension, and its standard error; None for one image."""
    values = bits_per_dimension(torch.as_tensor(nats, dtype=torch.float64), dimensions)
    return float(values.mean()), float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None


def _float64(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _summed(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1)
