"""Differences between two runs, from their records. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.config import load_run, to_dict
from ldm.files.disk import read_bytes
from ldm.runs.records import (
    flat,
    newest_checkpoint,
    parse,
    read_metrics,
    read_skipped,
    read_starts,
    read_status,
    report_metrics,
)

NOTHING = "–"  # shown for a value that a run lacks
TIMES = ("seconds", "updates_per_second")  # suffixes of names; equal runs differ in them
CODE = ("ldm", "commit", "dirty", "python", "torch", "accelerate", "device", "processor", "threads", "processes")
Row = tuple[str, str, str]  # name, value in the first run, value in the second


def run_differences(a: Path, b: Path) -> dict[str, list[Row] | None]:
    """Differing rows by subject; None for a subject that neither run has.

    ``run``, the folder's own name, and times are not compared. Raises ConfigError or RunError for a
    folder that is not a run, or damaged.
    """
    subjects = {
        "configuration": _configuration,
        "data": _data,
        "code": _code,
        "results": _results,
        "report": _report,
        "status": _status,
    }
    found = {name: compare(read(a), read(b)) for name, read in subjects.items()}
    reports = ["there" if (path / "report.json").is_file() else NOTHING for path in (a, b)]
    if found["report"] is not None and NOTHING in reports:
        found["report"] = [
            ("report.json", reports[0], reports[1])
        ]  # one report has nothing to compare its metrics with
    return found


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Row] | None:
    """Differing entries, in order of appearance; None if both are empty."""
    if not a and not b:
        return None
    return [(name, *_shown(a, b, name)) for name in {**a, **b} if name not in a or name not in b or a[name] != b[name]]


def _shown(a: Mapping[str, Any], b: Mapping[str, Any], name: str) -> tuple[str, str]:
    """Both values as text, with enough digits to show the difference."""
    short = tuple(_text(values[name], 6) if name in values else NOTHING for values in (a, b))
    full = tuple(_text(values[name], 17) if name in values else NOTHING for values in (a, b))
    return (short[0], short[1]) if short[0] != short[1] else (full[0], full[1])


def _text(value: Any, digits: int) -> str:
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if isinstance(value, list):
        return f"[{', '.join(_text(item, digits) for item in value)}]"
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _configuration(path: Path) -> dict[str, Any]:
    tree = to_dict(load_run(path))
    tree.pop("run")
    return flat(tree)


def _data(path: Path) -> dict[str, Any]:
    """Counts and fingerprints of the data, from the newest checkpoint."""
    newest = newest_checkpoint(path)
    try:
        state = parse(read_bytes(newest[1] / "state.json").decode()) if newest is not None else {}
        data = state.get("data", {})
        data = flat(data) if isinstance(data, dict) else {}
    except (OSError, ValueError, AttributeError):  # damaged: `ldm checkpoints` shows how
        data = {}
    left_out = len(read_skipped(path)[0])
    return {**data, "left out": left_out} if data or left_out else {}


def _code(path: Path) -> dict[str, Any]:
    """Code and machine of the newest start."""
    starts = read_starts(path)
    return {name: starts[-1][name] for name in CODE if name in starts[-1]} if starts else {}  # older starts lack some


def _results(path: Path) -> dict[str, Any]:
    """Last logged value of each metric."""
    last: dict[str, Any] = {}
    for line in read_metrics(path):
        last |= line
    return {"update" if name == "step" else name: value for name, value in _timeless(last).items()}


def _report(path: Path) -> dict[str, Any]:
    """Metrics of the evaluation's report."""
    try:
        report = parse(read_bytes(path / "report.json").decode())
    except (OSError, ValueError):
        return {}
    rows = {name: value["accuracy"] if isinstance(value, dict) else value for name, value in report_metrics(report)}
    return _timeless(rows)


def _status(path: Path) -> dict[str, Any]:
    return _timeless(read_status(path, checked=False) or {})


def _timeless(rows: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in rows.items() if not any(part.endswith(TIMES) for part in name.split("."))}
