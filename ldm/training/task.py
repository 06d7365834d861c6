"""Interfaces between a stage, the loop and the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from ldm.data.dataset import Batch, Stream

N = TypeVar("N", bound=nn.Module)
Networks: TypeAlias = Mapping[str, Callable[..., Any]]
AVERAGE = "average"


@runtime_checkable
class Reporter(Protocol):
    """Prints progress for the user."""

    def say(self, text: str) -> None: ...

    def progress(self, step: int, steps: int, values: Mapping[str, float]) -> None: ...


@runtime_checkable
class Task(Protocol):
    """One stage of training: networks, data, and the contribution of one micro-batch."""

    networks: dict[str, nn.Module]  # trained, each by an optimizer of its own
    averaged: str  # the network that the EMA follows
    stream: Stream
    validation: Stream

    @property
    def summary(self) -> list[str]:
        """Lines to print once, before training."""
        ...

    def lr_scale(self, network: str) -> float:
        """Learning rate of a network relative to the run's."""
        ...

    def to(self, device: torch.device) -> None:
        """Move frozen networks and tables."""
        ...

    def initialize(self) -> None:
        """Data-dependent initialisation; called on the device, and only where no checkpoint replaces the weights."""
        ...

    def micro_step(
        self, networks: Networks, batch: Batch, update: int, backward: Callable[[Tensor], None]
    ) -> dict[str, Tensor]:
        """Call ``backward`` on the loss of one micro-batch (a mean); return scalars to log, detached.

        ``networks``: those of the task, ready to be called: on the device, in DistributedDataParallel where several
        processes train. And in training, though not in a replay, ``AVERAGE``: the network ``averaged`` with the
        weights of its EMA, without gradient.
        """
        ...

    def after_update(self, update: int, reduce: Callable[[Tensor], Tensor], finite: Tensor) -> None:
        """Update what depends on the whole global batch; ``reduce`` averages a tensor over processes.

        Where ``finite`` (a bool on the device) is false the update was skipped, and ``state`` must not change.
        """
        ...

    def state(self) -> dict[str, Any]:
        """JSON state of the task beyond its networks."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Load a ``state()``."""
        ...

    def validate(self, update: int, gather: Callable[[Tensor], Tensor], rank: int, processes: int) -> dict[str, Any]:
        """Metrics on the validation set, with the EMA weights in place; every process takes part."""
        ...

    def previews(self) -> dict[str, np.ndarray]:
        """Image grids, uint8 [h, w, c], with the EMA weights in place; main process only."""
        ...

    def export(self, folder: Path) -> None:
        """Write the model folder, with the EMA weights in place; main process only."""
        ...


def seeded(seed: int, make: Callable[[], N]) -> N:
    """Build a network whose initial weights depend on ``seed`` alone; the global generator does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        return make()
