"""Keeps numbers that are not finite out of a training: asked before each checkpoint, validation and export."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ldm.distributed.processes import Processes
from ldm.errors import UserError
from ldm.files.tensors.finite import nonfinite
from ldm.training.diagnostics.nonfinite import NonFiniteRecorder
from ldm.training.state import TrainingState
from ldm.training.step_flags import StepFlags

MAX_NONFINITE = 10  # non-finite updates in a row that end a training
ADVICE = "lower train.lr, or check the data"
_PARTS = {"model": "the weights", "optimizer": "the optimizer's moments"}  # by the first word of a group's name


class TrainingError(UserError):
    """Training cannot continue; the message says why and what was saved."""

    exit_code = 5
    everywhere = True


class FiniteGuard:
    """Keeps NaN and infinity out of weights, checkpoints and exports.

    The device skips an update that is not finite; the host learns of it one update later, records it, and ends the
    training after ``MAX_NONFINITE`` in a row.

    Args:
        patient: single updates that are not finite are expected and not recorded (float16's scaler).

    Attributes:
        skipped: updates in a row that were not finite, up to the last.
    """

    def __init__(
        self,
        state: TrainingState,
        flags: StepFlags,
        incidents: NonFiniteRecorder,
        processes: Processes,
        patient: bool,
    ) -> None:
        self._state, self._flags, self._incidents = state, flags, incidents
        self._processes, self.patient = processes, patient
        self.skipped = 0
        self._finite: int | None = None  # the last update after which the whole state was found finite

    def look_back(self, step: int) -> None:
        """Read whether update ``step`` − 1 (from 0) was finite, while the weights are still those that it had.

        Raises TrainingError.
        """
        finite = self._flags.receive()
        if finite is not False:
            self.skipped = self.skipped if finite is None else 0
            return
        self.skipped += 1
        if not self.patient or self.skipped == MAX_NONFINITE:
            self._incidents.record(step - 1, self.skipped == 1)
        if self.skipped == 1:
            self.require_finite(step)  # no later update would be finite
        if self.skipped >= MAX_NONFINITE:
            raise TrainingError(self.describe(step, f"`ldm replay {self._incidents.newest}` names the module"))

    def require_finite(self, step: int) -> None:
        """Raise TrainingError, on all processes, if any of them has NaN or infinity in its training state."""
        if self.known_finite(step):
            return
        problem = not_finite(self._state.tensors(), self._state.scalars(step))
        broken = next((one for one in self._processes.gather(problem) if one is not None), None)
        if broken is None:
            self._finite = step
        elif self._finite is None:
            advice = "check init" if step == 0 else "continue from an earlier checkpoint by --from"
            raise TrainingError(f"{broken} not finite at the start, after update {step}: {advice}")
        else:
            raise TrainingError(
                f"{broken} not finite after update {step - self.skipped} (after update {self._finite} all was finite):"
                f" this is neither saved nor exported, and earlier checkpoints stay; {ADVICE}"
            )

    def known_finite(self, step: int) -> bool:
        """True if the state after update ``step`` has been found finite."""
        return self._finite == step

    def describe(self, step: int, then: str) -> str:
        """A line on the updates that were skipped since the last that was not, as of update ``step``."""
        return (
            f"the last {self.skipped} updates were not finite, so the weights are those after update"
            f" {step - self.skipped}: {then}; {ADVICE}"
        )


def not_finite(groups: Mapping[str, Mapping[str, Tensor]], scalars: Mapping[str, Any]) -> str | None:
    """Name what is infinite or NaN in a training state, or None.

    An example: `the weights of unet (conv_in.weight and 3 more) are`. ``groups`` and ``scalars`` come from
    ``TrainingState``. Each tensor is read once, on its device, and the host waits once for each device.
    """
    for group, named in groups.items():
        if broken := nonfinite(named):
            kind, _, network = group.partition("_")
            part = f"{_PARTS[kind]} of {network}" if kind in _PARTS else "the averaged weights"
            return f"{part} ({_listed(broken)}) are"
    broken = [name for name, value in _numbers(scalars, "") if not math.isfinite(value)]
    return f"the state ({_listed(broken)}) is" if broken else None


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _numbers(tree: Any, path: str) -> Iterator[tuple[str, float]]:
    """Each number in nested mappings and lists, with its dotted name."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _numbers(value, f"{path}.{key}".lstrip("."))
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _numbers(value, path)
    elif isinstance(tree, float):
        yield path, tree
