"""What is left out of a folder: the list beside the run, the limit, and what processes tell each other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ldm.config import DataConfig
from ldm.data.dataset import RandomFields, Stream
from ldm.data.sample import Sample, Skipped
from ldm.distributed.processes import ALONE, Processes
from ldm.errors import DataError
from ldm.runs.directory import RunDirectory
from ldm.training.skipped import SkipLog


class Folder:
    """Ten images, some left out when it was opened."""

    length: int | None = 10
    fingerprint = ""

    def __init__(self, *skipped: str) -> None:
        self.skipped = tuple(Skipped(file, "no such file") for file in skipped)

    def __getitem__(self, index: int) -> Sample:
        return Sample(np.zeros((8, 8, 3), np.uint8), "")

    def text(self, index: int) -> str:
        return f"number {index}"

    def columns(self, index: int) -> dict[str, int]:
        return {}

    def captions(self, limit: int) -> list[str] | None:
        return None


def streams(max_skipped: float = 1.0, *skipped: str) -> tuple[Stream, Stream]:
    data = DataConfig(folder="photos", image_size=8, max_skipped=max_skipped)
    return Stream(Folder(*skipped), data, 0, RandomFields({})), Stream(
        Folder(*skipped), data, 0, RandomFields({}), validation=True
    )


def listed(run: RunDirectory) -> list[str]:
    return [json.loads(line)["file"] for line in (run.path / "skipped.jsonl").read_text().splitlines()]


def test_each_is_told_and_listed_once(tmp_path: Path) -> None:
    train, validation = streams(1.0, "a.png")
    said: list[str] = []
    with RunDirectory(tmp_path) as run:
        log = SkipLog((train, validation), run, said.append, ALONE)
        assert log.total == 21
        log.update()
        log.update()
        assert said == ["left out a.png: no such file", f"1 of 21 left out so far (all in {tmp_path}/skipped.jsonl)"]
        for name in ("b", "c", "d", "e"):
            train.skipped[Skipped(name, "damaged")] = None
        validation.skipped[Skipped("b", "damaged")] = None
        log.update()
        assert said[2:] == [
            *(f"left out {n}: damaged" for n in "bcd"),
            f"and 1 more, 5 of 21 left out so far (all in {tmp_path}/skipped.jsonl)",
        ]
        assert listed(run) == ["a.png", "b", "c", "d", "e"]
        with (tmp_path / "skipped.jsonl").open("a") as stream:
            stream.write('{"file": "torn')
        train.skipped[Skipped("f", "damaged")] = None
        SkipLog((train, validation), run, said.append, ALONE).update()  # after a restart
        assert listed(run) == ["a.png", "b", "c", "d", "e", "f"]


def test_all_processes_stop_past_the_limit() -> None:
    four, one = (SkipLog(streams(0.2), None, lambda text: None, ALONE) for _ in range(2))
    shares = [[Skipped(str(i), "damaged") for i in range(4)], [Skipped("x", "damaged")]]
    together = Processes(0, 2, lambda mine: shares)  # what the two give
    for log in (four, one):
        log.processes = together
        with pytest.raises(
            DataError,
            match=r"photos: 5 of 20 cannot be used, more than data.max_skipped 0.2 allows, such as 0: damaged",
        ):
            log.update()
    enough = SkipLog(streams(0.2), None, lambda text: None, Processes(0, 1, lambda mine: shares[:1]))
    enough.update()  # 4 of 20 are a fifth, and allowed


def test_a_source_without_end_skips_nothing() -> None:
    train, validation = streams()
    train.source.length = None  # type: ignore[misc]
    log = SkipLog((train, validation), None, lambda text: None, ALONE)
    assert log.total is None
    log.update()
