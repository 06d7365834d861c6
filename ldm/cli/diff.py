"""Say what differs between two runs: configuration, data, code version, results, report and status; or between two models.

  ldm diff runs/demo runs/other

Data is compared by the fingerprints in the newest checkpoints, code by the last line of starts.jsonl, results by the figures
that were logged last. The run's own name and times are left out. Two model folders or files are compared as `ldm inspect`
describes them. The exit code is 0 whether anything differs or not.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.console import Console
from ldm.config import ConfigError

if TYPE_CHECKING:
    from ldm.runs.compare import Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two to compare."""
    parser.add_argument("a", metavar="RUN_A", help="a run, or a model folder or file")
    parser.add_argument("b", metavar="RUN_B", help="another of the kind")


def run(arguments: argparse.Namespace) -> None:
    """Read both, and print what differs."""
    from ldm.runs.compare import run_differences

    a, b = Path(arguments.a), Path(arguments.b)
    for path in (a, b):
        if not path.exists():
            raise ConfigError(f"no run or model {path}")
    runs = [(path / "config.yaml").is_file() and not (path / "model_index.json").is_file() for path in (a, b)]
    if all(runs):
        differences = run_differences(a, b)
    elif any(runs):
        kinds = [f"{path} is {'a run' if kind else 'none'}" for path, kind in zip((a, b), runs, strict=True)]
        raise ConfigError(f"{' and '.join(kinds)}: name two runs, or two models (of a run: RUN/model)")
    else:
        differences = _models(a, b)
    console = Console()
    for subject, rows in differences.items():
        console.say(subject)
        for name, before, after in rows or ():
            console.say(f"  {name:32s} {before} → {after}")
        if not rows:
            console.say("  no difference" if rows is not None else "  neither has recorded any")


def _models(a: Path, b: Path) -> dict[str, list[Row] | None]:
    """Compare the parts of two models. Raises FolderError or ConfigError where one is not a model."""
    from ldm.interop.describe import describe
    from ldm.interop.open import read_any
    from ldm.runs.compare import NOTHING, compare

    first, second = (describe(read_any(str(path))) for path in (a, b))
    found: dict[str, list[Row] | None] = {}
    for name in {**first, **second}:
        one, other = (_entries(name, about.get(name)) for about in (first, second))
        found[name] = (
            compare(one, other)
            if one and other
            else [(name, "there" if one else NOTHING, "there" if other else NOTHING)]
        )
    return found


def _entries(name: str, facts: Any) -> dict[str, Any]:
    """By dotted name; empty where there are none."""
    from ldm.runs.records import flat

    return flat(facts) if isinstance(facts, Mapping) else {} if facts is None else {name: facts}
