"""Metrics of drawn images and of samples; each docstring says the range and which way is better.

Metrics of reconstructions are in `autoencoder.metrics` (PSNR, SSIM, high-frequency energy) and
`autoencoder.perceptual` (LPIPS), since training validates with them.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

CONFIDENCE = 1.959964  # standard deviations of a two-sided 95 % interval
RESAMPLED = 1000  # bootstrap draws of the captions
DIRECTIONS = 64  # of the sliced Wasserstein distance


def proportion(successes: int, n: int) -> dict[str, float]:
    """A share of n images with its 95 % interval (Wilson 1927); 0 to 1, higher is better."""
    z = CONFIDENCE
    p, shrink = successes / n, 1 + z * z / n
    middle = (p + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return {"accuracy": p, "low": max(0.0, middle - half), "high": min(1.0, middle + half), "n": n}


def pairwise_distance(images: UInt8[np.ndarray, "n h w c"]) -> float:
    """Mean root-mean-square pixel difference over all pairs of n ≥ 2 images.

    0 (all equal) to 1 (black against white); neither way is better in itself, see `diversity`.
    """
    flat = images.reshape(len(images), -1).astype(np.float64) / 255
    return float(np.mean([np.sqrt(np.mean((a - b) ** 2)) for a, b in itertools.combinations(flat, 2)]))


def diversity(
    drawn: Float[np.ndarray, " captions"], real: Float[np.ndarray, " captions"]
) -> tuple[float, float, float]:
    """Mean pairwise distance of drawn images over that of real ones, with its 95 % interval.

    0 (no variety) upwards; 1 is right: as varied as real images. Both arguments hold one mean per
    caption. The interval is a bootstrap over captions (Efron & Tibshirani 1993) with a fixed seed.
    """
    picks = np.random.default_rng(0).integers(len(drawn), size=(RESAMPLED, len(drawn)))
    low, high = np.quantile(drawn[picks].sum(1) / real[picks].sum(1), (0.025, 0.975))
    return float(drawn.sum() / real.sum()), float(low), float(high)


def root_mean_square(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> float:
    """Root mean square difference of two sets compared sample by sample; 0 upwards, lower is better."""
    return float((a - b).square().mean().sqrt())


def sliced_wasserstein(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"], directions: int = DIRECTIONS) -> float:
    """Mean 1-Wasserstein distance between the projections of two sets on random directions.

    0 upwards, lower is better; two sets of one distribution have a positive distance that falls with n.
    The sets have equal sizes and are compared as distributions. The directions are fixed.
    """
    ways = torch.randn(a.shape[1], directions, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ways = ways / ways.norm(dim=0)
    first, second = ((x.double() @ ways).sort(0).values for x in (a, b))
    return float((first - second).abs().mean())
