"""`starts.jsonl`: code, versions and machine (without its name) of each start of a run."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import ldm
from ldm.runs.directory import RunDirectory
from ldm.runs.records import STARTS

CODE = Path(ldm.__file__).parent.parent  # the checkout, where the code runs from one
PACKAGES = ("ldm", "autoencoder")


def record(
    run: RunDirectory | None, step: int, steps: int, processes: int, device: torch.device, say: Callable[[str], None]
) -> None:
    """Add a line for this start, and set ``status.json`` to running, if there is a ``run``.

    ``step``: the update that training continues from. A full disk is reported, and training
    continues.
    """
    if run is None:
        return
    line = json.dumps(describe(step, processes, device), ensure_ascii=False)
    try:
        with (run.path / STARTS).open("a+b") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 1))
            torn = stream.read(1) not in (b"", b"\n")  # the process was killed while writing
            stream.write((("\n" if torn else "") + line + "\n").encode(errors="replace"))
    except OSError as error:
        say(f"{run.path / STARTS} could not be written: {error.strerror}")
    run.status("running", step, steps)


def describe(step: int, processes: int, device: torch.device) -> dict[str, Any]:
    """Contents of the line of a start."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "processes": processes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerate": version("accelerate"),
        "ldm": ldm.__version__,
        **checkout(CODE),
        "arguments": sys.argv[1:],  # recorded for the user only
    }


def changed(before: Any, now: Mapping[str, Any]) -> str | None:
    """Differences from a checkpoint's environment; None: none, or not recorded."""
    if not isinstance(before, Mapping):
        return None
    names = {"device_name": "processor" if now["device"] == "cpu" else "device"}
    differing = {name: value for name, value in now.items() if before.get(name, value) != value}
    found = [f"{names.get(name, name)} {before[name]} → {value}" for name, value in differing.items()]
    return f"not as when the checkpoint was written: {', '.join(found)}" if found else None


def checkout(folder: Path) -> dict[str, Any]:
    """Git commit of ``folder``, and true if its code differs; None without a checkout."""
    unknown: dict[str, Any] = {"commit": None, "dirty": None}
    if not (folder / ".git").exists():  # installed: a repository further up belongs to another project
        return unknown
    # Without the variables of a git hook that may run this, and without locks: a user may be committing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    git = ["git", "--no-optional-locks", "-C", str(folder)]

    def output(*arguments: str) -> str:
        command = [*git, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20, env=environment)
        return done.stdout.strip()

    try:
        commit, changes = output("rev-parse", "HEAD"), output("status", "--porcelain", "--", *PACKAGES)
    except (OSError, subprocess.SubprocessError):
        return unknown
    return {"commit": commit, "dirty": bool(changes)}
