"""Watches sampling for NaN and infinities, and names the first part and step with one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.samplers.nodes import Callback
from ldm.errors import NonFiniteError
from ldm.files.tensors.finite import is_finite

EVERY = 16  # steps on a GPU between two checks, each of which waits for it
HALF = (torch.float16, torch.bfloat16)


class Watch:
    """Checks tensors in the order in which they are computed; waits for the device only in ``check``."""

    def __init__(self, steps: int, dtype: torch.dtype) -> None:
        self.steps, self.step = steps, 1
        self._hint = ""
        if dtype in HALF:
            wider = "bfloat16 or float32" if dtype == torch.float16 else "float32"
            self._hint = f" (its weights are {str(dtype).removeprefix('torch.')}: take dtype {wider})"
        self._names: list[str] = []
        self._flags: list[Tensor] = []

    def see(self, what: str, tensor: Tensor, at_step: bool = True) -> Tensor:
        """Note the tensor as ``what``, to be checked later; returns it."""
        self._names.append(f"{what} at step {self.step} of {self.steps}" if at_step else what)
        self._flags.append(is_finite(tensor))
        return tensor

    def watched(self, what: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The function, with each result noted as ``what``."""
        return lambda *arguments: self.see(what, function(*arguments))

    def check(self) -> None:
        """Raise NonFiniteError naming the first tensor that is not finite of those noted since the last call."""
        names, flags = self._names, self._flags
        self._names, self._flags = [], []
        if flags and not bool((finite := torch.stack(flags)).all()):
            first = names[finite.tolist().index(False)]
            raise NonFiniteError(f"{first} is not finite (NaN or infinite): no picture is drawn{self._hint}")

    def after_step(self, callback: Callback | None) -> Callback:
        """A sampler's callback that calls ``callback`` and notes the sample after each step."""

        def after(step: int, x: Tensor, x0: Tensor) -> Tensor | None:
            given = callback(step, x, x0) if callback else None
            self.see("the sample", x if given is None else given)
            self.step = step + 2
            if x.device.type == "cpu" or self.step % EVERY == 0:
                self.check()
            return given

        return after


def unseen(what: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function itself: takes the place of ``Watch.watched`` where nothing is watched."""
    return function
