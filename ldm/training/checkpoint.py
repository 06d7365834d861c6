"""Checkpoints that survive a kill at any moment: safetensors and JSON, a manifest of hashes, one rename.

A checkpoint is a folder `step-XXXXXXXX` with one `<group>.safetensors` for each named group of tensors, `state.json`,
`config.yaml`, and `manifest.json` (size and sha256 of every other file). It is written under a temporary name,
flushed to the disk and renamed once, so a folder of the final name is complete; hashes find what broke later.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm import config as configuration

Tensors = Mapping[str, Mapping[str, Tensor]]  # group → name → tensor

MANIFEST, STATE, CONFIG = "manifest.json", "state.json", "config.yaml"
FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_GROUP = re.compile(r"[a-z0-9_]+")
_log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, is damaged, or does not fit; the message names the file or the tensor."""

    exit_code = 4


def snapshot(tensors: Tensors) -> dict[str, dict[str, Tensor]]:
    """Copy every tensor into its own contiguous CPU memory, so that the next update cannot change it."""
    return {
        group: {name: torch.empty(t.shape, dtype=t.dtype, device="cpu").copy_(t.detach()) for name, t in named.items()}
        for group, named in tensors.items()
    }


def save(folder: Path, step: int, tensors: Tensors, state: Mapping[str, Any], config: Any, keep: int = 2) -> Path:
    """Write checkpoint ``step`` into ``folder``, then delete the oldest beyond ``keep`` (≥ 2) intact ones.

    ``config`` is the run's configuration dataclass; ``state`` must be JSON. A checkpoint of this step that is
    already there is kept when intact and replaced when damaged. Raises CheckpointError.
    """
    return _write(folder, step, snapshot(tensors), state, config, keep)


def _write(folder: Path, step: int, tensors: Tensors, state: Mapping[str, Any], config: Any, keep: int) -> Path:
    """``save`` for tensors that are contiguous, unshared and on the CPU already."""
    final, temporary = folder / f"step-{step:08d}", folder / f".tmp-step-{step:08d}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for message in remove_stale(folder):
            _log.warning("%s", message)
        if not (final.exists() and not check(final)):
            temporary.mkdir()
            _fill(temporary, step, tensors, state, config)
            if final.exists():
                _remove(final)
            os.rename(temporary, final)
            _sync(folder)
        _prune(folder, keep, final)
    except (OSError, RuntimeError, SafetensorError, ValueError, TypeError) as error:  # a full disk is any of the first three
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error if isinstance(error, CheckpointError) else f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise CheckpointError(f"{final}: the checkpoint could not be written: {reason}") from error
    return final


def _fill(folder: Path, step: int, tensors: Tensors, state: Mapping[str, Any], config: Any) -> None:
    for group, named in tensors.items():
        if not _GROUP.fullmatch(group):
            raise CheckpointError(f"group {group!r} is no file name: use lower-case letters, digits and _")
        save_file(dict(named), folder / f"{group}.safetensors")
    (folder / STATE).write_text(json.dumps(dict(state), indent=1, allow_nan=False))
    configuration.save(config, folder / CONFIG)
    names = sorted(file.name for file in folder.iterdir())
    for name in names:
        _sync(folder / name)
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in names}
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1))
    _sync(folder / MANIFEST)
    _sync(folder)


def _sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _remove(path: Path) -> None:
    """Delete a checkpoint; its final name disappears in one rename, so that a kill leaves no half of it."""
    doomed = path.with_name(f".tmp-old-{path.name}-{os.getpid()}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _prune(folder: Path, keep: int, fresh: Path) -> None:
    """Delete checkpoints older than the ``keep`` newest intact ones; damaged ones do not count."""
    if keep < 2:
        raise CheckpointError(f"keep must be at least 2, got {keep}")
    intact = 0
    for path in reversed(steps(folder)):
        if intact >= keep:
            _remove(path)
        elif path == fresh or not check(path):
            intact += 1


def remove_stale(folder: Path) -> list[str]:
    """Delete what killed writers left half-written and say so; to be called by the owner of the run's lock."""
    messages = []
    for path in sorted(folder.glob(".tmp-*")):
        pid = path.name.rpartition("-")[2]
        if pid.isdecimal() and int(pid) != os.getpid() and _alive(int(pid)):  # our own number: an earlier life in a container
            continue
        shutil.rmtree(path)
        messages.append(f"{path}: removed, left half-written by a process that is gone")
    return messages


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def steps(folder: Path) -> list[Path]:
    """The checkpoint folders in ``folder``, intact or not, oldest first."""
    return sorted((p for p in folder.glob("step-*") if _NAME.fullmatch(p.name)), key=step_of)


def step_of(path: Path) -> int:
    """The number of updates after which the checkpoint ``path`` was taken."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is no checkpoint: the folder should be named step-XXXXXXXX")
    return int(match[1])


def check(path: Path, only: Iterable[str] | None = None) -> list[str]:
    """What is wrong with a checkpoint (empty: intact), by the sizes and hashes of its manifest.

    ``only`` limits the check to those files.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{path / MANIFEST}: cannot be read ({type(error).__name__})"]
    if manifest.get("format") != FORMAT or manifest.get("step") != step_of(path):
        return [f"{path / MANIFEST}: is not the manifest of this checkpoint"]
    problems = [] if only is None else [f"{path / name}: is missing" for name in only if name not in files]
    for name, (size, digest) in files.items():
        if only is not None and name not in only:
            continue
        file = path / name
        try:
            if file.stat().st_size != size:
                problems.append(f"{file}: has {file.stat().st_size} bytes, should have {size}")
            elif _sha256(file) != digest:
                problems.append(f"{file}: its content does not match its sha256")
        except OSError as error:
            problems.append(f"{file}: {'is missing' if isinstance(error, FileNotFoundError) else error}")
    return problems


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint, or None, and what is wrong with each newer one. Changes nothing on the disk."""
    problems: list[str] = []
    for path in reversed(steps(folder)):
        found = check(path)
        if not found:
            return path, problems
        problems += found
    return None, problems


def load(path: Path, groups: Iterable[str] | None = None, verify: bool = True) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint: its groups of tensors (all, or those named), on the CPU, and its state.

    ``verify=False`` is for a path that ``newest_valid`` has just verified. Raises CheckpointError naming the file.
    """
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint {path}")
    wanted = sorted(f.stem for f in path.glob("*.safetensors")) if groups is None else list(groups)
    only = None if groups is None else [*(f"{g}.safetensors" for g in wanted), STATE]
    if verify and (problems := check(path, only)):
        raise CheckpointError("; ".join(problems))
    tensors, file = {}, path / STATE
    try:
        state = json.loads(file.read_text())
        for group in wanted:
            file = path / f"{group}.safetensors"
            tensors[group] = load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read: {' '.join(str(error).split())}") from error
    return tensors, state


class BackgroundWriter:
    """Writes checkpoints while training goes on: the state is copied at once, one write is in flight.

    The error of a write is raised by the next ``submit``, ``wait`` or ``close``.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None

    def submit(self, step: int, tensors: Tensors, state: Mapping[str, Any], config: Any) -> None:
        """Wait for the write before, copy the state, and write it behind the caller's back (arguments as ``save``)."""
        self.wait()  # before the copy: never two copies in memory
        self._pending = self._executor.submit(_write, self.folder, step, snapshot(tensors), copy.deepcopy(state), config, self.keep)

    def wait(self) -> Path | None:
        """Wait until the last write is on the disk; returns its path. Raises CheckpointError."""
        pending, self._pending = self._pending, None
        return None if pending is None else pending.result()

    def close(self) -> None:
        """Wait for the last write and end the thread. Raises CheckpointError."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # what AdamW keeps of each parameter


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """AdamW's state as flat tensors `<parameter name>.<moment>`; a parameter without state yet has none.

    ``names`` follow the order of the parameter groups. The tensors are live: ``snapshot`` copies them.
    """
    flat = {}
    for name, parameter, _ in _named(optimizer, names):
        state = optimizer.state.get(parameter) or {}
        if state and set(state) != set(MOMENTS):
            raise CheckpointError(f"optimizer: {name} has the state {', '.join(state)}, should have {', '.join(MOMENTS)} (AdamW)")
        flat |= {f"{name}.{key}": tensor for key, tensor in state.items()}
    return flat


def restore_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, Tensor]) -> None:
    """Give AdamW the state that ``optimizer_tensors`` read, bit for bit, on each parameter's device and in its layout.

    Learning rate and other settings stay those of ``optimizer``. Raises CheckpointError, then nothing was changed.
    """
    states, left = [], dict(tensors)
    for name, parameter, group in _named(optimizer, names):
        held = {key: left.pop(f"{name}.{key}") for key in MOMENTS if f"{name}.{key}" in left}
        if held and (len(held) < len(MOMENTS) or any(held[key].shape != parameter.shape for key in MOMENTS[:2])):
            raise CheckpointError(f"optimizer: the state of {name} is incomplete or not of the parameter's shape {tuple(parameter.shape)}")
        on_device = bool(group.get("fused") or group.get("capturable"))  # where AdamW itself keeps its step
        state: dict[str, Tensor] = {}
        for key, tensor in held.items():
            like = torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False) if key != "step" else tensor.new_empty(())
            state[key] = like.to(parameter.device if key != "step" or on_device else "cpu").copy_(tensor)
        states.append((parameter, state))
    if left:
        raise CheckpointError(f"optimizer: {next(iter(left))} belongs to no parameter ({len(left)} in all)")
    for parameter, state in states:
        optimizer.state[parameter] = state


def _named(optimizer: torch.optim.Optimizer, names: list[str]) -> list[tuple[str, Tensor, dict[str, Any]]]:
    pairs = [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]
    if len(pairs) != len(names):
        raise CheckpointError(f"the optimizer has {len(pairs)} parameters, but {len(names)} names were given")
    return [(name, parameter, group) for name, (parameter, group) in zip(names, pairs, strict=True)]
