"""Tiny model folders: one written per test module, a copy for each test to change."""

import json
import shutil
from pathlib import Path

import pytest
from support.pipelines import make


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of all parts, as `ldm` writes it; not to be changed."""
    folder = tmp_path_factory.mktemp("written") / "model"
    make().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy of the model folder that the test may change."""
    return Path(shutil.copytree(written, tmp_path / "model"))


def forget_hashes(model: Path) -> Path:
    """Remove the hashes of the weights from ldm.json, as a user does who changes weights on purpose."""
    about = json.loads((model / "ldm.json").read_text(encoding="utf-8"))
    del about["sha256"]
    (model / "ldm.json").write_text(json.dumps(about), encoding="utf-8")
    return model
