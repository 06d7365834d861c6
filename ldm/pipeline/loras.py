"""LoRAs of a model: read once, added for all calls or for one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from threading import RLock

import torch
from torch import nn

from ldm.config.sample import check_lora_scale
from ldm.files.disk import file_hash
from ldm.interop.lora import find_lora, read_lora
from ldm.models.lora import Lora

_READING = RLock()  # a LoRA that several threads ask for at once is read once


@dataclass
class Loras:
    """LoRAs of one model, by the paths that settings give them.

    Attributes:
        read_before: the changes of each network, by file, time and size.
        loaded: path and scale of each that every call has, live or merged, until the model is saved.
        live: those that are not merged, with their scale and what takes them off.
    """

    read_before: dict[tuple[Path, int, int], dict[str, Lora]] = field(default_factory=dict)
    loaded: list[tuple[str, float]] = field(default_factory=list)
    live: list[tuple[Lora, float, Callable[[], None]]] = field(default_factory=list)

    def read(self, path: str, networks: Mapping[str, nn.Module]) -> dict[str, Lora]:
        """The changes of each network by the LoRA at ``path``, not attached. Raises FolderError."""
        file = find_lora(path)
        version = file, file.stat().st_mtime_ns, file.stat().st_size  # a file that was written anew is read anew
        with _READING:
            if version not in self.read_before:
                found = read_lora(file, networks).items()
                self.read_before[version] = {part: lora.to(_device(networks[part])) for part, lora in found}
            return self.read_before[version]

    def load(self, path: str, scale: float, networks: Mapping[str, nn.Module]) -> None:
        """Attach the LoRA at ``path`` to the networks. Raises FolderError or ConfigError, and then changes nothing."""
        check_lora_scale(scale, path)
        self.live += [(lora, scale, lora.attach(scale)) for lora in self.read(path, networks).values()]
        self.loaded.append((path, scale))

    def merge(self) -> None:
        """Add the live LoRAs to the weights of their networks."""
        for lora, scale, detach in self.live:
            detach()
            lora.merge(scale)
        self.live.clear()

    def to(self, device: torch.device) -> None:
        """Move what was read."""
        for lora in (lora for loras in self.read_before.values() for lora in loras.values()):
            lora.to(device)

    def hash(self, digest: str) -> str:
        """sha256 of a model's hash and of the LoRAs loaded since its files were read; reads them."""
        for path, scale in self.loaded:
            digest = sha256(f"{digest} {file_hash(find_lora(path))} {scale}".encode()).hexdigest()
        return digest


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device
