"""Checkpoints that survive a kill at any moment: files, a manifest of hashes, one rename.

A checkpoint is a folder `step-XXXXXXXX` with a `<group>.safetensors` for each group of tensors,
`state.json`, `config.yaml`, and `manifest.json` (size and sha256 of every other file). It is
written under a temporary name, flushed to disk and renamed once, so a folder with the final name is
complete; the hashes find later damage.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm import config as configuration
from ldm.errors import CheckpointError
from ldm.files.disk import file_hash, flush, read_bytes
from ldm.runs.checkpoints.folder import CONFIG, FORMAT, MANIFEST, STATE, check, prune, remove, remove_stale, size_text

Tensors = Mapping[str, Mapping[str, Tensor]]  # group → name → tensor

ROOM = 2**17  # bytes needed beside the tensors: headers, state, configuration, manifest
_GROUP = re.compile(r"[a-z0-9_]+")
_log = logging.getLogger(__name__)


def snapshot(tensors: Tensors, into: Tensors | None = None) -> dict[str, dict[str, Tensor]]:
    """Copy every tensor to the CPU, so that the next update cannot change it.

    ``into``: an old copy whose memory is reused: allocating takes longer than copying.
    """
    return {
        group: {name: _memory(t, (into or {}).get(group, {}).get(name)).copy_(t.detach()) for name, t in named.items()}
        for group, named in tensors.items()
    }


def _memory(like: Tensor, old: Tensor | None) -> Tensor:
    if old is not None and old.shape == like.shape and old.dtype == like.dtype:
        return old
    return torch.empty(like.shape, dtype=like.dtype, device="cpu")


def tensor_bytes(tensors: Tensors) -> int:
    """Bytes of all tensors together."""
    return sum(t.numel() * t.dtype.itemsize for named in tensors.values() for t in named.values())


def save(
    folder: Path,
    step: int,
    tensors: Tensors,
    state: Mapping[str, Any],
    config: Any,
    keep: int = 2,
    keep_every: int | None = None,
) -> Path:
    """Write checkpoint ``step`` into ``folder``, then delete those that ``retained`` does not name.

    Reference form of the background writer, in one thread: for scripts and tests.

    ``config`` is the run's configuration dataclass; ``state`` must be JSON. An existing checkpoint
    of this step is kept if intact and replaced if damaged. Raises CheckpointError; older ones are
    then untouched.
    """
    path = write(folder, step, snapshot(tensors), state, config)
    thin_out(path, keep, keep_every)
    return path


def write(folder: Path, step: int, tensors: Tensors, state: Mapping[str, Any], config: Any) -> Path:
    """``save`` for tensors that are already contiguous, unshared and on the CPU; deletes none."""
    final, temporary = folder / f"step-{step:08d}", folder / f".tmp-step-{step:08d}-{os.getpid()}"
    needed = tensor_bytes(tensors) + ROOM
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for message in remove_stale(folder):
            _log.warning("%s", message)
        if not (final.exists() and not check(final)):
            if shutil.disk_usage(folder).free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            temporary.mkdir()
            _fill(temporary, step, tensors, state, config)
            if final.exists():
                remove(final)
            os.rename(temporary, final)
            flush(folder)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
        ValueError,
        TypeError,
    ) as error:  # a full disk raises the first three
        shutil.rmtree(temporary, ignore_errors=True)
        reason = f"{_reason(error)}{_room(error, folder, needed)}"
        raise CheckpointError(f"{final}: the checkpoint could not be written: {reason}") from error
    return final


def thin_out(fresh: Path, keep: int, keep_every: int | None) -> None:
    """Delete checkpoints beside ``fresh`` that ``retained`` does not name.

    Raises CheckpointError.
    """
    try:
        prune(fresh.parent, keep, keep_every, fresh)
    except OSError as error:
        text = f"{fresh}: is written, but an older one could not be deleted: {_reason(error)}"
        raise CheckpointError(text) from error


def _reason(error: Exception) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _room(error: Exception, folder: Path, needed: int) -> str:
    """Bytes needed and free, if the error may come from the disk."""
    if isinstance(error, (CheckpointError, ValueError, TypeError)):
        return ""
    try:
        free = size_text(shutil.disk_usage(folder).free)
    except OSError:
        return f" ({size_text(needed)} are needed)"
    return f" ({size_text(needed)} are needed, {free} are free)"


def _fill(folder: Path, step: int, tensors: Tensors, state: Mapping[str, Any], config: Any) -> None:
    for group, named in tensors.items():
        if not _GROUP.fullmatch(group):
            raise CheckpointError(f"group {group!r} is not a file name: use lower-case letters, digits and _")
        save_file(dict(named), folder / f"{group}.safetensors")
    (folder / STATE).write_text(json.dumps(dict(state), indent=1, allow_nan=False), encoding="utf-8")
    configuration.save(config, folder / CONFIG)
    hashes = _flushed(sorted(folder.iterdir()))
    files = {file.name: {"bytes": file.stat().st_size, "sha256": digest} for file, digest in hashes.items()}
    manifest = {"format": FORMAT, "step": step, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    flush(folder / MANIFEST)
    flush(folder)


def _flushed(files: list[Path]) -> dict[Path, str]:
    """Flush files to disk and compute their sha256 at the same time."""
    errors: list[Exception] = []

    def work() -> None:
        try:
            for file in files:
                flush(file)
        except Exception as error:  # raised below
            errors.append(error)

    disk = threading.Thread(target=work, daemon=True)
    disk.start()
    hashes = {file: file_hash(file) for file in files}
    disk.join()
    if errors:
        raise errors[0]
    return hashes


def load(
    path: Path, groups: Iterable[str] | None = None, verify: bool = True
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint's groups of tensors (None: all) to the CPU, and its state.

    ``verify=False``: for a checkpoint just verified, by ``newest_valid``. Raises CheckpointError
    naming the file.
    """
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint {path}")
    wanted = sorted(f.stem for f in path.glob("*.safetensors")) if groups is None else list(groups)
    only = None if groups is None else [*(f"{g}.safetensors" for g in wanted), STATE]
    if verify and (problems := check(path, only)):
        raise CheckpointError("; ".join(problems))
    tensors, file = {}, path / STATE
    try:
        state = json.loads(read_bytes(file).decode())
        if not isinstance(state, dict):
            raise ValueError("it should hold one JSON object")
        for group in wanted:
            file = path / f"{group}.safetensors"
            tensors[group] = load_file(file)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read: {' '.join(str(error).split())}") from error
    return tensors, state


def require_fit(path: Path, groups: Tensors) -> None:
    """Compare names and shapes of ``groups`` with those in a checkpoint, reading only its headers.

    Raises CheckpointError naming the first tensor that is missing, extra or of another shape.
    """
    for group, named in groups.items():
        file = path / f"{group}.safetensors"
        try:
            with safe_open(file, "pt") as opened:
                shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cannot be read: {' '.join(str(error).split())}") from None
        for name in sorted(named.keys() | shapes.keys()):
            wanted = tuple(named[name].shape) if name in named else None
            if (found := shapes.get(name)) != wanted:
                difference = f"{_shape(found)} there and {_shape(wanted)} in this model"
                raise CheckpointError(f"{file}: {name} is {difference}: they must be equal")


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {'×'.join(map(str, shape)) or '()'}"


MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's state of each parameter; a group may name others as `moments`


def optimizer_tensors(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as tensors `<parameter name>.<moment>`; a parameter without state is left out.

    The tensors are live: ``snapshot`` copies them.
    """
    flat = {}
    for name, parameter, group in _named(optimizer, network):
        state, moments = optimizer.state.get(parameter) or {}, _moments(group)
        if state and set(state) != set(moments):
            raise CheckpointError(
                f"optimizer: {name} has the state {', '.join(state)}, should have {', '.join(moments)}"
            )
        flat |= {f"{name}.{key}": tensor for key, tensor in state.items()}
    return flat


def restore_optimizer(optimizer: torch.optim.Optimizer, network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Restore the state from ``optimizer_tensors``, bit for bit.

    Learning rate and other settings stay those of ``optimizer``. Raises CheckpointError, before any
    change.
    """
    states, left = [], dict(tensors)
    for name, parameter, group in _named(optimizer, network):
        moments = _moments(group)
        saved = {key: left.pop(f"{name}.{key}") for key in moments if f"{name}.{key}" in left}
        shapes = {key: torch.Size() if key == "step" else parameter.shape for key in moments}
        if saved and {key: tensor.shape for key, tensor in saved.items()} != shapes:
            shape = tuple(parameter.shape)
            raise CheckpointError(
                f"optimizer: the state of {name} is incomplete or not of the parameter's shape {shape}"
            )
        state: dict[str, Tensor] = {}
        for key, tensor in saved.items():
            if key == "step":  # as in AdamW itself: on the CPU, unless fused or capturable
                on_device = bool(group.get("fused") or group.get("capturable"))
                empty = tensor.new_empty(()).to(parameter.device if on_device else "cpu")
            else:
                empty = torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False)
            state[key] = empty.copy_(tensor)
        states.append((parameter, state))
    if left:
        raise CheckpointError(f"optimizer: {next(iter(left))} belongs to no parameter ({len(left)} in all)")
    for parameter, state in states:
        optimizer.state[parameter] = state


def _moments(group: Mapping[str, Any]) -> tuple[str, ...]:
    return group.get("moments", MOMENTS)


def _named(optimizer: torch.optim.Optimizer, network: nn.Module) -> list[tuple[str, Tensor, dict[str, Any]]]:
    """Name, parameter and group of each parameter of ``network``, in its order."""
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    named = list(network.named_parameters())
    if groups.keys() != {id(parameter) for _, parameter in named}:
        raise CheckpointError(
            f"the optimizer has {len(groups)} parameters, which are not the {len(named)} of the network"
        )
    return [(name, parameter, groups[id(parameter)]) for name, parameter in named]
