"""`starts.jsonl` of a run: one line for each start of its training, with what ran where. The host's name is not among it."""

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
    """Add a line, and say in ``status.json`` that the run is under way; nothing on a process without the run's folder.

    ``step``: the update that training continues from. A full disk is reported; training continues.
    """
    if run is None:
        return
    line = json.dumps(describe(step, processes, device), ensure_ascii=False)
    try:
        with (run.path / STARTS).open("a+b") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 1))
            torn = stream.read(1) not in (b"", b"\n")  # by a kill
            stream.write((("\n" if torn else "") + line + "\n").encode(errors="replace"))
    except OSError as error:
        say(f"{run.path / STARTS} could not be written: {error.strerror}")
    run.status("running", step, steps)


def describe(step: int, processes: int, device: torch.device) -> dict[str, Any]:
    """Contents of a line."""
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
        "arguments": sys.argv[1:],  # kept, not read
    }


def changed(before: Any, now: Mapping[str, Any]) -> str | None:
    """Differences between the surroundings now and when the checkpoint was written; None: none, or not recorded."""
    if not isinstance(before, Mapping):
        return None
    names = {"device_name": "processor" if now["device"] == "cpu" else "device"}
    found = [
        f"{names.get(name, name)} {before[name]} → {value}"
        for name, value in now.items()
        if before.get(name, value) != value
    ]
    return f"not as when the checkpoint was written: {', '.join(found)}" if found else None


def checkout(folder: Path) -> dict[str, Any]:
    """The git commit of the code in ``folder``, and whether the code differs from it; None where it is not a checkout or git is missing."""
    unknown: dict[str, Any] = {"commit": None, "dirty": None}
    if not (folder / ".git").exists():  # installed: a repository further up belongs to another project
        return unknown
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("GIT_")
    }  # of a hook that started this
    said = []
    for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", *PACKAGES]):
        try:
            git = ["git", "--no-optional-locks", "-C", str(folder), *arguments]  # a user may be committing
            said.append(
                subprocess.run(
                    git, capture_output=True, text=True, check=True, timeout=20, env=environment
                ).stdout.strip()
            )
        except (OSError, subprocess.SubprocessError):
            return unknown
    return {"commit": said[0], "dirty": bool(said[1])}
