"""benchmarks/editing.py: its scenes, holes and measures against counts by hand, and both tables on a stub."""

from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.scripts import benchmark

from ldm.config import DataConfig, SampleConfig
from ldm.data.shapes import parse
from ldm.data.sources import open_source
from ldm.evaluation.evaluate import JUDGES

DATA = DataConfig(source="shapes", image_size=32)


@pytest.fixture(scope="module")
def editing() -> ModuleType:
    return benchmark("editing")


def test_a_caption_starts_from_another_scene_of_its_background(editing: ModuleType) -> None:
    task = editing.tasks(open_source(DATA, "held_out"), open_source(DATA, "validation"), 20)
    assert len(task.captions) == len(task.images) == len(task.scenes) == len(task.holes) == 20
    for caption, image, scene, hole in zip(*task, strict=True):
        a, b = parse(caption), parse(scene)
        assert a.background == b.background and a.objects != b.objects
        assert a.objects[0].size == b.objects[0].size == "small"
        outside = image[hole == 0].reshape(-1, 3)
        assert (outside == image[0, 0]).all() and (image[hole > 0] != image[0, 0]).any()  # it covers the object


def test_steps_at_the_edge_are_counted_by_hand(editing: ModuleType) -> None:
    image, hole = np.zeros((1, 3, 4, 3), np.uint8), np.zeros((3, 4), np.uint8)
    hole[1, 1:3] = 255
    image[0, 1, 1], image[0, 1, 2] = 60, 30  # neighbours outside: left, above and below; right, above and below
    assert editing.seam(image, [hole]) == pytest.approx((3 * 60 + 3 * 30) / 6)


def test_network_calls(editing: ModuleType) -> None:
    assert editing.calls({}, 10) == 10 and editing.calls({"steps": 50}, 10) == 50
    assert editing.calls({"completion": "repaint", "steps": 25}, 10) == 105


def test_tables_of_a_model_that_returns_the_image(editing: ModuleType) -> None:
    """It shows the scene, never the caption, and has no edge; halfway to white it has one."""
    task = editing.tasks(open_source(DATA, "held_out"), open_source(DATA, "validation"), 6)

    def sample(captions: list[str], settings: SampleConfig, **given: Any) -> Any:
        assert captions == task.captions and given["image"] is task.images
        images = np.stack(given["image"]).astype(float)
        if "mask" in given and settings.completion == "repaint":
            images[np.stack(given["mask"]) > 0] = 255
        yield torch.from_numpy(images / 127.5 - 1).permute(0, 3, 1, 2)

    pipe = SimpleNamespace(sample=sample, defaults=SampleConfig(steps=10))
    judge = JUDGES["shapes"](32)
    rows = editing.image_to_image(pipe, judge, task, (0.5,)).splitlines()
    assert rows[-1] == "| 0.5 | 0.000 | 1.000 | 0.0 |"
    ways = {"kept": {}, "white": {"completion": "repaint", "steps": 6}}
    *_, scenes, kept, white = editing.completion(pipe, judge, task, ways).splitlines()
    assert scenes == "| the scenes | | | 0.00 |" and kept == "| kept | 10 | 0.000 | 0.00 |"
    assert float(white.split("|")[-2]) > 20
