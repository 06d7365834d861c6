"""docs/equations.md: every formula has its row, and what a row names exists."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = {"B": 1, "F": 7, "P": 5, "T": 1, "L": 13, "S": 6, "G": 4}
ELSEWHERE = {  # formulas of other rooms than the mathematics'
    **dict.fromkeys(("L8", "L12"), ("autoencoder.",)),
    "C3": ("ldm.pipeline.", "ldm.data.", "ldm.training."),
    **dict.fromkeys(("F6", "S5"), ("ldm.evaluation.samplers.",)),  # the mixture whose exact denoiser is known
}
ROWS = [
    tuple(cell.strip() for cell in line.strip().strip("|").split(" | "))
    for line in (ROOT / "docs/equations.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| [A-Z]\d+ \|", line)
]


def test_every_formula_has_a_row() -> None:
    wanted = {f"{letter}{i}" for letter, last in NUMBERS.items() for i in range(1, last + 1)}
    assert {row[0] for row in ROWS} == wanted | {"C1", "C3", "C5", "C7"}  # C2, C4 and C6 have no code yet
    assert all(len(row) == 4 for row in ROWS), [row for row in ROWS if len(row) != 4]


@pytest.mark.parametrize("row", ROWS, ids=[f"{row[0]}-{i}" for i, row in enumerate(ROWS)])
def test_what_a_row_names_exists(row: tuple[str, ...]) -> None:
    identifier, formula, functions, tests = row
    assert formula
    names = re.findall(r"`([\w.]+)`", functions)
    assert names, f"{identifier} names no function"
    for name in names:
        found = _resolve(name)
        assert found.__doc__, f"{name} has no docstring"
        rooms = ("ldm.diffusion.", *ELSEWHERE.get(identifier, ()))
        assert name.startswith(rooms), f"{identifier}: {name} is in none of {rooms}"
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
    assert named, f"{identifier} names no test"
    for file, test in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (
            f"{identifier}: no {test} in {file}"
        )


def _resolve(name: str) -> object:
    """The object of a dotted name: the longest prefix that is a module, then attributes."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"no module of {name}")
