"""From a decoded picture to what a network sees, and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.transforms import prepare, to_uint8


def test_levels_go_there_and_back() -> None:
    """Level k is 2k/255 − 1, and the nearest level comes back; what lies outside is clipped."""
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    values = prepare(levels, 16)
    expected = [2 * k / 255 - 1 for k in range(256)]
    torch.testing.assert_close(values.flatten(), torch.tensor(expected), rtol=0, atol=1e-7)
    assert values.min() == -1 and values.max() == 1
    for moved in (0.0, 0.4 / 127.5, -0.4 / 127.5):
        assert (to_uint8(values[None] + moved)[0] == levels).all()
    assert to_uint8(torch.tensor([-1.7, 1.7]).reshape(1, 1, 1, 2)).flatten().tolist() == [0, 255]


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (7, 9), (16, 33)])
def test_the_short_side_is_fitted_and_the_middle_is_cut(shape: tuple[int, int]) -> None:
    """As Pillow's own resize and crop; of an odd surplus the larger half lies at the end or the beginning."""
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    scale = 16 / min(shape)
    height, width = (round(side * scale) for side in shape)
    resized = Image.fromarray(picture)
    if scale != 1:
        resized = resized.resize((width, height), Image.Resampling.LANCZOS)
    found = to_uint8(prepare(picture, 16)[None])[0]
    tops, lefts = ({(side - 16) // 2, (side - 16 + 1) // 2} for side in (height, width))
    cuts = [np.asarray(resized.crop((left, top, left + 16, top + 16))) for top in tops for left in lefts]
    assert any((found == cut).all() for cut in cuts)
