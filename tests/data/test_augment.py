"""Augmentation of the autoencoder's images: each change against numpy's own, and what a run makes of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.config import AugmentConfig, AutoencoderTrainingConfig, ConfigError, DataConfig
from ldm.data.augment import DRAWS, augmented
from ldm.training.stages.autoencoder import AutoencoderTask

IMAGES = torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1


def draws(n: int = 8, **given: list[float]) -> dict[str, Tensor]:
    """Draws that change nothing, but for those that are given."""
    neutral = dict.fromkeys(DRAWS, 0.0) | {"zoom": 1.0, "contrast": 1.0}
    return {name: torch.tensor(given.get(name, [value] * n)) for name, value in neutral.items()}


def test_nothing_is_changed_by_default() -> None:
    assert AugmentConfig().none and not AugmentConfig(turn=True).none
    assert augmented(IMAGES, draws(turn=[0.9] * 8, zoom=[0.0] * 8), AugmentConfig()) is IMAGES


def test_turns_are_the_eight_of_a_square() -> None:
    turned = augmented(
        IMAGES[:1].expand(8, -1, -1, -1), draws(turn=[i / 8 for i in range(8)]), AugmentConfig(turn=True)
    )
    image = IMAGES[0].numpy()
    expected = [np.rot90(m, k, (1, 2)) for k in range(4) for m in (image, image[:, :, ::-1])]
    for one in turned.numpy():
        assert sum(np.allclose(one, other, atol=1e-5) for other in expected) == 1
    assert len({one.numpy().round(3).tobytes() for one in turned}) == 8


def test_zoom_enlarges_a_part() -> None:
    """Half of the side, from each corner: its pixels, two for one, with torch's own bilinear enlargement between."""
    corners = draws(4, zoom=[0.0] * 4, left=[0.0, 1.0, 0.0, 1.0], top=[0.0, 0.0, 1.0, 1.0])
    found = augmented(IMAGES[:4], corners, AugmentConfig(zoom=0.5))
    for i, (x, y) in enumerate([(0, 0), (3, 0), (0, 3), (3, 3)]):
        part = torch.nn.functional.interpolate(IMAGES[i : i + 1, :, y : y + 3, x : x + 3], size=(6, 6), mode="bilinear")
        torch.testing.assert_close(found[i, :, 1:-1, 1:-1], part[0, :, 1:-1, 1:-1])  # at its border it sees neighbours
    assert torch.allclose(augmented(IMAGES, draws(), AugmentConfig(zoom=0.5)), IMAGES, atol=1e-5)


def test_colours_are_exchanged_inverted_and_faded() -> None:
    found = augmented(
        IMAGES[:3], draws(3, channels=[0.0, 0.4, 0.7], inverted=[0.0, 0.0, 0.0]), AugmentConfig(colours=True)
    )
    for i in range(3):
        torch.testing.assert_close(found[i], IMAGES[i].roll(-i, 0))
    eighths = [i / 8 for i in range(8)]
    found = augmented(IMAGES, draws(inverted=eighths, contrast=[0.0] * 8), AugmentConfig(colours=True))
    for i in range(8):
        signs = torch.tensor([-1.0 if i >> channel & 1 else 1.0 for channel in range(3)])
        torch.testing.assert_close(found[i], IMAGES[i] * signs[:, None, None] / 2)


def test_a_training_step_sees_changed_images_and_validation_does_not() -> None:
    from autoencoder.config import AutoencoderConfig

    model = AutoencoderConfig(channels=(4, 4), layers_per_level=1, groups=1, mid_attention=False)
    data = DataConfig(source="shapes", image_size=32, size=16)
    seen = []
    for augment in (AugmentConfig(), AugmentConfig(turn=True, zoom=0.5, colours=True)):
        task = AutoencoderTask(AutoencoderTrainingConfig("run", data, augment, model))
        batch = torch.utils.data.default_collate([task.stream[i] for i in range(4)])
        assert set(DRAWS) <= batch.keys() or augment.none

        def network(image: Tensor, noise: Tensor, task: AutoencoderTask = task) -> object:
            seen.append(image)
            return task.autoencoder(image, noise)

        task.micro_step({"autoencoder": network}, batch, 0, lambda loss: None)  # type: ignore[dict-item]
        assert not set(DRAWS) & task.validation[0].keys()
        assert torch.equal(seen[-1], batch["image"]) == augment.none
    assert not torch.allclose(seen[0], seen[1])


def test_zoom_is_a_share() -> None:
    with pytest.raises(ConfigError, match=r"zoom must lie between 0\.05 and 1\.0, got 2"):
        AugmentConfig(zoom=2.0)
