"""Flags that all ranks agree on: stop requested, update finite."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class StepFlags:
    """One small reduction an update, whose result is used on the device at once and read by the host an update later.

    So the host never waits for the device because of it. ``reduce`` adds a tensor up over processes.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self._reduce, self._device = reduce, device
        self._pending: Tensor | None = None  # on its way to the host
        self._arrived = torch.cuda.Event() if device.type == "cuda" else None
        self.stop = False  # any process was asked to stop, as last read

    def send(self, asked: bool, finite: Tensor) -> Tensor:
        """Send this process's flags; returns a bool on the device: the update was finite on every process."""
        mine = torch.stack([torch.full((), float(asked), device=self._device), (~finite).float()])
        everyone = self._reduce(mine)
        self._pending = torch.empty(2, pin_memory=self._arrived is not None).copy_(everyone, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()
        return everyone[1] == 0

    @property
    def at_hand(self) -> bool:
        """True if ``receive`` right after ``send`` does not wait: on any device but a GPU."""
        return self._arrived is None

    def receive(self) -> bool | None:
        """Return True if the last update sent was finite on all processes, None if that was read already.

        Sets ``stop``.
        """
        if self._pending is None:
            return None
        if self._arrived is not None:
            self._arrived.synchronize()
        asked, broken = self._pending.tolist()
        self._pending, self.stop = None, self.stop or asked > 0
        return broken == 0
