"""Hashes of large files, cached until the file changes.

A small file in the user's cache folder holds each hash with the size, inode and times of its file.
It may be deleted at any time; if it cannot be written, the hash is computed each time.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ldm.files.disk import file_hash, replace, resolved

SMALLEST = 16 * 2**20  # bytes; smaller files are hashed each time, which is quick
SETTLED = 2.0  # seconds since the last change: sooner, a second change may not show in the file's times
_computed: dict[str, str] = {}  # by this process: hash by state of the file


def known_hash(file: Path) -> str:
    """sha256 of a file's bytes, cached for a large file that has not changed. Raises OSError."""
    before = _state(file)
    if not _worth_keeping(before):
        return file_hash(file)
    key, entry = json.dumps(before), _entry(before["path"])
    if (known := _computed.get(key) or (entry and _remembered(entry, before))) is not None:
        return known
    digest = file_hash(file)
    if _state(file) == before:
        _computed[key] = digest
        if entry is not None:
            with suppress(OSError):
                replace(entry, json.dumps({**before, "sha256": digest}).encode())
    return digest


def _state(file: Path) -> dict[str, Any]:
    """Key that changes with the content of a file: the inode's change time cannot be set back."""
    about = file.stat()
    return {
        "path": str(resolved(file)),
        "device": about.st_dev,
        "inode": about.st_ino,
        "size": about.st_size,
        "mtime_ns": about.st_mtime_ns,
        "ctime_ns": about.st_ctime_ns,
    }


def _worth_keeping(state: dict[str, Any]) -> bool:
    changed = max(state["mtime_ns"], state["ctime_ns"]) / 1e9
    return state["size"] >= SMALLEST and time.time() - changed >= SETTLED


def _entry(path: str) -> Path | None:
    """File of a cached hash; None without a cache folder."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(root) if os.path.isabs(root) else Path.home() / ".cache"
    except RuntimeError:  # a user without a home
        return None
    return folder / "ldm/hashes" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"


def _remembered(entry: Path, state: dict[str, Any]) -> str | None:
    """The hash in an entry, if it is of this state of the file."""
    try:
        held = json.loads(entry.read_text(encoding="utf-8"))
        digest = held.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return digest if held == state and isinstance(digest, str) and len(digest) == 64 else None
