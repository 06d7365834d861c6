"""Forward and reverse chain of a trained model, as it diffuses and as pictures (docs/equations.md F3, S1 to S3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ldm.config import ConfigError, DataConfig, SampleConfig
from ldm.data import rng
from ldm.data.sample import readable
from ldm.data.sources import open_source
from ldm.data.transforms import prepare, to_uint8
from ldm.diffusion.process import transition
from ldm.diffusion.schedule import Schedule, like
from ldm.evaluation.figures.page import Page, table
from ldm.files.tensors.finite import finite
from ldm.pipeline import Pipeline
from ldm.pipeline.checks import grid_of

COLUMNS = 8  # pictures of a chain, without its clean end
REACH = 3.0  # latents are near N(0, I): −3 is black, 3 is white
LATENT, DECODED, PIXELS, PREDICTED = "latent $x_t$", "$x_t$ decoded", "image, same $t$", r"$\hat{x}_0$ decoded"


def validation_images(data: DataConfig, n: int) -> tuple[Float[Tensor, "b c h w"], list[str]]:
    """The first ``n`` readable validation images and their captions. Raises ConfigError if there are fewer."""
    source = open_source(data, "validation")
    samples = [sample for _, (_, sample) in zip(range(n), readable(source), strict=False)]
    if len(samples) < n:
        raise ConfigError(f"--images {n}: only {len(samples)} validation images can be read")
    return torch.stack([prepare(s.image, data.image_size) for s in samples]), [s.text for s in samples]


def noised(
    schedule: Schedule, x0: Float[Tensor, "b *d"], times: Sequence[int], seed: int
) -> list[Float[Tensor, "b *d"]]:
    """Draw the chain x_0 → x_t at rising ``times``, each from the last by q(x_t | x_s) with fresh noise (F3)."""
    nodes, x, drawn = torch.tensor([-1, *times], device=x0.device), x0, []
    for i, (s, t) in enumerate(pairwise(nodes)):
        z = np.stack([rng.normal(seed, f"plot/forward {i}", n, tuple(x0.shape[1:])) for n in range(len(x0))])
        ratio, variance = transition(schedule, s, t)
        x = like(ratio, x) * x + like(variance.sqrt(), x) * torch.from_numpy(z).to(x)
        drawn.append(x)
    return drawn


@torch.no_grad()
def forward_chain(
    pipe: Pipeline, images: Float[Tensor, "b c h w"], times: Sequence[int], seed: int
) -> dict[str, UInt8[np.ndarray, "b k h w c2"]]:
    """The images, clean and at each t, as rows by label.

    A pixel model has one row. A two-stage model has the latent (its first three channels as colours), the
    latent decoded, and for comparison the image noised to the same ᾱ. The latent of an image is its
    posterior mean.
    """
    images = images.to(pipe.device)
    pixels = _pictures([images, *noised(pipe.schedule, images, times, seed)])
    if pipe.codec is None:
        return {"$x_t$": pixels}
    mean = pipe.codec.autoencoder.encode(images)
    x0 = finite(pipe.codec.latent(mean, torch.zeros_like(mean.mean)), "the latents of the images")
    chain = [x0, *noised(pipe.schedule, x0, times, seed)]
    shown = [(x[:, :3] / REACH).repeat_interleave(pipe.factor, -1).repeat_interleave(pipe.factor, -2) for x in chain]
    return {
        LATENT: _pictures(shown),
        DECODED: _pictures([finite(pipe.codec.decode(x), "what the autoencoder decodes") for x in chain]),
        PIXELS: pixels,
    }


def forward_page(pipe: Pipeline, data: DataConfig, n: int, times: Sequence[int] | None, seed: int) -> Page:
    """Page of the first ``n`` validation images; ``times``: equally spaced by default. Raises ConfigError."""
    last = pipe.schedule.num_steps - 1
    if times is None:
        times = [min(round((i + 1) / COLUMNS * (last + 1)), last) for i in range(COLUMNS)]
    times = sorted(set(times))
    if not times or times[0] < 0 or times[-1] > last:
        given = ", ".join(map(str, times))
        raise ConfigError(f"--times must lie between 0 and {last} (T − 1 of this model), got {given}")
    images, captions = validation_images(data, n)
    rows = forward_chain(pipe, images, times, seed)
    groups = [(caption, _same_channels([row[i] for row in rows.values()])) for i, caption in enumerate(captions)]
    noised_part = "images themselves" if pipe.codec is None else f"latents of {pipe.unet.in_channels} channels"
    schedule = f"{pipe.schedule_config.name} schedule"
    title = f"Forward chain of validation images: the {noised_part} are noised, {schedule}"
    return table(groups, list(rows), ["clean", *(f"t = {t}" for t in times)], title=title)


@dataclass(frozen=True)
class ReverseChain:
    """State of the sampler and prediction of the network at some of its steps."""

    t: list[float]  # of each step kept, falling
    x: list[Float[Tensor, "b c h w"]]  # x_t before the step
    x0: list[Float[Tensor, "b c h w"]]  # x̂_0 that the step used
    end: Float[Tensor, "b c h w"]  # x after the last step
    images: Float[Tensor, "b C H W"]  # the same, decoded


@torch.no_grad()
def reverse_chain(
    pipe: Pipeline, prompts: Sequence[str], settings: SampleConfig, columns: int = COLUMNS
) -> ReverseChain:
    """Draw one image of each prompt, and keep ``columns`` steps of the chain, including the first and last."""
    pipe.check(settings)
    grid, side = grid_of(pipe.schedule, settings), pipe.sample_size // pipe.factor
    steps = len(grid) - 1
    chosen = sorted({round(i * (steps - 1) / max(columns - 1, 1)) for i in range(columns)})
    shape = (pipe.unet.in_channels, side, side)
    start = [rng.normal(settings.seed, "sample/x_T", i, shape) for i in range(len(prompts))]  # as Pipeline.sample's
    states, predictions = {0: torch.from_numpy(np.stack(start)).to(pipe.device)}, {}

    def keep(step: int, x: Tensor, x0: Tensor) -> None:
        if step in chosen:
            predictions[step] = x0
        if step + 1 in (*chosen, steps):
            states[step + 1] = x

    images = torch.cat(list(pipe.sample(prompts, settings, batch_size=len(prompts), callback=keep)))
    t = [float(grid[i]) for i in chosen]
    x, x0 = ([kept[i] for i in chosen] for kept in (states, predictions))
    return ReverseChain(t, x, x0, states[steps], images)


@torch.no_grad()
def reverse_page(pipe: Pipeline, prompts: Sequence[str], settings: SampleConfig, columns: int = COLUMNS) -> Page:
    """Page of the reverse chain of each prompt: x_t, the x̂_0 predicted from it below, the sample at the right."""
    chain = reverse_chain(pipe, prompts, settings, columns)
    decode = pipe.codec.decode if pipe.codec else lambda x: x
    noisy = _pictures([*map(decode, chain.x), chain.images])
    predicted = _pictures(list(map(decode, chain.x0)))
    blank = np.full_like(predicted[:, :1], 255)  # nothing is predicted from a clean sample
    predicted = np.concatenate([predicted, blank], axis=1)
    rows = [DECODED, PREDICTED] if pipe.codec else ["$x_t$", r"$\hat{x}_0$"]
    guidance = f", guidance {settings.guidance_scale:g}" if pipe.text else ""
    title = f"Reverse chain: {settings.sampler}, {settings.steps} steps{guidance}, seed {settings.seed}"
    groups = [(prompt, np.stack([noisy[i], predicted[i]])) for i, prompt in enumerate(prompts)]
    return table(groups, rows, [*(f"t = {t:.0f}" for t in chain.t), "sample"], title=title)


def _pictures(images: Sequence[Float[Tensor, "b c h w"]]) -> UInt8[np.ndarray, "b k h w c"]:
    return np.stack([to_uint8(x) for x in images], axis=1)


def _same_channels(rows: Sequence[UInt8[np.ndarray, "k h w c"]]) -> UInt8[np.ndarray, "r k h w c2"]:
    """Give all rows three channels: a grey image may stand beside a coloured latent, or a grey latent."""
    return np.stack([row if row.shape[-1] == 3 else row[..., :1].repeat(3, axis=-1) for row in rows])
