"""Say in one line what a run is doing: state, update, seconds, newest checkpoint, and the reason where it failed.

  ldm status runs/demo

Reads only, and takes nothing from a run at work. Under launchers, whose own exit code reaches the caller, a script learns
here how a run ended (docs/resuming.md): with --wait, for a trainer may still be saving when its launcher has ended.

exit codes: 0 running or done, 75 interrupted and saved (start it again), 1 killed: its status says running, but no process
holds its lock (start it again), 2 no run; of a run that failed, the code that its command ended with
"""

from __future__ import annotations

import argparse
import json
import time

from ldm.cli.console import Console
from ldm.runs.status import run_status, status_line

POLL = 0.2  # seconds between two looks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run."""
    parser.add_argument("run", metavar="RUN", help="a run of any training command")
    parser.add_argument("--wait", action="store_true", help="first wait until no process is at work on it")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Read and print; returns the exit code."""
    now = run_status(arguments.run)
    while arguments.wait and now["locked"]:
        time.sleep(POLL)
        now = run_status(arguments.run)
    Console().say(json.dumps(now, indent=2, ensure_ascii=False) if arguments.json else status_line(now))
    return int(now["exit_code"])
