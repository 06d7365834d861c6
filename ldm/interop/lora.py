"""LoRA files: read in the layouts of diffusers, peft and kohya-ss, written as diffusers reads them.

A layer has many names. All of them are made from the network's own, so that a key is either one of them or refused.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.interop.archive.archive import open_archive, write_tensors
from ldm.interop.bundle import TEXT, UNET
from ldm.interop.files import FolderError, read_json
from ldm.models.lora import Lora, changeable

FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
METADATA = "lora_adapter_metadata"  # entry of the header: peft's LoraConfig of each network, as JSON
TOWER = "text_model."  # before a layer of the text encoder
NAMES = (FILE, PEFT_FILE, "pytorch_lora_weights.bin", "adapter_model.bin")  # in a folder, the first that is there

DOWN, UP, ALPHA = "lora_A", "lora_B", "alpha"
ENDINGS = {
    ".lora_A.weight": DOWN, ".lora_B.weight": UP, ".lora_A.default.weight": DOWN, ".lora_B.default.weight": UP,  # peft
    ".lora.down.weight": DOWN, ".lora.up.weight": UP, ".lora_linear_layer.down.weight": DOWN, ".lora_linear_layer.up.weight": UP,
    ".lora_down.weight": DOWN, ".lora_up.weight": UP,  # kohya-ss
    ".down.weight": DOWN, ".up.weight": UP,  # after `processor.to_q_lora`
    ".alpha": ALPHA,
}  # fmt: skip
OTHERS = {  # parts of a key: what is no LoRA as it was published
    ".dora_scale": "DoRA", ".lora_magnitude_vector": "DoRA", ".hada_": "LoHa", ".lokr_": "LoKr", ".lora_mid": "a LoRA with a middle tensor",
    ".diff": "whole differences", ".bias": "a LoRA with biases", "lora_te2_": "a second text encoder (SDXL)",
}  # fmt: skip
Place = tuple[str, str]  # UNET or TEXT, and the layer's name there
Found = dict[Place, dict[str, tuple[str, Tensor]]]  # for each layer and DOWN, UP, ALPHA: the key and the tensor


def read_lora(path: str | Path, networks: Mapping[str, nn.Module]) -> dict[str, Lora]:
    """The changes in a LoRA file for each of ``networks`` (UNET; TEXT: the tower), frozen, float32, not yet attached.

    ``path``: the file, a folder that holds one, or a run. Every tensor is used. Raises FolderError naming the file and the key.
    """
    file = find_lora(path)
    tensors, header = _open(file)
    table = {stem: (part, name) for part, network in networks.items() for name in changeable(network) for stem in stems(part, name)}
    found: Found = {}
    for key, tensor in tensors.items():
        place, role = _place_of(key, table, file)
        if role in (roles := found.setdefault(place, {})):
            raise FolderError(f"{file}: {key} and {roles[role][0]} are for the same layer")
        roles[role] = key, tensor
    if not found:
        raise FolderError(f"{file} holds no tensor")
    loras = {}
    for part, network in networks.items():
        mine = {name: roles for (p, name), roles in found.items() if p == part}
        if mine:
            loras[part] = _build(network, mine, _settings(part, header, file), file)
    return loras


def write_lora(loras: Mapping[str, Lora], file: Path) -> None:
    """Write the changes of each network as diffusers' ``load_lora_weights`` reads them, rank and α of each layer in the header."""
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for part, lora in loras.items():
        prefix = f"{part}.{TOWER if part == TEXT else ''}"
        tensors |= {prefix + name: tensor.detach().cpu().contiguous() for name, tensor in lora.state_dict().items()}
        about |= {f"{part}.{key}": value for key, value in _peft_config(lora).items()}
    write_tensors(file, tensors, {METADATA: json.dumps(about, indent=2, sort_keys=True)})


def find_lora(path: str | Path) -> Path:
    """The LoRA file of a folder or run, or the file itself. Raises FolderError saying what is there instead."""
    path = Path(path)
    if path.is_file():
        candidates = [path]
    else:
        candidates = [file for folder in (path, path / "model") for name in NAMES if (file := folder / name).is_file()]
    if not candidates:
        scale = f" (or {path.name.rpartition(':')[2]!r} should be a number, its scale)" if ":" in path.name else ""
        raise FolderError(f"no LoRA {path}{scale}" if not path.exists() else f"{path} holds no LoRA: expected {FILE} or {PEFT_FILE}")
    return candidates[0]


def stems(part: str, name: str) -> Iterator[str]:
    """All that a layer of a network is called before the endings of its tensors."""
    for whole in (name,) if part == UNET else (name, TOWER + name):
        for plain in (whole, _old(whole)):
            if plain is not None:
                yield from (plain, f"{part}.{plain}", f"base_model.model.{plain}")
        flat = whole.replace(".", "_")
        yield from (f"{kohya}_{flat}" for kohya in (("lora_unet",) if part == UNET else ("lora_te", "lora_te1")))


_OLD = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}
_OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def _old(name: str) -> str | None:
    """The name of an attention's layer from before peft; None for other layers."""
    for names, between in ((_OLD, ".processor."), (_OLD_TEXT, ".")):
        for new, old in names.items():
            if name.endswith("." + new):
                return f"{name.removesuffix('.' + new)}{between}{old}_lora"
    return None


def _open(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a file, and what it or the adapter_config.json beside it says of itself."""
    archive = open_archive(file)
    try:
        header = json.loads(archive.metadata.get(METADATA) or "{}")
    except ValueError as error:
        raise FolderError(f"{file}: {METADATA} of its header: {error}") from None
    if not isinstance(header, dict):
        raise FolderError(f"{file}: {METADATA} of its header should hold a JSON object")
    if not header and file.stem == Path(PEFT_FILE).stem:
        config = read_json(file.parent / PEFT_CONFIG)
        header = {f"{part}.{key}": value for part in (UNET, TEXT) for key, value in config.items()}
    return archive.tensors, header


def _place_of(key: str, table: Mapping[str, Place], file: Path) -> tuple[Place, str]:
    """The layer that a key changes, and which of its tensors it is."""
    for part, kind in OTHERS.items():
        if part in key:
            raise FolderError(f"{file}: {key}: {kind} is not offered, only LoRA")
    for ending, role in ENDINGS.items():
        if key.endswith(ending) and (place := table.get(key.removesuffix(ending))) is not None:
            return place, role
    stem = next((key.removesuffix(ending) for ending in ENDINGS if key.endswith(ending)), key)
    near = difflib.get_close_matches(stem, table, n=1)
    raise FolderError(f"{file}: {key} changes no layer of this model" + (f" (the nearest is called {near[0]})" if near else ""))


def _build(network: nn.Module, found: Mapping[str, Mapping[str, tuple[str, Tensor]]], settings: Mapping[str, Any], file: Path) -> Lora:
    """The changes of one network, all shapes checked."""
    sizes: dict[str, tuple[int, float]] = {}
    for name, roles in found.items():
        for role in (DOWN, UP):
            if role not in roles:
                raise FolderError(f"{file}: {next(iter(roles.values()))[0]} has no counterpart: the {role} of {name} is missing")
        rank = roles[DOWN][1].shape[0] if roles[DOWN][1].ndim else 0
        if rank < 1:
            raise FolderError(f"{file}: {roles[DOWN][0]} is {list(roles[DOWN][1].shape)}: its first dimension is the rank")
        sizes[name] = rank, _alpha(name, rank, roles.get(ALPHA), settings, file)
    with torch.device("meta"):
        lora = Lora(network, sizes)
    wanted = lora.state_dict()
    for name, roles in found.items():
        for role in (DOWN, UP):
            key, tensor = roles[role]
            shape = wanted[f"{name}.{role}.weight"].shape
            if _core(tensor.shape) != _core(shape):
                raise FolderError(f"{file}: {key} is {list(tensor.shape)}, for this layer and rank it should be {list(shape)}")
            wanted[f"{name}.{role}.weight"] = tensor.float().reshape(shape)
    lora.load_state_dict(wanted, assign=True)
    return lora.requires_grad_(False)


def _core(shape: torch.Size) -> tuple[int, ...]:
    """A 1×1 convolution and a linear layer may stand for each other."""
    return tuple(shape[:2]) if all(side == 1 for side in shape[2:]) else tuple(shape)


def _alpha(name: str, rank: int, own: tuple[str, Tensor] | None, settings: Mapping[str, Any], file: Path) -> float:
    """α of a layer: its own tensor, or the header's, or the rank. rsLoRA divides by √rank: told as an α that does."""
    said = None
    if settings:
        wanted = _of_layer(name, settings.get("rank_pattern"), settings.get("r", rank), file)
        if wanted != rank:
            raise FolderError(f"{file}: {name} has rank {rank}, its settings say {wanted}")
        said = float(_of_layer(name, settings.get("alpha_pattern"), settings.get("lora_alpha", rank), file))
        if settings.get("use_rslora"):
            said *= rank**0.5
    if own is None:
        return float(rank) if said is None else said
    key, tensor = own
    if tensor.numel() != 1 or not bool(tensor.isfinite().all()):
        raise FolderError(f"{file}: {key} should be one finite number")
    if said is not None and said != float(tensor):
        raise FolderError(f"{file}: {key} is {float(tensor):g}, the settings beside it say {said:g}")
    return float(tensor)


def _of_layer(name: str, pattern: Any, otherwise: Any, file: Path) -> Any:
    """The value of a layer in one of peft's patterns, whose keys are names or ends of names."""
    value = otherwise
    for key, special in (pattern or {}).items():
        end = str(key).removeprefix("^").removesuffix("$").removeprefix(TOWER)
        if set(end) & set("\\[](){}*+?|^$"):
            raise FolderError(f"{file}: the pattern {key!r} in its settings is not offered, only names of layers")
        if name == end or name.endswith("." + end):
            value = special
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FolderError(f"{file}: its settings give {name} {value!r}, which is no number")
    return value


def _settings(part: str, header: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """peft's LoraConfig of one network; empty where the file has none."""
    mine = {key.removeprefix(f"{part}."): value for key, value in header.items() if key.startswith(f"{part}.")}
    for key, kind in (("use_dora", "DoRA"), ("lora_bias", "a LoRA with biases"), ("modules_to_save", "layers saved whole")):
        if mine.get(key):
            raise FolderError(f"{file}: {key} in its settings: {kind} is not offered, only LoRA")
    return mine


def _peft_config(lora: Lora) -> dict[str, Any]:
    """peft's LoraConfig: the most frequent rank and α, and the layers that differ."""
    changes = lora.changes
    rank, alpha = (Counter(values).most_common(1)[0][0] for values in zip(*((c.rank, c.alpha) for c in changes.values()), strict=True))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(changes),
        "rank_pattern": {name: change.rank for name, change in changes.items() if change.rank != rank},
        "alpha_pattern": {name: change.alpha for name, change in changes.items() if change.alpha != alpha},
    }
