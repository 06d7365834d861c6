"""Tables of a report: latest metrics, results of `ldm evaluate`, throughput, skipped files."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.evaluation.report.html import Html, element, join, table
from ldm.files.disk import read_bytes
from ldm.runs import records

ROWS = 200  # skipped files listed by name
REASONS = 20  # reasons listed with their counts


def newest(lines: Sequence[Mapping[str, Any]]) -> Html:
    """Latest value of each metric in metrics.jsonl, and its update."""
    last = {name: (value, line["step"]) for line in lines for name, value in line.items() if name != "step"}
    if not last:
        return element("p", "No metrics yet.")
    rows = [(name, number(value), step) for name, (value, step) in last.items()]
    return join([element("h3", "Latest value of each metric"), table(("metric", "value", "update"), rows)])


def evaluation(file: Path) -> Html:
    """Results in a report.json, shares with their intervals; a message if it cannot be read."""
    try:
        found = records.parse(read_bytes(file).decode())
        whole = found if isinstance(found, dict) else {}
        apart = {name: whole.pop(name) for name in ("confusion", "refusals") if isinstance(whole.get(name), dict)}
        rows = [_judged(name, value) for name, value in records.report_metrics(found)]
    except (OSError, ValueError) as error:
        return element("p", f"{file}: cannot be read: {error}", class_="bad")
    content = [element("h3", "Evaluation (report.json)"), table(("metric", "value", "95 % interval", "n"), rows)]
    for split, counts in apart.get("confusion", {}).items():
        content += [element("h3", f"Asked for (rows) and read as (columns): {split}"), _confusion(counts)]
    for split, counts in apart.get("refusals", {}).items():
        if isinstance(counts, Mapping) and counts:
            content += [
                element("h3", f"Reasons for refusal: {split}"),
                table(("reason", "pictures"), list(counts.items())),
            ]
    return join(content)


def _confusion(counts: Any) -> Html:
    """A confusion matrix, one row for each thing asked for; a message if it cannot be read."""
    if not isinstance(counts, Mapping) or not all(isinstance(row, Mapping) for row in counts.values()):
        return element("p", "cannot be read", class_="bad")
    columns = list(dict.fromkeys(read for row in counts.values() for read in row))
    rows = [(asked, *(number(row.get(read, 0)) for read in columns)) for asked, row in counts.items()]
    return table(("asked for", *columns), rows)


def _judged(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        low, high, n = (number(value.get(key)) for key in ("low", "high", "n"))
        return name, number(value["accuracy"]), f"{low}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{high}", n
    return name, number(value), "", ""


def number(value: Any) -> str:
    """A logged value as text: floats with six digits, `null` if it is missing."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ("; " if any(isinstance(v, Mapping) for v in value) else ", ").join(map(number, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {number(v)}" for key, v in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def throughput(lines: Sequence[Mapping[str, Any]], batch: int, seconds: Any) -> Html | None:
    """Median speed in updates and images per second; None if no speed was logged."""
    rates = [v for _, v in records.scalar_series(lines).get("updates_per_second", []) if math.isfinite(v)]
    if not rates:
        return None
    median = statistics.median(rates)
    rows = [("updates per second, median", f"{median:.4g}"), ("images per second, median", f"{median * batch:.4g}")]
    return table((), [*rows, ("seconds in status.json", number(seconds))])


def skipped(rows: Sequence[tuple[str, str]], unreadable: int) -> Html:
    """Skipped files with their reasons; ``unreadable``: number of damaged lines in skipped.jsonl."""
    content = [element("p", f"{len(rows)} files were skipped." if rows else "Nothing was skipped.")]
    if unreadable:
        content.append(element("p", f"Lines of skipped.jsonl that cannot be read: {unreadable}.", class_="bad"))
    if rows:
        # reasons that differ only in a quoted name are one
        reasons = Counter(re.sub(r"'[^']*'", "'…'", reason) for _, reason in rows).most_common()
        content += [table(("files", "reason"), [(count, reason) for reason, count in reasons[:REASONS]])]
        content += [
            _left_out(len(reasons) - REASONS, "reasons"),
            table(("file", "reason"), rows[:ROWS]),
            _left_out(len(rows) - ROWS, "files"),
        ]
    return join(content)


def _left_out(count: int, what: str) -> Html:
    return element("p", f"{count} more {what} are not shown.", class_="faint") if count > 0 else Html()
