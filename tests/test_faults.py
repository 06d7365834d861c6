"""docs/faults.md: every fault has its row, every row all its cells, and the tests it names exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = {
    *(str(n) for n in (*range(1, 11), 12, 13, 15, 22, 26, 27, 29, 30, 31, 32, 35, 36, 40, 42, 43)),
    *(f"P{n}" for n in range(1, 18)),
    *(f"M{n}" for n in range(1, 7)),
    *(f"L{n}" for n in range(1, 6)),
}
ROWS = [
    [cell.strip() for cell in line.strip().strip("|").split(" | ")]
    for line in (ROOT / "docs/faults.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| [A-Z]?\d+ \|", line)
]


def test_every_fault_has_a_row() -> None:
    assert {row[0] for row in ROWS} == NUMBERS


@pytest.mark.parametrize("row", ROWS, ids=[f"{row[0]}-{i}" for i, row in enumerate(ROWS)])
def test_a_row_is_complete_and_its_tests_exist(row: list[str]) -> None:
    assert len(row) == 5 and all(row), row
    assert "TODO" not in " ".join(row), row
    number, _, _, code, tests = row
    assert re.match(r"\d", code), f"{number}: no exit code"
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
    assert named and re.fullmatch(r"(`tests/[\w/]+\.py::\w+` ?)+", tests), f"{number} names no test"
    for file, test in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (
            f"{number}: no {test} in {file}"
        )
