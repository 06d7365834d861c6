"""Readers of a run's records: metrics, status, starts, skipped samples, grids. Imports no torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from ldm.errors import RunError
from ldm.files.disk import read_bytes
from ldm.files.text import lines

METRICS, STARTS = "metrics.jsonl", "starts.jsonl"
DEPTH = 32  # largest depth of JSON that a run writes
Points = list[tuple[int, float]]  # (update, value); NaN for a value that was not finite


def parse_line(line: str) -> dict[str, Any] | None:
    """Parse a line of metrics.jsonl; None if it is truncated."""
    try:
        parsed = parse(line)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) and is_count(parsed.get("step")) else None


def parse(text: str) -> Any:
    """Parse JSON.

    Raises ValueError if it is invalid, or nested more deeply than a run writes it.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(value, DEPTH)
    return value


def _check_depth(value: Any, left: int) -> None:
    if left < 0:
        raise ValueError("it is nested too deeply")
    for inside in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(inside, left - 1)


def is_count(value: Any) -> bool:
    """True for an integer that may count updates or bytes."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a run's ``metrics.jsonl``, in order; empty if there is none. Raises RunError."""
    return _parsed_lines(path / METRICS)


def read_status(path: Path, checked: bool = True) -> dict[str, Any] | None:
    """A run's ``status.json``, None if there is none; ``checked``: its types, too.

    Raises RunError.
    """
    file = path / "status.json"
    if not file.exists():
        return None
    try:
        status = parse(read_bytes(file).decode())
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read ({type(error).__name__}): delete it to continue") from None
    if not isinstance(status, dict):
        raise RunError(f"{file} should hold one JSON object: delete it to continue")
    for name, (right, what) in STATUS.items() if checked else ():
        if name in status and not right(status[name]):
            got = json.dumps(status[name])[:40]
            raise RunError(f"{file}: {name} should be {what}, got {got}: delete it to continue")
    return status


def is_seconds(value: Any) -> TypeGuard[float]:
    """True for a number of seconds, neither negative nor infinite."""
    return _is_number(value) and 0 <= value < 1e12  # and so neither infinite nor NaN


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


STATUS = {  # entries of status.json: their check, and its name
    "state": (_is_text, "text"),
    "step": (is_count, "a whole number"),
    "steps": (is_count, "a whole number"),
    "seconds": (is_seconds, "a number of seconds"),
    "code": (lambda value: is_count(value) and value < 256, "an exit code"),
    "reason": (_is_text, "text"),
    "waited": (is_count, "a whole number"),
}


def read_starts(path: Path) -> list[dict[str, Any]]:
    """Lines of a run's ``starts.jsonl``, one per start, in order; empty if there is none.

    Raises RunError.
    """
    return _parsed_lines(path / STARTS)


def _parsed_lines(file: Path) -> list[dict[str, Any]]:
    """Lines that are complete, which have a step. Bytes that are not UTF-8 become U+FFFD."""
    return [parsed for line in _lines(file) if (parsed := parse_line(line)) is not None]


def _lines(file: Path) -> list[str]:
    try:
        return lines(read_bytes(file).decode(errors="replace")) if file.exists() else []
    except OSError as error:
        raise RunError(f"{file} cannot be read: {error.strerror}") from None


def newest_checkpoint(path: Path) -> tuple[int, Path] | None:
    """Update and folder of a run's newest checkpoint, unverified; None without one."""
    whole = (folder for folder in path.glob("checkpoints/step-*") if (folder / "manifest.json").is_file())
    found = ((re.fullmatch(r"step-(\d{8,})", folder.name), folder) for folder in whole)
    return max(((int(name[1]), folder) for name, folder in found if name is not None), default=None)


def read_skipped(path: Path) -> tuple[list[tuple[str, str]], int]:
    """(file, reason) of each line of ``skipped.jsonl``, and the number of unreadable lines."""
    rows, unreadable = [], 0
    for line in _lines(path / "skipped.jsonl"):
        try:
            parsed = parse(line)
            rows.append((str(parsed["file"]), str(parsed["reason"])))
        except (ValueError, TypeError, KeyError):
            unreadable += bool(line.strip())
    return rows, unreadable


def grids(path: Path) -> dict[str, list[tuple[int, Path]]]:
    """Images ``samples/NAME-STEP.png`` of a run: (update, file) by name, in order of updates."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for file in sorted((path / "samples").glob("*.png")):
        if match := re.fullmatch(r"(.+)-(\d+)", file.stem):
            found.setdefault(match[1], []).append((int(match[2]), file))
    return {name: sorted(files) for name, files in found.items()}


def scalar_series(logged: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """Each scalar metric over updates, in order of first appearance; null becomes NaN."""
    series: dict[str, Points] = {}
    for line in logged:
        for name, value in line.items():
            if name != "step" and (value is None or _is_number(value)):
                series.setdefault(name, []).append((line["step"], _number(value)))
    return series


def list_series(logged: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, list[float]]]]:
    """Each metric that is a list of numbers, over updates; null becomes NaN."""
    series: dict[str, list[tuple[int, list[float]]]] = {}
    for line in logged:
        for name, value in line.items():
            if isinstance(value, list) and all(v is None or _is_number(v) for v in value):
                series.setdefault(name, []).append((line["step"], [_number(v) for v in value]))
    return series


def report_metrics(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    """Metrics of a ``report.json`` by dotted name; an accuracy with its interval stays a dict."""
    if not isinstance(tree, Mapping) or "accuracy" in tree:
        return [(path, tree)]
    found = (report_metrics(value, f"{path}.{key}" if path else str(key)) for key, value in tree.items())
    return [row for rows in found for row in rows]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Entries of nested mappings under their dotted names."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: Any) -> float:
    return float(value) if value is not None and abs(value) < 1e300 else math.nan  # an integer may exceed any float
