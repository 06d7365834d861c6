"""LoRA files: read from diffusers, peft and kohya-ss, written for diffusers or kohya-ss."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config import UNetConfig
from ldm.errors import FolderError
from ldm.files.json import read_json
from ldm.files.tensors.archive import open_archive, write_tensors
from ldm.interop.bundle import TEXT, UNET
from ldm.interop.lora_names import (
    ALPHA,
    DOWN,
    UP,
    Place,
    check_kind,
    compvis_stems,
    diffusers_keys,
    kohya_keys,
    needs_settings,
    place_of,
    stems,
)
from ldm.interop.lora_settings import alpha_of, settings_of
from ldm.models.lora import Lora, LowRank, changeable

FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
METADATA = "lora_adapter_metadata"  # header entry: peft's LoraConfig of each network, as JSON
NAMES = (FILE, PEFT_FILE, "pytorch_lora_weights.bin", "adapter_model.bin")  # in a folder, the first that exists
LAYOUTS = {"diffusers": diffusers_keys, "kohya": kohya_keys}

Found = dict[Place, dict[str, tuple[str, Tensor]]]  # layer → DOWN, UP or ALPHA → key in the file and tensor


def read_lora(path: str | Path, networks: Mapping[str, nn.Module]) -> dict[str, Lora]:
    """Read a LoRA file as one ``Lora`` per network that it changes: frozen, float32, not attached.

    Args:
        path: the file, a folder that holds one, or a run.
        networks: UNET, and TEXT for the text tower.

    Raises:
        FolderError: naming the file and the key or setting, for a tensor that is not finite, does
            not fit or is not known.
    """
    file = find_lora(path)
    tensors, header = _open(file)
    settings = {part: settings_of(part, header, str(file)) for part in (UNET, TEXT)}
    check_kind(tensors, str(file))

    # Every name that a layer may have in a file.
    table = {
        stem: (part, name)
        for part, network in networks.items()
        for name in changeable(network)
        for stem in stems(part, name)
    }
    if isinstance(config := getattr(networks.get(UNET), "config", None), UNetConfig):
        table |= {stem: (UNET, name) for name in changeable(networks[UNET]) for stem in compvis_stems(name, config)}

    # The tensors by layer and role.
    found: Found = {}
    for key, tensor in tensors.items():
        place, role = place_of(key, table, str(file))
        if role in (roles := found.setdefault(place, {})):
            raise FolderError(f"{file}: {key} and {roles[role][0]} are for the same layer")
        roles[role] = key, _finite(key, tensor, file)
    if not found:
        raise FolderError(f"{file} holds no tensor")
    loras = {}
    for part, network in networks.items():
        if layers := {name: roles for (owner, name), roles in found.items() if owner == part}:
            loras[part] = _build(network, layers, settings[part], file)
    return loras


def write_lora(
    loras: Mapping[str, Lora], file: Path, layout: str = "diffusers", dtype: torch.dtype = torch.float32
) -> None:
    """Write a LoRA with α/r multiplied into B, so that readers without α use the right scale.

    Args:
        layout: `diffusers`, for ``load_lora_weights`` and peft: α is the rank of each layer and
            stands in the header. `kohya`, for kohya's scripts, ComfyUI, AUTOMATIC1111 and
            diffusers: α is one tensor per layer, equal in all layers of a network, since diffusers
            misreads α that differ.
        dtype: of A and B in the file.

    Raises:
        FolderError: a change that ``dtype`` cannot hold, or a file that cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for part, lora in loras.items():
        usual = _usual_rank(lora)
        for name, change in lora.changes.items():
            alpha = float(change.rank if layout == "diffusers" else usual)
            down, up = change.with_alpha(alpha)
            values = {DOWN: down.to(dtype), UP: up.to(dtype), ALPHA: torch.tensor(alpha)}
            for role, key in LAYOUTS[layout](part, name).items():
                tensors[key] = _finite(key, values[role], file).detach().cpu().contiguous()
        about |= {f"{part}.{key}": value for key, value in _peft_config(lora).items()}
    header = {METADATA: json.dumps(about, indent=2, sort_keys=True)} if layout == "diffusers" else None
    write_tensors(file, tensors, header)


def find_lora(path: str | Path) -> Path:
    """The LoRA file of a folder or run, or the file itself.

    Raises FolderError that says what is there instead.
    """
    path = Path(path)
    if path.is_file():
        candidates = [path]
    else:
        candidates = [file for folder in (path, path / "model") for name in NAMES if (file := folder / name).is_file()]
    if not candidates:
        scale = f" (or {path.name.rpartition(':')[2]!r} should be a number, its scale)" if ":" in path.name else ""
        raise FolderError(
            f"no LoRA {path}{scale}" if not path.exists() else f"{path} holds no LoRA: expected {FILE} or {PEFT_FILE}"
        )
    return candidates[0]


def _open(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a file, and the settings in its header or in adapter_config.json."""
    archive = open_archive(file)
    try:
        header = json.loads(archive.metadata.get(METADATA) or "{}")
    except (ValueError, RecursionError) as error:
        raise FolderError(f"{file}: {METADATA} of its header: {error}") from None
    if not isinstance(header, dict):
        raise FolderError(f"{file}: {METADATA} of its header should hold a JSON object")
    if not header and (file.stem == Path(PEFT_FILE).stem or needs_settings(archive.tensors)):
        config = read_json(file.parent / PEFT_CONFIG)
        header = {f"{part}.{key}": value for part in (UNET, TEXT) for key, value in config.items()}
    return archive.tensors, header


def _finite(key: str, tensor: Tensor, file: Path) -> Tensor:
    """The tensor itself. Raises FolderError unless it holds finite floating-point numbers."""
    if not tensor.is_floating_point():
        if key.endswith(".alpha") and not tensor.is_complex():
            return tensor.float()
        raise FolderError(f"{file}: {key} holds {str(tensor.dtype).removeprefix('torch.')}, which are not weights")
    if not bool((found := tensor.float()).isfinite().all()):
        broken = int((~found.isfinite()).sum())
        raise FolderError(
            f"{file}: {key} holds {broken} of {found.numel()} numbers that are not finite (NaN or infinity)"
        )
    return tensor


def _build(
    network: nn.Module, found: Mapping[str, Mapping[str, tuple[str, Tensor]]], settings: Mapping[str, Any], file: Path
) -> Lora:
    """The LoRA of one network from the tensors found for it.

    Raises FolderError for a shape that does not fit.
    """
    sizes: dict[str, tuple[int, float]] = {}
    for name, roles in found.items():
        for role in (DOWN, UP):
            if role not in roles:
                raise FolderError(
                    f"{file}: {next(iter(roles.values()))[0]} has no counterpart: the {role} of {name} is missing"
                )
        rank = roles[DOWN][1].shape[0] if roles[DOWN][1].ndim else 0
        if rank < 1:
            raise FolderError(
                f"{file}: {roles[DOWN][0]} is {list(roles[DOWN][1].shape)}: its first dimension is the rank"
            )
        sizes[name] = rank, _alpha(name, rank, roles.get(ALPHA), settings, file)
    with torch.device("meta"):
        lora = Lora(network, sizes)
    wanted = lora.state_dict()
    for name, roles in found.items():
        for role in (DOWN, UP):
            key, tensor = roles[role]
            shape = wanted[f"{name}.{role}.weight"].shape
            if _core(tensor.shape) != _core(shape):
                raise FolderError(
                    f"{file}: {key} is {list(tensor.shape)}, for this layer and rank it should be {list(shape)}"
                )
            wanted[f"{name}.{role}.weight"] = tensor.float().reshape(shape)
    lora.load_state_dict(wanted, assign=True)
    for name, change in lora.changes.items():
        _check_size(name, change, file)
    return lora.requires_grad_(False)


def _core(shape: torch.Size) -> tuple[int, ...]:
    """The shape without sides of a 1×1 kernel: such a convolution equals a linear layer."""
    return tuple(shape[:2]) if all(side == 1 for side in shape[2:]) else tuple(shape)


def _alpha(name: str, rank: int, own: tuple[str, Tensor] | None, settings: Mapping[str, Any], file: Path) -> float:
    """α of a layer: its own tensor, else the settings, else the rank.

    Raises FolderError where tensor and settings differ.
    """
    configured = alpha_of(name, rank, settings, str(file))
    if own is None:
        return float(rank) if configured is None else configured
    key, tensor = own
    if tensor.numel() != 1:
        raise FolderError(f"{file}: {key} should be one finite number, and is {list(tensor.shape)}")
    if configured is not None and configured != float(tensor):
        raise FolderError(f"{file}: {key} is {float(tensor):g}, the settings beside it say {configured:g}")
    return float(tensor)


def _check_size(name: str, change: LowRank, file: Path) -> None:
    """Raise FolderError where (α/r) B A may overflow float32."""
    a, b = (float(part.weight.detach().abs().max()) for part in (change.lora_A, change.lora_B))  # type: ignore[operator,union-attr]
    if not a * b * abs(change.alpha) < torch.finfo(torch.float32).max:
        raise FolderError(
            f"{file}: the change of {name} is not finite:"
            f" its weights are up to {a:g} and {b:g}, its α is {change.alpha:g}"
        )


def _usual_rank(lora: Lora) -> int:
    """The most common rank."""
    return Counter(change.rank for change in lora.changes.values()).most_common(1)[0][0]


def _peft_config(lora: Lora) -> dict[str, Any]:
    """peft's LoraConfig with α = r: the most common rank, and the layers that differ."""
    usual, changes = _usual_rank(lora), lora.changes
    others = {name: change.rank for name, change in changes.items() if change.rank != usual}
    return {
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": usual,
        "target_modules": sorted(changes),
        "rank_pattern": others,
        "alpha_pattern": others,
    }
