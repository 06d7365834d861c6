"""Are all numbers that a checkpoint keeps finite? Asked before each checkpoint, validation and export, and after a skipped update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ldm.files.tensors.finite import nonfinite

_PARTS = {"model": "the weights", "optimizer": "the optimizer's moments"}  # by the first word of a group's name


def not_finite(groups: Mapping[str, Mapping[str, Tensor]], scalars: Mapping[str, Any]) -> str | None:
    """Name what is infinite or NaN in a training state, as in `the weights of unet (conv_in.weight and 3 more) are`; None: nothing.

    ``groups`` and ``scalars`` as ``TrainingState`` gives them. Everything is read once on its device, and the host waits once for
    each device.
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
