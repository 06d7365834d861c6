"""All that a checkpoint keeps of a training, gathered from its parts and given back to them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.errors import CheckpointError, RunError
from ldm.runs import provenance as starts
from ldm.runs.checkpoints import files as checkpoint
from ldm.runs.checkpoints.folder import STATE
from ldm.training.best import BestModel
from ldm.training.ema import EMA
from ldm.training.task import Task


@dataclass(frozen=True)
class TrainingState:
    """Networks, optimizers, the average, the best so far, the loss scaler of float16 (None without), and the task's."""

    task: Task
    optimizers: Mapping[str, torch.optim.Optimizer]
    ema: EMA
    best: BestModel
    scaler: Any
    surroundings: Mapping[str, Any]  # versions, device and threads of this start

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """Groups of live tensors: whoever keeps them copies them."""
        groups: dict[str, Mapping[str, Tensor]] = {"ema": self.ema.state(), **self.best.tensors()}
        for name, network in self.task.networks.items():
            groups[f"model_{name}"] = network.state_dict()
            groups[f"optimizer_{name}"] = checkpoint.optimizer_tensors(self.optimizers[name], network)
        return groups

    def scalars(self, step: int) -> dict[str, Any]:
        """The state that is not a tensor, as JSON, after update ``step``."""
        scaler = None if self.scaler is None else self.scaler.state_dict()
        about = {"task": self.task.state(), "data": self._data(), "surroundings": dict(self.surroundings)}
        return {"step": step, **about, "best": self.best.state(), "scaler": scaler}

    def load(self, folder: Path) -> int:
        """Take over a checkpoint that has been verified; returns its update. Raises CheckpointError, RunError."""
        tensors, scalars = checkpoint.load(folder, verify=False)
        try:
            if "data" in scalars:  # older checkpoints lack it
                self._check_data(scalars["data"])
            self.task.load_state(scalars["task"])
            self.best.load(scalars.get("best"), tensors.get("best"))  # older checkpoints lack both
            step, scaler = int(scalars["step"]), scalars["scaler"]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if hasattr(error, "exit_code"):
                raise
            raise CheckpointError(
                f"{folder / STATE}: is not the state of this training ({type(error).__name__}: {error})"
            ) from None
        for name, network in self.task.networks.items():
            network.load_state_dict(tensors[f"model_{name}"])
            checkpoint.restore_optimizer(self.optimizers[name], network, tensors[f"optimizer_{name}"])
        self.ema.load(tensors["ema"])
        if changed := starts.changed(scalars.get("surroundings"), self.surroundings):
            warnings.warn(f"{changed}: the end may differ in the last bits from that of an unbroken run", stacklevel=1)
        if self.scaler is not None and scaler:
            self.scaler.load_state_dict(scaler)
        return step

    def _data(self) -> dict[str, Any]:
        """The data that is trained on."""
        train, validation = self.task.stream.source, self.task.validation.source
        return {"images": train.length, "train": train.fingerprint, "validation": validation.fingerprint}

    def _check_data(self, before: dict[str, Any]) -> None:
        """Refuse to continue with other images unless ``data.accept_changes`` is set."""
        now = self._data()
        if now != before and not self.task.stream.data.accept_changes:
            raise RunError(
                f"the images or captions have changed since this run began ({before['images']} training images then,"
                f" {now['images']} now):"
                " restore them, use another run: directory, or continue with them by data.accept_changes=true"
            )
