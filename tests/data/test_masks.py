"""Random masks of what is filled: a function of the generator, of every kind, at any size."""

import numpy as np
import pytest

from ldm.config import ConfigError, InpaintConfig
from ldm.config.conditions import MASKS
from ldm.data.masks import draw_mask


def masks(count: int, side: int, **settings: object) -> np.ndarray:
    config = InpaintConfig(**settings)  # type: ignore[arg-type]
    drawn = [draw_mask(np.random.default_rng([side, i]), side, config) for i in range(count)]
    assert all(mask.flags.writeable for mask in drawn)  # as torch.from_numpy wants it
    return np.stack(drawn)


@pytest.mark.parametrize("side", [16, 32, 96])
@pytest.mark.parametrize("kind", MASKS)
def test_each_kind_leaves_something_and_fills_something(kind: str, side: int) -> None:
    found = masks(200, side, everything=0.0, masks=(kind,))
    assert found.dtype == np.uint8 and set(np.unique(found)) == {0, 1} and found.shape == (200, side, side)
    covered = found.mean((1, 2))
    assert covered.min() > 0 and covered.max() < 1 and 0.1 < covered.mean() < 0.6
    assert (kind == "sides" or found.any(0).mean() > 0.95) and not found.all(0).any()


def test_shares_of_the_kinds() -> None:
    found = masks(2000, 24)
    assert (found.mean((1, 2)) == 1).mean() == pytest.approx(0.25, abs=0.04)
    border = np.ones((24, 24), bool)
    border[1:-1, 1:-1] = False
    sides = masks(400, 24, everything=0.0, masks=("sides",))
    assert all(mask[border].any() for mask in sides)
    assert (sides[:, 12, 12] == 0).all()  # no side reaches the middle


def test_the_same_draws_make_the_same_mask_at_any_size() -> None:
    """Lengths are shares of the side: masks of two sizes cover about the same."""
    assert np.array_equal(masks(20, 32), masks(20, 32))
    config = InpaintConfig(everything=0.0, masks=("sides",))
    small, large = (draw_mask(np.random.default_rng(5), side, config).mean() for side in (50, 400))
    assert small == pytest.approx(large, abs=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"everything": 1.5}, "everything must lie between 0.0 and 1.0"),
        ({"masks": ("dots",)}, "masks must be some of strokes, boxes, sides, got dots"),
        ({"masks": ()}, "masks must be some of strokes, boxes, sides, got none"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        InpaintConfig(**settings)
    assert str(raised.value).startswith(message)
