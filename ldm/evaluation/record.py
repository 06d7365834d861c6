"""What a run has written about itself, read back: metrics.jsonl, status.json, starts.jsonl, skipped.jsonl, the grids. Imports no torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STARTS = "starts.jsonl"
Points = list[tuple[int, float]]  # (update, value); NaN where the value was not finite


class RunError(RuntimeError):
    """A run directory is in use, damaged, or belongs to another configuration; the message names it."""

    exit_code = 2


def parse_line(line: str) -> dict[str, Any] | None:
    """One line of metrics.jsonl; None for one that is torn."""
    try:
        parsed = json.loads(line)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) and isinstance(parsed.get("step"), int) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl`` in order; empty where there is none."""
    file = path / "metrics.jsonl"
    if not file.exists():
        return []
    return [parsed for line in file.read_text().splitlines() if (parsed := parse_line(line)) is not None]


def read_status(path: Path) -> dict[str, Any] | None:
    """A run's ``status.json``, or None where there is none. Raises RunError."""
    file = path / "status.json"
    if not file.exists():
        return None
    try:
        status = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read ({type(error).__name__}): delete it to continue") from None
    if not isinstance(status, dict):
        raise RunError(f"{file} should hold one JSON object: delete it to continue")
    return status


def read_starts(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``starts.jsonl`` in order, one for each start of its training; empty where there is none."""
    file = path / STARTS
    if not file.exists():
        return []
    return [parsed for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if (parsed := parse_line(line)) is not None]


def newest_checkpoint(path: Path) -> tuple[int, Path] | None:
    """The update and folder of a run's newest complete checkpoint, by its number: its hashes are not looked at. None without one."""
    whole = (folder for folder in path.glob("checkpoints/step-*") if (folder / "manifest.json").is_file())
    found = ((re.fullmatch(r"step-(\d{8,})", folder.name), folder) for folder in whole)
    return max(((int(name[1]), folder) for name, folder in found if name is not None), default=None)


def read_skipped(path: Path) -> tuple[list[tuple[str, str]], int]:
    """(file, reason) of each line of a run's ``skipped.jsonl``, and the number of lines that are no such object."""
    file, rows, unreadable = path / "skipped.jsonl", [], 0
    if not file.exists():
        return [], 0
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            parsed = json.loads(line)
            rows.append((str(parsed["file"]), str(parsed["reason"])))
        except (ValueError, TypeError, KeyError, RecursionError):
            unreadable += bool(line.strip())
    return rows, unreadable


def grids(path: Path) -> dict[str, list[tuple[int, Path]]]:
    """The pictures ``samples/NAME-STEP.png`` of a run: for each name (update, file) in order of updates."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for file in sorted((path / "samples").glob("*.png")):
        if match := re.fullmatch(r"(.+)-(\d+)", file.stem):
            found.setdefault(match[1], []).append((int(match[2]), file))
    return {name: sorted(files) for name, files in found.items()}


def scalar_series(lines: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """Each figure of ``metrics.jsonl`` that is a number, over updates; null becomes NaN. In order of first appearance."""
    series: dict[str, Points] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and (value is None or _is_number(value)):
                series.setdefault(name, []).append((line["step"], _number(value)))
    return series


def list_series(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, list[float]]]]:
    """Each figure that is a list of numbers, over updates; null becomes NaN."""
    series: dict[str, list[tuple[int, list[float]]]] = {}
    for line in lines:
        for name, value in line.items():
            if isinstance(value, list) and all(v is None or _is_number(v) for v in value):
                series.setdefault(name, []).append((line["step"], [_number(v) for v in value]))
    return series


def figures(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    """Every figure of a ``report.json`` under its dotted name; a share with its interval stays one dict."""
    if isinstance(tree, Mapping) and "accuracy" not in tree:
        return [row for key, value in tree.items() for row in figures(value, f"{path}.{key}" if path else str(key))]
    return [(path, tree)]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every entry of nested mappings under its dotted name."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: Any) -> float:
    return float(value) if value is not None and math.isfinite(value) else math.nan
