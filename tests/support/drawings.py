"""Drawn scenes of known truth, and pictures spoilt as a model spoils them."""

import numpy as np
from scipy.ndimage import gaussian_filter

from ldm.config import DataConfig
from ldm.data.shapes import Scene
from ldm.data.sources import open_source


def drawings(source: str, side: int, count: int) -> tuple[np.ndarray, list[Scene], list[str]]:
    """Images uint8 [count, side, side, 3], scenes and captions, half of them of held-out combinations."""
    data = DataConfig(source=source, image_size=side)
    half = [open_source(data, split) for split in ("validation", "held_out")]
    samples = [half[i % 2][i] for i in range(count)]
    return np.stack([s.image for s in samples]), [s.truth for s in samples], [s.text for s in samples]


def spoil(images: np.ndarray, blur: float, noise: float) -> np.ndarray:
    """Blurred by a Gaussian of σ ``blur`` px, with normal noise of σ ``noise`` of the range."""
    blurred = gaussian_filter(images / 255, (0, blur, blur, 0))
    noisy = blurred + np.random.default_rng(0).normal(0, noise, images.shape)
    return np.rint(255 * noisy.clip(0, 1)).astype(np.uint8)
