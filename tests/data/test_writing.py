"""A new folder of captioned images: written whole or not at all, and read back as it was given."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.photos import open_folder

from ldm.data.writing import write_folder
from ldm.errors import DataError

Rows = Iterator[tuple[Image.Image, dict[str, Any]]]


def drawn(n: int, fail_at: int | None = None) -> Rows:
    for i in range(n):
        if i == fail_at:
            raise KeyboardInterrupt
        yield Image.new("RGB", (8, 8), (i, 0, 9)), {"file_name": f"{i}.png", "text": f"Bild “{i}”", "number": i}


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    assert write_folder(tmp_path / "a/new", drawn(40)) == 40
    source = open_folder(tmp_path / "a/new", "train", image_size=8)
    assert 30 < len(source.rows) < 40 and not source.skipped
    for i in range(len(source.rows)):
        sample = source[i]
        assert sample.text == f"Bild “{sample.truth['number']}”"
        assert np.all(sample.image == (sample.truth["number"], 0, 9))


def test_a_folder_that_is_not_finished_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "new", drawn(3, fail_at=2))
    with pytest.raises(DataError, match="new: there is no image to write"):
        write_folder(tmp_path / "new", drawn(0))
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("kept", encoding="utf-8")
    assert write_folder(tmp_path / "empty", drawn(2)) == 2
    for name in ("empty", "file"):
        with pytest.raises(DataError, match=f"{name} exists: name a new folder"):
            write_folder(tmp_path / name, drawn(3))
    assert (tmp_path / "file").read_text(encoding="utf-8") == "kept" and not (tmp_path / "empty/2.png").exists()
