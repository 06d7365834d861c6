"""List the checkpoints of a run: update, date, size, what is in them, whether they are intact, and which one the next start takes.

  ldm checkpoints runs/demo
  ldm checkpoints runs/demo --fast --json

Every file is read and compared with its sha256; with --fast only its size is compared. Nothing is changed, and a run that is
training may be looked at. Exit code 0 where the newest checkpoint is intact, else 4.
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
    parser.add_argument("run", metavar="RUN", help="a run of a training command")
    parser.add_argument("--fast", action="store_true", help="compare sizes, not hashes")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Look, print, and say by the exit code whether the newest is intact."""
    from ldm.errors import RunError
    from ldm.runs.checkpoints import folder as shelf
    from ldm.runs.checkpoints.resume import set_asides

    folder = Path(arguments.run)
    if not folder.is_dir():
        raise RunError(f"no run {folder}")
    if not (folder / "checkpoints").exists() and (below := runs_below(folder)):
        raise RunError(f"{folder} has no checkpoints{below}")
    rows = listed(folder, arguments.fast)
    taken = next((row["path"] for row in reversed(rows) if not row["problems"]), None)
    left = [
        {"path": str(path), "written_by_a_living_process": alive}
        for place in (folder, folder / "checkpoints")
        for path, alive in shelf.unfinished(place)
    ]
    aside = {str(place): [shelf.step_of(p) for p in shelf.steps(place)] for place in set_asides(folder / "checkpoints")}
    console = Console()
    if arguments.json:
        found = {"checkpoints": rows, "next": taken, "unfinished": left, "set_aside": aside}
        console.say(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        for line in _lines(rows, taken, left, arguments.fast):
            console.say(line)
        for place, updates in aside.items():
            console.say(f"{place}: set aside, {', '.join(map(str, updates))}: no start takes them")
    if not rows:
        raise shelf.CheckpointError(f"{folder} has no checkpoint")
    if rows[-1]["problems"]:
        then = f"the next start takes {taken}" if taken else "none is intact: the next start will refuse to begin anew"
        raise shelf.CheckpointError(f"the newest checkpoint, {rows[-1]['path']}, is damaged: {then}")


def listed(run: Path, fast: bool) -> list[dict[str, Any]]:
    """Facts about each checkpoint of a run, oldest first. Changes nothing on the disk."""
    from ldm.config import ConfigError, load_run
    from ldm.runs.checkpoints import folder as shelf

    folder = run / "checkpoints"
    problems = {path: shelf.check(path, fast=fast) for path in shelf.steps(folder)}
    try:
        train = load_run(run).train
        stay = shelf.retained(folder, train.keep_checkpoints, train.keep_every, lambda path: not problems.get(path))
    except ConfigError:  # without its configuration a run's retention is not known
        stay = dict.fromkeys(problems, "")
    rows = []
    for path, found in problems.items():
        with suppress(FileNotFoundError):  # deleted meanwhile by the training that continues
            rows.append(_row(path) | {"problems": found, "held": stay.get(path, "goes at the next save")})
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


def _lines(rows: list[dict[str, Any]], taken: str | None, left: list[dict[str, Any]], fast: bool) -> list[str]:
    """A line for each checkpoint, and for each temporary folder."""
    from ldm.runs.checkpoints.folder import size_text

    lines = []
    for row in rows:
        state = "; ".join(row["problems"]) or ("sizes right" if fast else "intact")
        held = f" ({row['held']})" if row["held"] else ""
        arrow = "  <- the next start" if row["path"] == taken else ""
        groups = " ".join(row["groups"]) or "nothing"
        lines.append(
            f"{row['update']:>8}  {row['date']}  {size_text(row['bytes']):>10}  {groups}  {state}{held}{arrow}"
        )
    for one in left:
        state = (
            "being written"
            if one["written_by_a_living_process"]
            else "left by a killed process: the next start removes it"
        )
        lines.append(f"{one['path']}: {state}")
    return lines
