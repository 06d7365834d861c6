"""Training to fill masked parts: masks by position, the channels of a step, fine-tuning from a text model, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support.cut_runs import assert_same_end, at_position, power_cut
from support.interrupts import PowerCut
from support.stages import DIFFUSION, TRAIN, Stages

from ldm import config
from ldm.cli.main import main
from ldm.config import DiffusionTrainingConfig, InpaintConfig
from ldm.data import rng
from ldm.data.dataset import collate
from ldm.data.masks import draw_mask
from ldm.diffusion.condition import Condition
from ldm.pipeline import Pipeline
from ldm.training.stages.diffusion import DiffusionTask


@pytest.fixture(scope="module")
def runs(stages: Stages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`fresh`, and `tuned` from a model of captions, without learning, so that it is as that model was."""
    here = tmp_path_factory.mktemp("inpaint")
    for name, changes in (("fresh", {}), ("tuned", {"init": f"{stages.folder}/ldm"})):
        file = here / f"{name}.yaml"
        file.write_text(yaml.safe_dump(tree(stages, here / name, **changes)))
        assert main(["train-ldm", str(file)]) == 0
    return here


def tree(stages: Stages, run: Path, **changes: Any) -> dict[str, Any]:
    parts = {"autoencoder": f"{stages.folder}/autoencoder", "text": f"{stages.folder}/clip"}
    return {**DIFFUSION, **parts, "run": str(run), "inpaint": {"everything": 0.3}, "train": {**TRAIN}, **changes}


def task(stages: Stages, folder: Path, **changes: Any) -> DiffusionTask:
    file = folder / "task.yaml"
    file.write_text(yaml.safe_dump(tree(stages, folder / "task", **changes)))
    made = DiffusionTask.from_config(config.load(DiffusionTrainingConfig, file), lambda text: None)
    made.to(torch.device("cpu"))
    return made


def out(pipe: Pipeline, cond: Condition) -> torch.Tensor:
    x = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return pipe.unet(x, torch.tensor([600]), cond)


@pytest.mark.parametrize("cached", [True, False])
def test_a_step_is_given_the_mask_and_the_rest_of_its_image(stages: Stages, tmp_path: Path, cached: bool) -> None:
    """Images are mirrored with their latents; masks are a function of seed and position."""
    made = task(stages, tmp_path, cache_latents=cached)
    batch = collate([made.stream[position] for position in range(12)])
    assert ("moments" in batch) == cached
    concat = made._noising(batch).cond.concat
    assert concat is not None and made.codec is not None
    settings, seed = InpaintConfig(everything=0.3), made.config.train.seed
    for p in range(12):
        mask = draw_mask(rng.generator(seed, "mask", p), 32, settings)
        assert np.array_equal(batch["mask"][p, 0], mask)
        blocks = mask.reshape(8, 4, 8, 4).max((1, 3))
        assert np.array_equal(concat[p, 0], blocks)
        with torch.no_grad():
            rest = made.codec.autoencoder.encode(batch["image"][p : p + 1] * (1 - torch.from_numpy(mask))).mean
        torch.testing.assert_close(concat[p, 1:], made.codec.scale * (rest[0] - made.codec.shift), atol=1e-5, rtol=1e-4)
    if cached:  # the image beside the moments is the image that they are of
        with torch.no_grad():
            mean = made.codec.autoencoder.encode(batch["image"]).mean
        torch.testing.assert_close(batch["moments"].chunk(2, 1)[0], mean, atol=2e-2, rtol=1e-2)
    assert not np.array_equal(made.validation[0]["mask"], made.stream[0]["mask"])


def test_a_text_model_with_new_channels_is_that_model_at_first(stages: Stages, tmp_path: Path) -> None:
    """Bit for bit, whatever the new channels hold."""
    made = task(stages, tmp_path, init=f"{stages.folder}/ldm")
    made.initialize()
    before = Pipeline.from_pretrained(stages.folder / "ldm", "cpu")
    x, context = (
        torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((2, 4, 8, 8), (2, 5, 16))
    )
    t, concat = torch.tensor([10, 900]), torch.randn(2, 5, 8, 8)
    with torch.no_grad():
        expected = before.unet(x, t, Condition(context=context))
        assert torch.equal(made.trained.unet(x, t, Condition(context=context, concat=concat)), expected)


def test_new_channels_are_learned(runs: Path) -> None:
    pipe = Pipeline.from_pretrained(runs / "tuned", "cpu")
    weight = pipe.unet.conv_in.weight
    assert weight.shape[1] == 9 and bool((weight[:, 4:].abs().amax((0, 2, 3)) > 0).all())
    context = torch.randn((1, 5, 16), generator=torch.Generator().manual_seed(1))
    a, b = (out(pipe, Condition(context=context, concat=torch.full((1, 5, 8, 8), value))) for value in (0.0, 1.0))
    assert not torch.equal(a, b)


def test_the_folder_is_one_of_stable_diffusions_inpainting(runs: Path) -> None:
    index = yaml.safe_load((runs / "fresh/model/model_index.json").read_text())
    unet = yaml.safe_load((runs / "fresh/model/unet/config.json").read_text())
    assert index["_class_name"] == "StableDiffusionInpaintPipeline" and unet["in_channels"] == 9


def test_a_cut_run_ends_as_the_whole_one(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["train-ldm", str(runs / "fresh.yaml"), f"run={tmp_path / 'cut'}"]
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        at_position(patch, lambda p: p == 14, power_cut)
        main(arguments)
    assert main(arguments) == 0
    assert_same_end(runs / "fresh", tmp_path / "cut")


def test_previews_show_what_is_filled(stages: Stages, tmp_path: Path) -> None:
    """Known pixels are those of the images, gray is what is to be filled, and below it is filled."""
    made = task(stages, tmp_path)
    picture = made.previews()["filled"]
    sample = made.validation[0]
    image, mask = (sample[name].numpy().transpose(1, 2, 0) for name in ("image", "mask"))
    side = 32
    above, below = (picture[top : top + side, :side] for top in (0, picture.shape[0] - side))
    levels = (image * 127.5 + 127.5).round()
    known = mask[..., 0] == 0
    assert (above[known] == levels[known]).all() and (abs(above[~known].astype(int) - 127.5) <= 0.5).all()
    assert (below[known] == levels[known]).all()
    if (~known).any():
        assert (below[~known] != above[~known]).any()


def test_with_conditions_without_text_in_pixels(tmp_path: Path) -> None:
    settings = {**DIFFUSION, "run": str(tmp_path / "run"), "autoencoder": "none", "text": "none", "inpaint": {}}
    settings |= {"conditions": [{"name": "colour", "kind": "class"}], "train": {**TRAIN, "steps": 2, "sample_every": 2}}
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(settings))
    assert main(["train-ldm", str(file)]) == 0
    pipe = Pipeline.from_pretrained(tmp_path / "run", "cpu")
    hole = np.zeros((32, 32), np.uint8)
    hole[8:20, 8:20] = 255
    image = np.full((32, 32, 3), 200, np.uint8)
    (drawn,) = pipe(values={"colour": "red"}, image=image, mask=hole, steps=2)
    assert (np.asarray(drawn)[hole == 0] == 200).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inpaint": {"masks": ["dots"]}}, "inpaint.masks must be some of strokes, boxes, sides, got dots"),
        ({"inpaint": {"everything": 2}}, "inpaint.everything must lie between 0.0 and 1.0"),
        (
            {"unet": {"concat_channels": 5}},
            "unet.concat_channels is set where conditions or inpaint need it: leave it out",
        ),
        ({"lora": True}, "unet.concat_channels: 0 in init"),
        ({"narrower": True}, "unet.concat_channels: 5 in init"),
    ],
)
def test_what_does_not_fit(
    stages: Stages, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: Any, message: str
) -> None:
    if changes.pop("lora", False):
        changes = {"init": f"{stages.folder}/ldm", "train": {**TRAIN, "lora": {"rank": 2}}}
    if changes.pop("narrower", False):
        changes = {"init": str(runs / "fresh"), "inpaint": None}
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(tree(stages, tmp_path / "a", **changes)))
    assert main(["train-ldm", str(file)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
