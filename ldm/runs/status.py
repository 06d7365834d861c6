"""Status of a run, seen from outside: its `status.json`, newest checkpoint and lock.

Writes nothing, so a read-only folder works. Imports no torch.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

from ldm.config import runs_below
from ldm.errors import RunError
from ldm.runs.best import best_text
from ldm.runs.records import newest_checkpoint, read_status

SAVED = 75  # exit code of a run that was interrupted and saved
KILLED = 1
_AGAIN = "the same command continues from"


def run_status(path: str | Path) -> dict[str, Any]:
    """Status of a run, for JSON. Raises RunError for a folder that is not a run.

    ``state``: running, done, interrupted, failed, or killed (running by status.json, but not
    locked). ``locked``: true if a process is training it; None if the file system has no locks.
    ``reason``: why it ended, null where that is its last update. ``best``: its best validation, in words.
    ``exit_code``: 0 running or done, 75 interrupted and saved, 1 killed, else that of the command.
    """
    path = Path(path)
    if not any((path / name).is_file() for name in ("config.yaml", "status.json")):
        nothing = f"{path} is not a run: it has neither config.yaml nor status.json{runs_below(path)}"
        raise RunError(nothing if path.exists() else f"no run {path}")
    status, locked = read_status(path) or {}, is_locked(path)
    state = status.get("state")
    if locked:
        state = "running"  # whatever status.json says: a new start has not written it yet
    elif state == "running" or state is None:
        state = "running" if locked is None and state else "killed"
    codes = {"running": 0, "done": 0, "killed": KILLED, "interrupted": status.get("code", SAVED)}
    newest = newest_checkpoint(path)
    over = state in ("done", "interrupted", "failed")
    return {
        "run": str(path),
        "state": state,
        **{name: status.get(name) for name in ("step", "steps", "seconds")},
        "checkpoint": None if newest is None else newest[0],
        "locked": locked,
        "exit_code": codes.get(state, status.get("code", 1)),
        "reason": status.get("reason") if over else None,
        "best": best_text(path),
    }


def is_locked(path: Path) -> bool | None:
    """True if a process holds the run's lock; None if that cannot be seen. Changes no file."""
    try:
        descriptor = os.open(path / ".lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: concurrent readers do not see each other
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(descriptor)  # releases the lock; a trainer that starts at this moment tries again
    return False


def status_line(now: dict[str, Any]) -> str:
    """Result of ``run_status`` as a line of text."""
    state, step, steps, checkpoint = now["state"], now["step"], now["steps"], now["checkpoint"]
    percent = f" ({100 * step / steps:.0f} %)" if isinstance(step, int) and steps else ""
    update = f"update {step} of {steps}{percent}" if step is not None else "before its first update"
    at = f"at {update}" if step is not None else update
    seconds = f", {now['seconds']:.0f} s" if now["seconds"] is not None else ""
    saved = f"last checkpoint at update {checkpoint}" if checkpoint is not None else "no checkpoint"
    saved = f"best validation {now['best']}, {saved}" if now["best"] else saved
    again = f"update {checkpoint}" if checkpoint is not None else "the beginning"
    reason = now["reason"] or "no reason was recorded"
    what = {
        "running": f"running, {update}{seconds}, {saved}",
        "done": f"done, {update}{seconds}, {saved}" + (f"; {now['reason']}" if now["reason"] else ""),
        "killed": f"killed {at}{seconds}: its status says running, but no process holds its lock; {_AGAIN} {again}",
        "interrupted": f"interrupted and saved {at}{seconds}, {saved}; {_AGAIN} there",
        "failed": f"failed {at}{seconds}, {saved}; exit code {now['exit_code']}: {reason}",
    }
    if state == "interrupted" and now["exit_code"] != SAVED:
        what[state] = f"stopped at once {at}{seconds}; {_AGAIN} {again}"
    unseen = ""
    if state == "running" and now["locked"] is None:
        unseen = " (this file system does not show if a process is at work)"
    return f"{now['run']}: {what.get(str(state), f'{state}?')}{unseen}"
