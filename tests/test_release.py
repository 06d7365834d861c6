"""`make release`: what it refuses; and its wheel, which installs, trains and draws outside the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from PIL import Image

import ldm

ROOT = Path(__file__).resolve().parent.parent
RELEASED = (
    "autoencoder",
    "ldm",
    ".ci",
    "CHANGELOG.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "pyproject.toml",
)
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
AUTHOR = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}


def run(*command: str | Path, cwd: Path, code: int = 0) -> str:
    """The output of a command in ``cwd`` that must end with ``code``; the checkout is not on its path."""
    surroundings = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "GIT_DIR")}
    done = subprocess.run(command, cwd=cwd, env=surroundings | AUTHOR, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def commit(tree: Path) -> None:
    run("git", "add", "--all", cwd=tree)
    run("git", "commit", "--quiet", "--message", "state", cwd=tree)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A clean repository of what a release is made of."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in RELEASED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    run("git", "init", "--quiet", cwd=copy)
    commit(copy)
    return copy


def test_the_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## \[(.+?)\] - (\S+)$", CHANGELOG, re.MULTILINE)
    assert versions[0][0] == ldm.__version__
    assert all(re.fullmatch(r"\d{4}-\d{2}-\d{2}|unreleased", date) for _, date in versions)


def test_modules_moved_to_where_the_changelog_says() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| `([\w.]+)` \|$", CHANGELOG, re.MULTILINE)
    assert len(rows) > 50
    for old, new in rows:
        assert not exists(old), old
        assert exists(new), new


def exists(name: str) -> bool:
    """True for a module or package of the checkout."""
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def test_a_release_needs_a_clean_tree_a_new_tag_and_a_dated_section(tree: Path) -> None:
    release = lambda: run("make", "release", f"PYTHON={sys.executable}", cwd=tree, code=2)  # noqa: E731
    (tree / "new.txt").touch()
    assert "the tree is not clean" in release()
    (tree / "new.txt").unlink()

    run("git", "tag", f"v{ldm.__version__}", cwd=tree)
    assert f"tag v{ldm.__version__} exists" in release()
    run("git", "tag", "--delete", f"v{ldm.__version__}", cwd=tree)

    undated = re.sub(
        rf"^## \[{re.escape(ldm.__version__)}\] .*$", f"## [{ldm.__version__}] - unreleased", CHANGELOG, flags=re.M
    )
    (tree / "CHANGELOG.md").write_text(undated, encoding="utf-8")
    commit(tree)
    assert "CHANGELOG.md has no dated section" in release()
    assert run("git", "tag", cwd=tree) == "" and not (tree / "dist").exists()


@pytest.mark.slow
def test_the_wheel_trains_and_draws_outside_the_checkout(tree: Path, tmp_path: Path) -> None:
    run("make", "release", f"PYTHON={sys.executable}", cwd=tree)
    assert run("git", "tag", "--points-at", "HEAD", cwd=tree) == f"v{ldm.__version__}\n"
    (wheel,), (sdist,) = (tree / "dist").glob("*.whl"), (tree / "dist").glob("*.tar.gz")
    assert {wheel.name.split("-")[1], sdist.name.removesuffix(".tar.gz").split("-")[1]} == {ldm.__version__}
    python = install(wheel, tmp_path / "venv")

    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(40):
        Image.new("RGB", (40 + i, 40), (6 * i, 100, 50)).save(photos / f"{i}.png")
    command = python.with_name("ldm")
    home = run(python, "-c", "import ldm, sys; print(ldm.__file__, ldm.__version__)", cwd=tmp_path).split()
    assert home == [str(next((tmp_path / "venv").rglob("ldm/__init__.py"))), ldm.__version__]
    assert "train-autoencoder" in run(command, "--help", cwd=tmp_path)

    run(command, "init", "photos", cwd=tmp_path)
    short = ("autoencoder.train.steps=3", "ldm.train.steps=3", "ldm.train.batch_size=4")
    run(command, "train", "configs/photos", *short, cwd=tmp_path)
    run(command, "sample", "runs/photos", "--count", "2", "--steps", "2", cwd=tmp_path)
    run(command, "report", "runs/photos", cwd=tmp_path)


def install(wheel: Path, folder: Path) -> Path:
    """A new environment with the wheel, whose requirements are those of this one; its interpreter."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=wheel.parent)
    python = folder / "bin/python"
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=wheel.parent).strip())
    requirements = [path for path in sys.path if path.endswith("-packages")] + [sysconfig.get_path("purelib")]
    (own / "requirements.pth").write_text("\n".join(dict.fromkeys(requirements)) + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--ignore-installed")
    run(*pip, wheel, cwd=wheel.parent)
    return python
