"""The exponential moving average of a model's weights, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ldm.runs.checkpoints.files import CheckpointError


class EMA:
    """Shadow weights ``s ← s + (1 − d)·(w − s)`` with d = min(decay, (1 + k) / (10 + k)) at update k.

    The ramp lets the average forget the random start. Parameters are kept in float32, persistent buffers are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"the EMA decay must lie in [0, 1), got {decay}")
        self.model, self.decay = model, decay
        names, buffers = [name for name, _ in model.named_parameters()], _buffers(model)
        self._shadow = dict(
            zip(names, [p.detach().to(torch.float32, copy=True) for p in model.parameters()], strict=True)
        )
        self._buffers = {name: b.detach().clone() for name, b in buffers.items()}

    @torch.no_grad()
    def update(self, step: int, finite: Tensor | None = None) -> None:
        """Add the model's weights after update ``step`` to the average.

        Where ``finite`` (a bool on the device) is false nothing changes.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = [p.detach().float() for p in self.model.parameters()]
        share = torch.tensor(1.0 - decay) if finite is None else (1.0 - decay) * finite.float()
        shadow = list(self._shadow.values())
        shares = [share.to(s.device) for s in shadow]
        torch._foreach_lerp_(shadow, weights, shares)  # pyright: ignore[reportPrivateImportUsage]
        for name, buffer in _buffers(self.model).items():
            self._buffers[name].copy_(buffer)

    @torch.no_grad()
    def copy_to(self, model: nn.Module, held: Mapping[str, Tensor] | None = None) -> None:
        """Write the averaged weights, or those of an earlier ``state()``, into ``model``, in its dtype."""
        held = self.state() if held is None else held
        live = {**dict(model.named_parameters()), **_buffers(model)}
        _same_names(held, live, "the model")
        for name, target in live.items():
            target.copy_(held[name])

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> Any:
        """The output of the model with the averaged weights, which it has for this call alone; without gradient."""
        return functional_call(self.model, self.state(), inputs)

    @contextmanager
    def swap(self, model: nn.Module, held: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Put weights into ``model``, as ``copy_to`` does, for the block, and restore its own afterwards."""
        live = [*model.parameters(), *_buffers(model).values()]
        own = [tensor.detach().clone() for tensor in live]
        try:
            self.copy_to(model, held)
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(live, own, strict=True):
                    tensor.copy_(value)

    def state(self) -> dict[str, Tensor]:
        """The averaged weights and the buffers by name: live tensors, which a caller copies to keep."""
        return {**self._shadow, **self._buffers}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load a ``state()``. Raises CheckpointError unless names and shapes are the same."""
        held = self.state()
        _same_names(tensors, held, "the model")
        for name, tensor in held.items():
            if tensors[name].shape != tensor.shape:
                raise CheckpointError(
                    f"EMA: {name} has shape {tuple(tensors[name].shape)}, the model's is {tuple(tensor.shape)}"
                )
        for name, tensor in held.items():
            tensor.copy_(tensors[name])


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers of ``model``."""
    saved = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _same_names(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], whose: str) -> None:
    if lacking := sorted(set(expected) - set(given)):
        raise CheckpointError(f"EMA: {lacking[0]} of {whose} is missing ({len(lacking)} in all)")
    if extra := sorted(set(given) - set(expected)):
        raise CheckpointError(f"EMA: {extra[0]} is not a weight of {whose} ({len(extra)} in all)")
