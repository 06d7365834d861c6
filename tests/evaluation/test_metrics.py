"""The metrics beside closed forms; that of `proportion` is in test_judge.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ldm.evaluation.metrics import diversity, pairwise_distance, root_mean_square, sliced_wasserstein


def test_pairwise_distance_is_the_mean_over_pairs() -> None:
    black, white = np.zeros((4, 4, 3), dtype=np.uint8), np.full((4, 4, 3), 255, dtype=np.uint8)
    assert pairwise_distance(np.stack([black, white])) == 1
    assert pairwise_distance(np.stack([black] * 5)) == 0
    assert pairwise_distance(np.stack([black, black, white])) == pytest.approx(2 / 3)
    half = black.copy()
    half[:2] = 255
    assert pairwise_distance(np.stack([black, half])) == pytest.approx(np.sqrt(0.5))


def test_diversity_is_a_ratio_with_its_interval() -> None:
    rng = np.random.default_rng(0)
    real = rng.uniform(0.1, 0.3, 40)
    assert diversity(real, real) == (1.0, 1.0, 1.0)
    assert diversity(0 * real, real) == (0.0, 0.0, 0.0)
    covered = 0
    for _ in range(100):  # the truth is ½
        drawn = real * rng.uniform(0, 1, 40)
        value, low, high = diversity(drawn, real)
        assert low < value < high and value == pytest.approx(drawn.mean() / real.mean())
        covered += low <= 0.5 <= high
    assert 86 <= covered <= 100


def test_root_mean_square_compares_sample_by_sample() -> None:
    a = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    assert root_mean_square(a, a) == 0
    assert root_mean_square(a, torch.zeros_like(a)) == pytest.approx(2.5)  # √(25 / 4)
    assert root_mean_square(a, a.flip(0)) == pytest.approx(math.sqrt(50 / 4))


def test_sliced_wasserstein_of_a_shift() -> None:
    """A shift by δ moves projections by |δ| in one dimension, by (2/π)|δ| on average in the plane; order is ignored."""
    a = torch.randn(500, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert sliced_wasserstein(a, a.flip(0)) == 0
    assert sliced_wasserstein(a[:, :1], a[:, :1] + 0.7) == pytest.approx(0.7)
    assert sliced_wasserstein(a, a + torch.tensor([0.3, 0.4])) == pytest.approx(0.5 * 2 / math.pi, rel=0.1)
