"""benchmarks/conditions.py: its measures on true drawings and on wrong ones, and what each row gives the model."""

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from support.scripts import benchmark

from ldm.config import DataConfig, SampleConfig
from ldm.data.shapes import draw
from ldm.data.sources import open_source

DATA = DataConfig(source="shapes-columns", image_size=32)


@pytest.fixture(scope="module")
def conditions() -> ModuleType:
    return benchmark("conditions")


@pytest.fixture(scope="module")
def source() -> Any:
    return open_source(DATA, "held_out")


def test_true_drawings_are_read_as_they_are(conditions: ModuleType, source: Any) -> None:
    samples = [source[i] for i in range(80)]
    found = conditions.measured(np.stack([s.image for s in samples]), [s.truth for s in samples])
    assert min(found[name] for name in ("colour", "shape", "background", "striped")) > 0.95
    assert found["correlation"] > 0.999 and found["error"] < 0.002 and found["error in the gap"] < 0.002


def test_a_wrong_attribute_lowers_its_own_column_alone(conditions: ModuleType, source: Any) -> None:
    scenes = [source[i].truth for i in range(40)]
    changes: dict[str, Any] = {
        "striped": lambda o: replace(o, striped=not o.striped),
        "colour": lambda o: replace(o, colour="pink" if o.colour != "pink" else "green"),
        "radius": lambda o: replace(o, radius=o.radius + 0.02, x=15, y=15),
    }
    for name, change in changes.items():
        other = [replace(scene, objects=(change(scene.objects[0]),)) for scene in scenes]
        found = conditions.measured(np.stack([draw(scene, 32) for scene in other]), scenes)
        low = {column for column in ("colour", "shape", "background", "striped") if found[column] < 0.9}
        assert low == {name} - {"radius"}
        if name != "colour":  # no picture of another colour has a radius
            assert found["error"] == pytest.approx(0.02 if name == "radius" else 0.0, abs=0.003)


def test_each_row_gives_what_it_says(conditions: ModuleType, source: Any) -> None:
    asked: list[tuple[list[str], Any, SampleConfig]] = []

    class Stub:
        defaults = SampleConfig(guidance_scale=2.0)

        def sample(self, captions: list[str], settings: SampleConfig, values: Any, batch_size: int) -> Any:
            asked.append((captions, values, settings))
            return [torch.zeros(len(captions), 3, 32, 32)]

    for settings, without in conditions.ROWS.values():
        assert conditions.drawn(Stub(), source, 3, settings, without).shape == (3, 32, 32, 3)
    by_row = dict(zip(conditions.ROWS, asked, strict=True))
    whole = {name: source.columns(0)[name] for name in ("radius", "striped")}
    assert by_row["all three"][0][0] == source.text(0) and by_row["all three"][1][0] == whole
    assert by_row["without caption"][0] == [""] * 3 and by_row["without caption"][1][0] == whole
    assert by_row["without radius"][1][0] == {"striped": whole["striped"]}
    assert by_row["all three"][2].guidance_scale == 1.0 and by_row["all three, guidance 2"][2].guidance_scale == 2.0
    assert by_row["striped guided alone"][2].alone() == {"striped": 3.0}
