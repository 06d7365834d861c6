"""Show how two runs, or two models, differ.

  ldm diff runs/demo runs/other
  ldm diff runs/demo/model sd-v1-5.ckpt

Of two runs: configuration, data (the fingerprints in the newest checkpoints), code version (the last
line of starts.jsonl), results (the metrics logged last), report.json and status. Their names and times
are left out. Two model folders or files are compared as `ldm inspect` describes them. The exit code is
0 whether they differ or not.
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
    """The two runs or models to compare."""
    parser.add_argument("a", metavar="RUN_A", help="a run, or a model folder or file")
    parser.add_argument("b", metavar="RUN_B", help="another of the same kind")


def run(arguments: argparse.Namespace) -> None:
    """Read both and print how they differ."""
    from ldm.runs.compare import run_differences

    a, b = Path(arguments.a), Path(arguments.b)
    for path in (a, b):
        if not path.exists():
            raise ConfigError(f"no run or model {path}")
    is_run = [(path / "config.yaml").is_file() and not (path / "model_index.json").is_file() for path in (a, b)]
    if all(is_run):
        differences = run_differences(a, b)
    elif any(is_run):
        kinds = [f"{path} is {'a run' if run else 'not'}" for path, run in zip((a, b), is_run, strict=True)]
        raise ConfigError(f"{' and '.join(kinds)}: name two runs, or two models (that of a run is RUN/model)")
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
        before, after = (_entries(name, about.get(name)) for about in (first, second))
        if before and after:
            found[name] = compare(before, after)
        else:
            found[name] = [(name, "there" if before else NOTHING, "there" if after else NOTHING)]
    return found


def _entries(name: str, facts: Any) -> dict[str, Any]:
    """Facts by dotted name; empty if there are none."""
    from ldm.runs.records import flat

    if facts is None:
        return {}
    return flat(facts) if isinstance(facts, Mapping) else {name: facts}
