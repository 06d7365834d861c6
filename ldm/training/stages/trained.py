"""The part of a diffusion model that is trained: all weights of its U-Net, or a LoRA of a frozen one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from ldm.config import DiffusionTrainingConfig, to_dict
from ldm.errors import FolderError
from ldm.interop.bundle import UNET
from ldm.interop.diffusers.lora_folder import Reference
from ldm.interop.lora import FILE as LORA_FILE
from ldm.interop.lora import write_lora
from ldm.models.lora import Lora
from ldm.models.unet import NetworkSpec, UNet
from ldm.pipeline import Pipeline
from ldm.pipeline.info import load_unet
from ldm.runs.checkpoints import folder as shelf
from ldm.training.placement import place
from ldm.training.stages.finetune import check_initial, grown, initial_unet
from ldm.training.task import seeded


@runtime_checkable
class Trained(Protocol):
    """Weights that are optimised, and the U-Net that computes with them."""

    unet: UNet
    network: nn.Module  # its parameters are optimised, averaged and saved; called like the U-Net
    summary: list[str]  # lines to print once, before training

    def to(self, device: torch.device) -> None:
        """Move what is frozen; the loop places ``network``."""
        ...

    def initialize(self) -> None:
        """Load the weights of ``init``; called only if no checkpoint replaces them."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON state: hashes of the weights that the run started from."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Load a ``state()``. Raises FolderError where frozen weights have changed since."""
        ...

    def export(self, folder: Path, pipeline: Callable[[], Pipeline]) -> None:
        """Write a model folder; ``pipeline`` makes the whole model with its current weights."""
        ...


def make_trained(config: DiffusionTrainingConfig, spec: NetworkSpec, text: Any) -> Trained:
    """Make what the configuration trains; ``spec``: its U-Net, ``text``: its text encoder or None."""
    return AllWeights(config, spec, text) if config.train.lora is None else LoraWeights(config, spec, text)


class AllWeights:
    """A U-Net trained whole, from random weights or from those of ``init``."""

    def __init__(self, config: DiffusionTrainingConfig, spec: NetworkSpec, text: Any) -> None:
        self._read_init = None if config.init is None else partial(check_initial, config, spec, text)
        resumed = bool(shelf.steps(Path(config.run) / "checkpoints"))
        self._initial = None if resumed or self._read_init is None else self._read_init()  # before anything slow
        self._initial_hash: str | None = None  # of the weights that the U-Net began with
        self.unet = seeded(config.train.seed, spec.make)
        self.network: nn.Module = self.unet
        self.summary: list[str] = []

    def to(self, device: torch.device) -> None:
        """Nothing is frozen."""

    def initialize(self) -> None:
        if self._read_init is None:
            return
        initial = self._initial or self._read_init()
        self.unet.load_state_dict(grown(load_unet(initial).state_dict(), self.unet))
        self._initial_hash = initial.hash

    def state(self) -> dict[str, Any]:
        return {} if self._initial_hash is None else {"init": self._initial_hash}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._initial_hash = state.get("init")

    def export(self, folder: Path, pipeline: Callable[[], Pipeline]) -> None:
        pipeline().save_pretrained(folder)


class LoraWeights:
    """Low-rank changes of the frozen U-Net of ``init``."""

    def __init__(self, config: DiffusionTrainingConfig, spec: NetworkSpec, text: Any) -> None:
        self.config, self._has_text, lora = config, text is not None, config.train.lora
        assert lora is not None
        self._base = check_initial(config, spec, text)
        self._base_hash = self._base.hash  # of all its weights: once, for it takes seconds where they are large
        self.unet = initial_unet(self._base, config.train.mixed_precision)
        self._lora = seeded(config.train.seed, lambda: Lora.fresh(self.unet, lora))
        self.network: nn.Module = self._lora
        self._lora.attach()
        parameters = sum(p.numel() for p in self._lora.parameters())
        layers = len(self._lora.changes)
        self.summary = [f"trained: LoRA of {parameters / 1e6:.3f} M parameters in {layers} of its layers"]

    def to(self, device: torch.device) -> None:
        place(self.unet, replace(self.config.train, compile=False), device)  # it is compiled as a part of the LoRA

    def initialize(self) -> None:
        """The changes begin at zero."""

    def state(self) -> dict[str, Any]:
        return {"base": self._base_hash}

    def load_state(self, state: Mapping[str, Any]) -> None:
        if state["base"] != self._base_hash:
            raise FolderError(
                f"init {self.config.init}: its weights have changed since this run began: bring them back, or begin"
                " anew"
            )

    def export(self, folder: Path, pipeline: Callable[[], Pipeline]) -> None:
        """The LoRA alone, with the name of the model that it changes."""
        config = self.config
        write_lora({UNET: self._lora}, folder / LORA_FILE)
        extra = {"sample_size": config.data.image_size, "defaults": to_dict(config.sample)}
        extra["caption_dropout"] = config.caption_dropout if self._has_text else None
        Reference(folder, self._base.path, self._base_hash, extra).write()
