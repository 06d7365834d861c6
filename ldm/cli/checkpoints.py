"""List the checkpoints of a run: update, date, size, contents, and which one the next start uses.

  ldm checkpoints runs/demo
  ldm checkpoints runs/demo --fast --json

Every file is read and compared with its sha256; with --fast only its size is compared. Nothing is
changed, so this is safe while the run is training. Exit code 0 if the newest checkpoint is intact,
else 4.
"""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from ldm.cli.console import Console
from ldm.config import runs_below


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, and whether to check hashes."""
    parser.add_argument("run", metavar="RUN", help="a run of any training command")
    parser.add_argument("--fast", action="store_true", help="compare sizes instead of hashes")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Check, print, and raise CheckpointError unless the newest checkpoint is intact."""
    from ldm.errors import RunError
    from ldm.runs.checkpoints import folder as shelf
    from ldm.runs.checkpoints.resume import set_asides

    folder = Path(arguments.run)
    if not folder.is_dir():
        raise RunError(f"no run {folder}")
    if not (folder / "checkpoints").exists() and (below := runs_below(folder)):
        raise RunError(f"{folder} has no checkpoints{below}")
    rows = listed(folder, arguments.fast)
    next_start = next((row["path"] for row in reversed(rows) if not row["problems"]), None)
    unfinished = [
        {"path": str(path), "written_by_a_living_process": alive}
        for place in (folder, folder / "checkpoints")
        for path, alive in shelf.unfinished(place)
    ]
    aside = {str(place): [shelf.step_of(p) for p in shelf.steps(place)] for place in set_asides(folder / "checkpoints")}
    console = Console()
    if arguments.json:
        found = {"checkpoints": rows, "next": next_start, "unfinished": unfinished, "set_aside": aside}
        console.say(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        for line in _lines(rows, next_start, unfinished, arguments.fast):
            console.say(line)
        for place, updates in aside.items():
            console.say(f"{place}: updates {', '.join(map(str, updates))}, set aside: no start uses them")
    if not rows:
        raise shelf.CheckpointError(f"{folder} has no checkpoint")
    if rows[-1]["problems"]:
        then = (
            f"the next start uses {next_start}"
            if next_start
            else "none is intact, so the next start will refuse to run"
        )
        raise shelf.CheckpointError(f"the newest checkpoint, {rows[-1]['path']}, is damaged: {then}")


def listed(run: Path, fast: bool) -> list[dict[str, Any]]:
    """Facts about each checkpoint of a run, oldest first. Read-only."""
    from ldm.config import ConfigError, load_run
    from ldm.runs.checkpoints import folder as shelf

    folder = run / "checkpoints"
    problems = {path: shelf.check(path, fast=fast) for path in shelf.steps(folder)}
    try:
        train = load_run(run).train
        kept = shelf.retained(folder, train.keep_checkpoints, train.keep_every, lambda path: not problems.get(path))
    except ConfigError:  # without a configuration the retention of a run is unknown
        kept = dict.fromkeys(problems, "")
    rows = []
    for path, found in problems.items():
        with suppress(FileNotFoundError):  # deleted meanwhile by a running training
            rows.append(_row(path) | {"problems": found, "held": kept.get(path, "deleted at the next save")})
    return rows


def _row(path: Path) -> dict[str, Any]:
    from ldm.runs.checkpoints import folder as shelf

    manifest = path / shelf.MANIFEST
    written = (manifest if manifest.exists() else path).stat().st_mtime
    return {
        "path": str(path),
        "update": shelf.step_of(path),
        "date": datetime.fromtimestamp(written).isoformat(" ", "seconds"),
        "bytes": shelf.size_of(path),
        "groups": sorted(file.stem for file in path.glob("*.safetensors")),
    }


def _lines(
    rows: list[dict[str, Any]], next_start: str | None, unfinished: list[dict[str, Any]], fast: bool
) -> list[str]:
    """One line for each checkpoint and each temporary folder."""
    from ldm.runs.checkpoints.folder import size_text

    lines = []
    for row in rows:
        state = "; ".join(row["problems"]) or ("sizes match" if fast else "intact")
        held = f" ({row['held']})" if row["held"] else ""
        arrow = "  <- the next start" if row["path"] == next_start else ""
        groups = " ".join(row["groups"]) or "nothing"
        size = size_text(row["bytes"])
        lines.append(f"{row['update']:>8}  {row['date']}  {size:>10}  {groups}  {state}{held}{arrow}")
    for entry in unfinished:
        alive = entry["written_by_a_living_process"]
        state = "being written" if alive else "left by a killed process: the next start removes it"
        lines.append(f"{entry['path']}: {state}")
    return lines
