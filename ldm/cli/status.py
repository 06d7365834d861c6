"""Print the state of a run in one line: update, seconds, newest checkpoint, and why it failed if it did.

  ldm status runs/demo
  ldm status runs/demo --wait

Reads only, and does not disturb a run that is training. A launcher such as torchrun hides the exit code
of a training command, so scripts ask here how it ended (docs/resuming.md); give --wait then, since a
trainer may still be saving when its launcher has ended.

exit codes: 0 running or done, 75 interrupted and saved (start it again), 1 killed, that is, the status
says running but no process holds the lock (start it again), 2 not a run; for a failed run, the exit
code of its command
"""

from __future__ import annotations

import argparse
import json
import time

from ldm.cli.console import Console
from ldm.runs.status import run_status, status_line

POLL = 0.2  # seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, and how to report it."""
    parser.add_argument("run", metavar="RUN", help="a run of any training command")
    parser.add_argument("--wait", action="store_true", help="first wait until no process works on it")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Read and print; returns the exit code of the state."""
    now = run_status(arguments.run)
    while arguments.wait and now["locked"]:
        time.sleep(POLL)
        now = run_status(arguments.run)
    Console().say(json.dumps(now, indent=2, ensure_ascii=False) if arguments.json else status_line(now))
    return int(now["exit_code"])
