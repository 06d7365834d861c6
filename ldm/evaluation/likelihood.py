"""Bits per dimension of validation images: bounds of the diffusion and two-stage models (docs/equations.md L3, L6).

Every draw is a function of (seed, index of the image, number of the draw), so the batch size and the
number of processes change results by rounding only.
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
from ldm.data import rng
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
from ldm.pipeline.prompts import Prompt

SEED = 2000
SPLIT = "validation"
FIXED = ("posterior", "beta")
DRAWN = 32  # steps t drawn for each image
BINS = 40  # of t, in the report and the picture
PARTS = ("reconstruction", "prior", "denoising")

Progress = Callable[[int, int, Mapping[str, float]], None]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Nats:
    """The bound of one image in nats, summed over dimensions. In pixel space the first three are 0.

    Attributes:
        image: −log p(x|z) of the decoder.
        posterior: E log q(z|x), in the normalised latent.
        standard: KL(q(z|x) ‖ N(0, I)), the cost of the latent without a diffusion model.
        prior: KL at t = T (F4).
        reconstruction: −log p(z|z_1) of the last step, or −log p(x|x_1), by reverse variance.
        t: the steps evaluated.
        denoising: their weighted KLs, by reverse variance.
    """

    image: float
    posterior: float
    standard: float
    prior: float
    reconstruction: dict[str, float]
    t: list[int]
    denoising: dict[str, list[float]]

    def diffused(self, variance: str) -> float:
        """The bound of the latent, or of the image in pixel space (L3)."""
        return self.reconstruction[variance] + self.prior + sum(self.denoising[variance])

    def terms(self, variance: str) -> dict[str, float]:
        """All terms of the bound; they sum to it."""
        return {
            "image": self.image,
            "posterior": self.posterior,
            "latent_reconstruction": self.reconstruction[variance],
            "latent_prior": self.prior,
            "latent_denoising": sum(self.denoising[variance]),
        }

    def parts(self, variance: str) -> dict[str, float]:
        """The terms grouped as in L3."""
        reconstruction = self.image + self.posterior + self.reconstruction[variance]
        return dict(zip(PARTS, (reconstruction, self.prior, sum(self.denoising[variance])), strict=True))


def likelihood(
    run: Path, images: int, timesteps: int | None, variance: str | None, batch_size: int, seed: int,
    progress: Progress, say: Say,
    processes: Processes = ALONE, device: torch.device | None = None, parts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Bound −log p(image | caption) of validation images; writes report.json (its ``likelihood``) and likelihood.png.

    Args:
        timesteps: steps t drawn for each image, 0 for all; by default DRAWN, or all if there are fewer.
        variance: of the reverse steps; by default learned if the model has learned it, else beta for
            latents and posterior for pixels: at the least noise a latent is still a smooth density,
            whereas a pixel is known.
        parts: replacements for parts of the model (``vae``, ``text``), see ``Pipeline.from_pretrained``.

    Raises:
        ConfigError: a setting does not fit the model.
        DataError: no image can be read.
    """
    started = time.monotonic()
    config = configuration.load(DiffusionTrainingConfig, configuration.model_config_file(run))
    pipe = Pipeline.from_pretrained(run, device, **(parts or {}))
    if config.train.channels_last:  # as in training
        pipe.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if pipe.schedule_config.blind_at_the_end(pipe.target):
        raise ConfigError(
            f"{run}: the bound of a model that predicts {pipe.target} is infinite where its schedule leaves no signal"
        )
    last = pipe.schedule.num_steps - 1
    timesteps = _timesteps(timesteps, last)
    chosen, variances = _variances(pipe, variance)
    std = decoder_noise.of_run(run, pipe, config.data, processes, say) if pipe.codec else None
    source = open_source(config.data, SPLIT)

    def work(share: range) -> list[Nats | None]:
        rows: list[Nats | None] = []
        for start in range(0, len(share), batch_size):
            indices = share[start : start + batch_size]
            measured = measure(pipe, source, config.data, indices, timesteps, variances, std, seed)
            rows += [measured.get(i) for i in indices]
            progress(len(rows), len(share), {})
        return rows

    rows = [row for row in processes.over(min(images, source.length or images), work) if row is not None]
    if not rows:
        raise DataError(f"{run}: none of its {SPLIT} images can be read")
    found = summary(pipe, config.data, rows, variances, chosen)
    found |= {"variance": chosen, "timesteps": timesteps or last, "images": len(rows), "split": SPLIT, "seed": seed}
    found |= {"given": _given(pipe), "model": pipe.hash}
    found |= ({"decoder_std": std} if std else {}) | {"seconds": round(time.monotonic() - started, 1)}
    if processes.main:
        file = run / "report.json"
        write_json(file, (read_json(file) if file.is_file() else {}) | {"likelihood": found})
        plots.likelihood(found, run / "likelihood.png")
    return found


def _given(pipe: Pipeline) -> str:
    """The conditions of the likelihood."""
    names = (["caption"] if pipe.text else []) + list(pipe.conditioner.names if pipe.conditioner else ())
    return ", ".join(names) or "nothing"


def _timesteps(wanted: int | None, last: int) -> int:
    """Number of steps to evaluate, 0 for all; DRAWN by default. Raises ConfigError."""
    timesteps = min(DRAWN, last) if wanted is None else wanted
    if not 0 <= timesteps <= last:
        raise ConfigError(f"timesteps must lie between 1 and {last}, or be 0 for all of them, got {timesteps}")
    return timesteps


def _variances(pipe: Pipeline, wanted: str | None) -> tuple[str, tuple[str, ...]]:
    """The reverse variance of the result, and all those that the model can be measured with. Raises ConfigError."""
    variances = (*FIXED, "learned") if pipe.learned_variance else FIXED
    if wanted is not None and wanted not in variances:
        raise ConfigError(f"variance must be one of {', '.join(variances)} for this model, got {wanted}")
    return wanted or ("learned" if pipe.learned_variance else "beta" if pipe.codec else "posterior"), variances


@torch.no_grad()
def measure(
    pipe: Pipeline, source: Source, data: DataConfig, indices: Sequence[int], timesteps: int, variances: Sequence[str],
    std: list[float] | None, seed: int,
) -> dict[int, Nats]:  # fmt: skip
    """Measure the images ``indices`` in one batch; those that cannot be read are left out of the result."""
    read = list(readable(source, indices))
    if not read:
        return {}
    numbers = [i for i, _ in read]
    image = torch.stack([prepare(sample.image, data.image_size) for _, sample in read]).to(pipe.device)
    gaussian.check_pixels(image)

    # the autoencoder's terms
    zero = torch.zeros(len(image), dtype=torch.float64)
    x0, log_p, log_q, standard = image, zero, zero, zero
    if pipe.codec:
        assert std is not None
        posterior = normalised(pipe.codec, pipe.codec.autoencoder.encode(image))
        x0 = posterior.sample(normal(seed, "z", numbers, posterior.mean))
        log_p = image_log_likelihood(image, pipe.codec.decode(x0), std).cpu()
        log_q = -_summed(gaussian.entropy(posterior.logvar.double())).cpu()  # the expectation, in closed form
        standard = _summed(posterior.kl().double()).cpu()

    # the bound of the latent, at the same steps for every variance
    conditioner = pipe.conditioner
    prompts = [Prompt(sample.text, conditioner.values(source.columns(i)) if conditioner else {}) for i, sample in read]
    denoiser = pipe.denoiser(prompts, dataclasses.replace(pipe.defaults, guidance_scale=1.0, guidance_alone=()))
    steps = all_steps(pipe.schedule, len(x0))
    if timesteps:
        uniform = np.stack([rng.generator(seed, "likelihood/t", i).random(timesteps) for i in numbers])
        steps = drawn_steps(pipe.schedule, torch.from_numpy(uniform).to(pipe.device))
    found = bounds(
        denoiser, x0, lambda k: normal(seed, f"noise {k}", numbers, x0), steps, variances, pixels=pipe.codec is None
    )
    by_variance = dict(zip(variances, found, strict=True))
    rows: dict[int, Nats] = {}
    for i, n in enumerate(numbers):
        rows[n] = Nats(
            image=-float(log_p[i]),
            posterior=float(log_q[i]),
            standard=float(standard[i]),
            prior=float(found[0].prior[i]),
            reconstruction={name: float(bound.reconstruction[i]) for name, bound in by_variance.items()},
            t=steps.t[i].tolist(),
            denoising={name: bound.denoising[i].tolist() for name, bound in by_variance.items()},
        )
    for n, row in rows.items():
        if not all(math.isfinite(row.terms(name)[term]) for name in variances for term in row.terms(name)):
            raise NonFiniteError(f"the bound of image {n}: not finite (NaN or infinite)")
    return rows


def normalised(codec: LatentCodec, posterior: DiagonalGaussian) -> DiagonalGaussian:
    """The posterior of the normalised latent (z − shift)·scale, by a change of variables (L6)."""
    return DiagonalGaussian(
        (posterior.mean - codec.shift) * codec.scale, posterior.logvar + 2 * math.log(abs(codec.scale))
    )


def image_log_likelihood(image: Tensor, decoded: Tensor, std: Sequence[float]) -> Tensor:
    """log p(x|z) of 8-bit images [b, C, H, W] under a discretised Gaussian, one σ per channel; [b]."""
    log_variance = 2 * torch.tensor(std, dtype=torch.float64, device=image.device).log().reshape(1, -1, 1, 1)
    return _summed(gaussian.discretised_log_probability(image.double(), decoded.double(), log_variance))


def normal(seed: int, name: str, numbers: Sequence[int], like: Tensor) -> Tensor:
    """Standard normal draws in the shape of ``like``, a function of seed, name and number of each image."""
    drawn = np.stack([rng.normal(seed, f"likelihood/{name}", n, tuple(like.shape[1:])) for n in numbers])
    return torch.from_numpy(drawn).to(like)


def summary(
    pipe: Pipeline, data: DataConfig, rows: Sequence[Nats], variances: Sequence[str], chosen: str
) -> dict[str, Any]:
    """The results in bits per dimension of the image, except ``latent``: per dimension of the latent."""
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
        latent_mean, latent_error = _bits(latent[chosen], diffused)
        found["latent"] = {"bits_per_dim": latent_mean, "error": latent_error, "dimensions": diffused}
        found["with_standard_normal_prior"] = _bits([row.image + row.standard for row in rows], dimensions)[0]  # L12
    found["by_variance"] = {name: _bits(values, dimensions)[0] for name, values in totals.items()}
    found["by_t"] = by_t(pipe, rows, chosen, dimensions)
    return found


def by_t(pipe: Pipeline, rows: Sequence[Nats], variance: str, dimensions: int) -> list[dict[str, float]]:
    """The denoising part in at most BINS bins of t, drawn about equally often; the bins sum to the part."""
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
