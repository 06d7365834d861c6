"""Pictures that start from an image, with or without a mask, beside diffusers'; windows, and any height and width."""

import importlib
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from support.pipelines import PROMPTS, array, make, noise, pipe, written  # noqa: F401
from torch import Tensor

from ldm.cli.main import main
from ldm.config import GRIDS, ConfigError, SampleConfig
from ldm.data.transforms import to_uint8
from ldm.pipeline import Pipeline
from ldm.pipeline.checks import grid_of

IMAGE = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
HOLE = np.zeros((16, 16), np.uint8)
HOLE[4:12, 2:8] = 255  # whole cells of 2 × 2 pixels, of which one latent is made


def pixels(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1


# ---------------------------------------------------------------- strength


def test_strength_one_is_text_to_image_and_zero_is_the_autoencoder(pipe: Pipeline) -> None:
    plain = pipe(PROMPTS, seed=3)
    assert (array(pipe(PROMPTS, seed=3, image=IMAGE, strength=1)) == array(plain)).all()
    with torch.no_grad():
        mean = pipe.codec.autoencoder.encode(pixels(IMAGE)).mean
        expected = to_uint8(pipe.codec.autoencoder.decode(mean))
    for number, drawn in enumerate(pipe(PROMPTS[:2], seed=3, image=IMAGE, strength=0)):
        assert (np.asarray(drawn) == expected[0]).all(), number


@pytest.mark.parametrize("strength", [0.3, 0.62, 1.0])
@pytest.mark.parametrize("grid", GRIDS)
def test_steps_are_what_runs_and_the_grid_begins_at_the_share(pipe: Pipeline, grid: str, strength: float) -> None:
    """Of 1,000 noise levels the first ``strength · 1000`` are drawn anew, whatever the grid."""
    settings = SampleConfig(steps=7, grid=grid, strength=strength)
    nodes, last = grid_of(pipe.schedule, settings), round(strength * 1000) - 1
    first = last - (2 if grid.startswith("leading") else 1) * 1000 * strength / 7 - 1
    assert len(nodes) == 8 and first <= nodes[0] <= last
    seen: list[int] = []
    drawn = pipe("x", image=IMAGE, steps=7, grid=grid, strength=strength, sampler="ddim", callback_on_step_end=lambda
                 model, step, t, latents: seen.append(step))  # fmt: skip
    assert seen == list(range(7)) and drawn[0].size == (16, 16)


def test_less_strength_is_nearer_to_the_image(pipe: Pipeline) -> None:
    (same,) = array(pipe("x", image=IMAGE, strength=0))
    far = [np.abs(array(pipe("x", image=IMAGE, strength=s, steps=10)) - same).mean() for s in (0.05, 0.3, 0.6, 1.0)]
    assert far == sorted(far) and far[0] < far[-1] / 2
    default = pipe("x", image=IMAGE, steps=10)
    assert (array(default) == array(pipe("x", image=IMAGE, strength=0.8, steps=10))).all()


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers takes a draw of the posterior; the mean here, as ours does."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as posterior

    monkeypatch.setattr(posterior, "sample", lambda self, generator=None: self.mode())


def seeded(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Our noise in the place of theirs."""
    module = importlib.import_module(f"diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_{name}")
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: noise(7, shape[0]))


@pytest.mark.parametrize("strength", [0.2, 0.58, 1.0])
def test_image_to_image_is_diffusers(
    pipe: Pipeline, written: Path, modes: None, monkeypatch: pytest.MonkeyPatch, strength: float
) -> None:
    """By their rule: the last int(steps · strength) steps, from a noised image even at 1."""
    opened = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(written)
    opened.set_progress_bar_config(disable=True)
    seeded(monkeypatch, "img2img")
    how = {"strength": strength, "guidance_scale": 3.0, "num_inference_steps": 10}
    expected = opened(PROMPTS, image=[Image.fromarray(IMAGE)] * 4, **how).images
    ours = pipe(PROMPTS, image=IMAGE, strength_by="steps", seed=7, sampler="ddim", **how)
    assert np.abs(array(ours) - array(expected)).max() <= 1
    other = pipe(PROMPTS, image=IMAGE, seed=7, sampler="ddim", **how)
    assert np.abs(array(ours) - array(other)).max() > 1


# ---------------------------------------------------------------- inversion


def test_inversion_comes_back_the_closer_the_more_steps() -> None:
    model = make(codec=False)
    how = {"image": IMAGE, "invert": True, "source_prompt": "two red circles", "sampler": "ddim", "guidance_scale": 1.0}
    away = [np.abs(array(model("two red circles", steps=s, **how))[0] - IMAGE).mean() for s in (5, 20, 80)]
    assert away == sorted(away, reverse=True) and away[-1] < away[0] / 4, away
    other = array(model("a green square on white", steps=80, **how))[0]
    assert np.abs(other - IMAGE).mean() > 2 * away[-1]
    near = array(model("a green square on white", steps=80, strength=0.2, **how))[0]
    assert np.abs(near - IMAGE).mean() < np.abs(other - IMAGE).mean()


def test_the_command_measures_the_way_back(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(IMAGE).save("start.png")
    found = []
    for steps in ("4", "60"):
        assert main(["invert", str(written), "--image", "start.png", "--prompt", "a", "--steps", steps]) == 0
        first, back, last = capsys.readouterr().out.splitlines()
        assert first.startswith("autoencoder: ") and last == "picture: inversion.png"
        assert back.startswith(f"{steps} steps to noise and back: ")
        found.append([float(line.split()[-2]) for line in (first, back)])
    (autoencoder, few), (same, many) = found
    assert autoencoder == same and abs(many - same) < abs(few - same)
    assert main(["invert", str(written), "--image", "nowhere.png"]) == 2
    assert "image nowhere.png: no such file" in capsys.readouterr().err


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_completion_is_diffusers(
    pipe: Pipeline, written: Path, modes: None, monkeypatch: pytest.MonkeyPatch, strength: float
) -> None:
    opened = diffusers.StableDiffusionInpaintPipeline.from_pretrained(written)
    opened.set_progress_bar_config(disable=True)
    seeded(monkeypatch, "inpaint")
    how = {"strength": strength, "guidance_scale": 3.0, "num_inference_steps": 10}
    picture, hole = Image.fromarray(IMAGE), Image.fromarray(HOLE)
    expected = opened(PROMPTS, image=picture, mask_image=hole, height=16, width=16, **how).images
    by = {} if strength == 1 else {"strength_by": "steps"}
    ours = pipe(PROMPTS, image=picture, mask_image=hole, paste=False, seed=7, sampler="ddim", **by, **how)
    assert np.abs(array(ours) - array(expected)).max() <= 1


@pytest.mark.parametrize("completion", ["blend", "repaint"])
@pytest.mark.parametrize("codec", [True, False])
def test_known_pixels_are_kept(pipe: Pipeline, completion: str, codec: bool) -> None:
    model, how = pipe if codec else make(codec=False), {"steps": 8, "completion": completion}
    if completion == "repaint":
        how |= {"repaint_jump": 3, "sampler": "ddpm"}
    drawn = array(model(PROMPTS[:2], image=IMAGE, mask=HOLE, **how))
    kept = HOLE == 0
    assert (drawn[:, kept] == IMAGE[kept]).all()
    assert (drawn[:, ~kept] != IMAGE[~kept]).mean() > 0.9 and (drawn[0] != drawn[1]).any()
    loose = array(model(PROMPTS[:2], image=IMAGE, mask=HOLE, paste=False, **how))
    assert (loose[:, ~kept] == drawn[:, ~kept]).all()
    assert (loose[:, kept] == IMAGE[kept]).all() is np.bool_(not codec)  # in pixel space nothing was encoded


def test_a_thin_stroke_is_not_lost(pipe: Pipeline) -> None:
    """One pixel of a cell is enough for its latent to be drawn; the nearest pixel, which others take, misses it."""
    stroke = np.zeros((16, 16), np.uint8)
    stroke[5, 3:9] = 255
    one, other = (array(pipe("x", image=IMAGE, mask=stroke, steps=4, seed=seed))[0] for seed in (1, 2))
    assert (one[stroke > 0] != other[stroke > 0]).any(1).mean() > 0.8  # what is only decoded is the same for both


def test_each_picture_may_have_an_image_of_its_own(pipe: Pipeline) -> None:
    images, holes = [IMAGE, 255 - IMAGE, IMAGE[::-1]], [HOLE, HOLE.T.copy(), HOLE]
    together = array(pipe(PROMPTS[:3], image=images, mask=holes, batch_size=2, seed=5, steps=3))
    for i in range(3):
        (alone,) = pipe.sample(
            PROMPTS[i : i + 1], SampleConfig(seed=5, steps=3, guidance_scale=3.0), indices=[i], image=images[i],
            mask=holes[i],
        )  # fmt: skip
        (ddim,) = pipe(PROMPTS[i], image=images[i], mask=holes[i], strength=0)
        kept = holes[i] == 0
        assert (together[i][kept] == images[i][kept]).all() and (np.asarray(ddim)[kept] == images[i][kept]).all()
        assert np.abs(together[i] - to_uint8(alone)[0].astype(int)).max() <= 1


@pytest.mark.parametrize("mask", [None, HOLE])
def test_a_picture_is_drawn_beyond_its_edges(pipe: Pipeline, mask: np.ndarray | None) -> None:
    (drawn,) = array(pipe("x", image=IMAGE, mask=mask, extend=(4, 2, 8, 0), steps=3))
    kept = np.zeros((18, 28), bool)
    kept[2:, 4:20] = True if mask is None else mask == 0
    inside = IMAGE if mask is None else IMAGE[mask == 0]
    assert drawn.shape == (18, 28, 3) and (drawn[kept] == inside.reshape(-1, 3)).all()
    assert (drawn[~kept] != np.pad(IMAGE, ((2, 0), (4, 8), (0, 0)), mode="edge")[~kept]).any(1).mean() > 0.8
    one, other = (array(pipe("x", image=IMAGE, extend=(0, 0, 16, 0), completion="repaint", steps=8, repaint_jump=3,
                  sampler="ddpm", seed=seed))[0] for seed in (1, 2))  # fmt: skip
    assert (one[:, :16] == IMAGE).all() and (one != other).any()


def test_callbacks_of_repaint_have_the_time_of_their_step(pipe: Pipeline) -> None:
    times: list[float] = []
    pipe("x", image=IMAGE, mask=HOLE, steps=6, completion="repaint", repaint_jump=2, repaint_repeats=2, sampler="ddim",
         callback_on_step_end=lambda model, step, t, latents: times.append(float(t)))  # fmt: skip
    grid = grid_of(pipe.schedule, SampleConfig(steps=6)).tolist()
    nodes = [0, 1, 2, 1, 2, 3, 4, 3, 4, 5]
    assert times == [grid[n] for n in nodes]


# ---------------------------------------------------------------- sizes


def test_an_image_of_another_size_is_cut_and_it_is_said(pipe: Pipeline) -> None:
    wide = np.tile(IMAGE, (1, 2, 1))
    with pytest.warns(UserWarning, match=r"image of 16×32 pixels is resized and cut to 16×16"):
        (drawn,) = pipe("x", image=wide, mask=HOLE, steps=2)
    assert (np.asarray(drawn)[HOLE == 0] == wide[:, 8:24][HOLE == 0]).all()
    (whole,) = pipe("x", image=wide, size=(16, 32), strength=0)
    assert whole.size == (32, 16)


def test_windows_of_the_whole_picture_are_the_whole_picture(pipe: Pipeline) -> None:
    plain = array(pipe(PROMPTS[:2], size=(16, 24)))
    assert np.abs(array(pipe(PROMPTS[:2], size=(16, 24), window=24)) - plain).max() <= 1
    assert np.abs(array(pipe(PROMPTS[:2], size=(16, 24), window=16)) - plain).max() > 1


def test_opposite_edges_of_a_circular_picture_belong_together(pipe: Pipeline) -> None:
    """Shifted around by two strides, its noise draws the same picture shifted: there is no first column."""
    model = make(codec=False, text=False)
    how = {"size": (16, 40), "window": 16, "window_stride": 8, "steps": 5, "sampler": "ddim"}

    def rolled(model: Any, step: int, t: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": given["latents"].roll(16, 3)} if step == 0 else given

    for circular, equal in (("x", True), ("none", False)):
        straight, shifted = (model("", circular=circular, callback_on_step_end=end, **how) for end in (None, rolled))
        difference = np.abs(np.roll(array(straight), 16, 2) - array(shifted)).max()
        assert bool(difference <= 1) is equal, (circular, difference)


def test_strips_are_the_whole_picture(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = array(pipe(PROMPTS[:2], image=IMAGE, mask=HOLE, paste=False))
    monkeypatch.setattr(type(pipe.codec.autoencoder), "decode", None)
    monkeypatch.setattr(type(pipe.codec.autoencoder), "encode", None)
    strips = array(pipe(PROMPTS[:2], image=IMAGE, mask=HOLE, paste=False, strips=3))
    assert np.abs(strips - whole).max() <= 1
    with pytest.raises(ConfigError, match="strips is for an autoencoder, and this model draws pixels: leave it out"):
        make(codec=False)("x", strips=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": HOLE}, "mask is for an image: give image, or leave mask out"),
        ({"strength": 0.5}, "strength is for a call with image: give image, or leave strength out"),
        ({"image": IMAGE, "paste": False}, "paste is for a call with mask: give mask, or leave paste out"),
        ({"image": IMAGE, "strength": 1.2}, "strength must lie between 0.0 and 1.0, got 1.2"),
        ({"image": IMAGE, "strength": 0.003}, "strength 0.003 is 3 of 1000 noise levels, too few for 5 steps: take at"),
        ({"image": "nowhere.png"}, "image nowhere.png: no such file"),
        ({"image": 3}, "image must be a file, a picture of Pillow or an array of uint8, got 3"),
        ({"image": IMAGE / 255}, "image must be a file, a picture of Pillow or an array of uint8, got"),
        ({"image": IMAGE[..., :2]}, "image must have 3 channels, got 2"),
        ({"image": [IMAGE] * 3}, "image must be one, or one for each of the 1 pictures, got 3"),
        ({"image": IMAGE, "mask": IMAGE}, "mask must have 1 channels, got 3"),
        ({"image": IMAGE, "mask": HOLE, "completion": "repaint"}, "repaint_jump must be below the 5 steps, got 5"),
        (
            {"image": IMAGE, "mask": HOLE, "completion": "repaint", "sampler": "plms", "steps": 9},
            "completion repaint makes single steps, which plms cannot: take ddpm or ddim",
        ),
        (
            {"image": IMAGE, "mask": HOLE, "repaint_jump": 2},
            "repaint_jump is for completion repaint: give it, or leave",
        ),
        ({"image": IMAGE, "source_prompt": "a"}, "source_prompt is for invert: give it, or leave source_prompt out"),
        ({"image": IMAGE, "invert": True, "sampler": "ddpm"}, "invert is not for ddpm with eta 0, which draws noise"),
        ({"image": IMAGE, "invert": True, "mask": HOLE}, "invert is not for a mask: take sampler ddim with eta 0"),
        ({"extend": (0, 0, 8, 0)}, "extend is for a call with image: give image, or leave extend out"),
        (
            {"image": IMAGE, "extend": (0, 0, 0, 0)},
            "extend must be pixels beyond left, top, right and bottom, got [0, 0",
        ),
        ({"image": IMAGE, "extend": (0, 0, 0, 7)}, "extend must be a multiple of 2 (the autoencoder's factor), got 7"),
        ({"image": IMAGE, "extend": (0, 0, 4)}, "extend must be 4 values, got [0, 0, 4]"),
        ({"circular": "x"}, "circular is for window: give it, or leave circular out"),
        ({"window": 15}, "window must be a multiple of 2 (the autoencoder's factor), got 15"),
        ({"window": 8, "window_stride": 10}, "window_stride must be at most window 8, got 10"),
        ({"size": (16, 17)}, "size must be a positive multiple of 2 (the autoencoder's factor), got 17"),
        ({"size": (16, 16, 16)}, "size must be 2 values, got [16, 16, 16]"),
    ],
)
def test_what_is_wrong_is_named(pipe: Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        pipe("x", **arguments)
    assert str(raised.value).startswith(message), raised.value
    assert "\n" not in str(raised.value)
