"""Folders of small images, and the sources that read them."""

from pathlib import Path
from typing import Any

from PIL import Image

from ldm.config import DataConfig
from ldm.data.folder import FolderSource
from ldm.data.sources import open_source


def paint(folder: Path, *names: str) -> None:
    """Write a PNG of 8×8 pixels, (i, 0, 0), under the i-th name, whatever its suffix."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / name, format="PNG")


def open_folder(folder: Path, split: str = "train", **settings: Any) -> FolderSource:
    """The source of a folder, with settings of DataConfig."""
    source = open_source(DataConfig(folder=str(folder), **settings), split)
    assert isinstance(source, FolderSource)
    return source
