"""The table of `make mutants`, which must follow the code, and its verdicts on a tree of three files."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mutants
import pytest
from mutants import Mutant

ADD = "def add(a: int, b: int) -> int:\n    return a + b\n"
TEST = """from small import add

def test_sum() -> None:
    assert add(2, 2) == 4

def test_wrong() -> None:
    assert add(1, 1) == 3
"""


def test_every_error_can_be_planted_and_its_tests_exist() -> None:
    table = mutants.table()
    assert [problem for mutant in table if (problem := mutant.wrong(mutants.ROOT))] == []
    assert len({(m.file, m.planted, m.text) for m in table}) == len(table) >= 60
    assert {m.file.rsplit("/", 1)[0].split("/samplers")[0] for m in table} >= {
        "autoencoder", "ldm/data", "ldm/diffusion", "ldm/interop", "ldm/models", "ldm/pipeline", "ldm/training",
    }  # fmt: skip


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, content in {"autoencoder/__init__.py": "", "ldm/small.py": ADD, "tests/test_small.py": TEST}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "tests/conftest.py").write_text("import sys\nsys.path.insert(0, 'ldm')\n")
    return tmp_path


SUBTRACTED = Mutant("subtracted", "ldm/small.py", "a + b", "a - b", "small::test_sum")
MULTIPLIED = replace(SUBTRACTED, error="multiplied", planted="a * b")  # 2 · 2 is 2 + 2
TRIAL = """
from pathlib import Path
import mutants
from test_mutants import MULTIPLIED, SUBTRACTED
tree, both = Path("TREE"), [SUBTRACTED, MULTIPLIED]
print(mutants.sound(both, tree), [(mutant.error, verdict) for mutant, verdict, _, _ in mutants.run(both, tree, 2)])
print(mutants.sound([mutants.Mutant("", "ldm/small.py", "a + b", "a - b", "small")], tree))
"""


def test_an_error_is_caught_or_survives_in_a_copy(tree: Path) -> None:
    """In an interpreter of its own, since a fork of this one has this project's modules."""
    environment = os.environ | {"PYTHONPATH": f"{mutants.ROOT}/tests"}
    command = [sys.executable, "-c", TRIAL.replace("TREE", str(tree))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.splitlines() == [
        "None [('subtracted', 'caught'), ('multiplied', 'SURVIVED')]",
        "without any error planted: test_small.py::test_wrong",
    ], done.stderr
    assert (tree / "ldm/small.py").read_text() == ADD


def test_what_cannot_be_planted_is_said(tree: Path) -> None:
    for change, problem in (
        ({"file": "ldm/large.py"}, "ldm/large.py is not there"),
        ({"text": "a * b"}, "'a * b' is there 0 times"),
        ({"text": "a"}, "'a' is there"),
        ({"planted": "a + b"}, "is not changed"),
        ({"tests": "small::test_sum small::test_product"}, "tests/test_small.py::test_product is not there"),
        ({"tests": "large"}, "tests/test_large.py is not there"),
    ):
        assert problem in str(mutants.sound([replace(SUBTRACTED, **change)], tree))
