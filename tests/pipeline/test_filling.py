"""Drawing with models that were trained to fill masked parts: their further channels, and diffusers' beside them."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from support.pipelines import PROMPTS, array, make, noise

from ldm.config import ConfigError
from ldm.diffusion.condition import Condition
from ldm.pipeline import Pipeline
from ldm.pipeline.codec import masked_condition

IMAGE = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
HOLE = np.zeros((16, 16), np.uint8)
HOLE[4:12, 2:8] = 255  # whole cells of 2 × 2 pixels, of which one latent is made


@pytest.fixture(scope="module")
def fills() -> Pipeline:
    return make(fills=True)


def pixels(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_stable_diffusions_inpainting_is_diffusers(
    fills: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strength: float
) -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as posterior

    monkeypatch.setattr(posterior, "sample", lambda self, generator=None: self.mode())
    module = importlib.import_module("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint")
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: noise(7, shape[0]))
    fills.save_pretrained(tmp_path / "model", for_diffusers=True)
    opened = diffusers.StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "model")
    opened.set_progress_bar_config(disable=True)
    assert opened.unet.config.in_channels == 9
    how: dict[str, Any] = {"strength": strength, "guidance_scale": 3.0, "num_inference_steps": 10}
    picture, hole = Image.fromarray(IMAGE), Image.fromarray(HOLE)
    expected = opened(PROMPTS, image=picture, mask_image=hole, height=16, width=16, **how).images
    by = {} if strength == 1 else {"strength_by": "steps"}
    again = Pipeline.from_pretrained(tmp_path / "model", "cpu")  # from the folder that theirs was read from
    ours = again(PROMPTS, image=picture, mask_image=hole, paste=False, seed=7, sampler="ddim", **by, **how)
    assert np.abs(array(ours) - array(expected)).max() <= 1
    other = again(PROMPTS, image=picture, mask_image=Image.fromarray(HOLE.T.copy()), paste=False, seed=7, **by, **how)
    assert np.abs(array(ours) - array(other)).max() > 1


def test_the_channels_are_the_mask_and_the_rest_of_the_image(fills: Pipeline) -> None:
    assert fills.codec is not None
    mask = torch.from_numpy(HOLE / 255.0).float()[None, None]
    found = masked_condition(fills.codec, pixels(IMAGE), mask)
    gray = IMAGE.astype(float).copy()
    gray[HOLE > 0] = 127.5
    with torch.no_grad():
        rest = fills.codec.autoencoder.encode((torch.from_numpy(gray).permute(2, 0, 1)[None] / 127.5 - 1).float()).mean
    torch.testing.assert_close(found, torch.cat([mask[..., ::2, ::2], rest], 1))


def test_a_cell_is_filled_if_any_of_its_pixels_is(fills: Pipeline) -> None:
    mask = torch.zeros(1, 1, 16, 16)
    mask[0, 0, 5, 3:9] = 1
    cells = masked_condition(fills.codec, pixels(IMAGE), mask)[0, 0]
    assert cells.sum() == 4 and bool((cells[2, 1:5] == 1).all())


@pytest.mark.parametrize("codec", [True, False])
def test_without_a_mask_everything_is_drawn(codec: bool) -> None:
    """A mask of everything, whatever the image under it, and no mask at all are the same."""
    model = make(fills=True, codec=codec)
    white = np.full((16, 16), 255, np.uint8)
    plain = array(model(PROMPTS, seed=3))
    assert (array(model(PROMPTS, seed=3, image=IMAGE, mask=white)) == plain).all()
    assert (array(model(PROMPTS, seed=3, image=255 - IMAGE, mask=white)) == plain).all()
    assert (array(model(PROMPTS, seed=3, image=IMAGE, mask=HOLE, paste=False)) != plain).any()
    assert len(model(PROMPTS[:1], size=(16, 32), window=16)) == 1


def test_known_pixels_are_kept_and_blending_can_be_added(fills: Pipeline) -> None:
    how: dict[str, Any] = {"image": IMAGE, "mask": HOLE, "seed": 2}
    kept, inside = HOLE == 0, HOLE > 0
    own = array(fills(PROMPTS, **how))
    assert (own[:, kept] == IMAGE[kept]).all()
    blended = array(fills(PROMPTS, completion="blend", **how))
    assert (blended[:, inside] != own[:, inside]).any() and (blended[:, kept] == IMAGE[kept]).all()


def test_guidance_keeps_the_image_in_every_term(fills: Pipeline) -> None:
    """Also where one condition is guided alone: only captions differ."""
    seen: list[Condition] = []
    plain = fills.unet.forward
    settings = replace(fills.defaults, steps=1, guidance_alone=("caption:2",))

    def forward(x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        seen.append(cond)
        return plain(x_t, t, cond)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fills.unet, "forward", forward)
        list(fills.sample(PROMPTS[:1], settings, image=IMAGE, mask=HOLE))
    (cond,) = seen
    assert cond.concat is not None and len(cond.concat) == 3
    assert torch.equal(cond.concat[0], cond.concat[1]) and torch.equal(cond.concat[0], cond.concat[2])
    assert cond.context is not None and torch.equal(cond.context[0], cond.context[1])


def test_windows_see_their_part_of_the_mask(fills: Pipeline) -> None:
    wide, hole = np.concatenate([IMAGE, IMAGE[:, ::-1]], 1), np.zeros((16, 32), np.uint8)
    hole[:, 10:22] = 255
    how: dict[str, Any] = {"image": wide, "mask": hole, "size": (16, 32), "window": 16, "seed": 1}
    drawn = array(fills("x", **how))[0]
    assert (drawn[hole == 0] == wide[hole == 0]).all()
    other = array(fills("x", **{**how, "image": np.concatenate([IMAGE, 255 - IMAGE[:, ::-1]], 1)}))[0]
    inside = hole > 0
    assert (drawn[inside] != other[inside]).any()


def test_a_weaker_model_must_fill_too(fills: Pipeline, tmp_path: Path) -> None:
    fills.save_pretrained(tmp_path / "fills")
    opened, other = Pipeline.from_pretrained(tmp_path / "fills", "cpu"), make()
    other.codec = opened.codec
    other.save_pretrained(tmp_path / "plain")
    how: dict[str, Any] = {"image": IMAGE, "mask": HOLE, "guidance_scale": 1.0}
    again = Pipeline.from_pretrained(tmp_path / "plain", "cpu")
    with pytest.raises(ConfigError, match="one of the models fills masked parts of images and the other does not"):
        again(PROMPTS[:1], autoguidance=str(tmp_path / "fills"))
    same = opened(PROMPTS[:1], autoguidance=str(tmp_path / "fills"), autoguidance_scale=3.0, **how)
    assert np.abs(array(same) - array(opened(PROMPTS[:1], **how))).max() <= 1  # nothing to steer away from
