"""The conditions of a denoiser: text, vectors, labels, further channels, ControlNet residuals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """The kinds of condition, each of which may be absent.

    Attributes:
        context: [b, l, d], attended to by cross-attention (text).
        vector: [b, d], added to the timestep embedding (pooled text, size).
        concat: [b, k, h, w], appended to the input channels (mask, low-resolution image).
        control: residuals added to the skip connections, in the order in which the encoder half
            makes them; the last one is added to the middle block's output (ControlNet).
        labels: [b], the index of a class, or a number such as a noise level; embedded, and added to
            the timestep embedding.
    """

    context: Float[Tensor, "b l d"] | None = None
    vector: Float[Tensor, "b v"] | None = None
    concat: Float[Tensor, "b k h w"] | None = None
    control: tuple[Tensor, ...] | None = None
    labels: Shaped[Tensor, " b"] | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        """Apply ``function`` to every tensor present."""

        def apply(value: Tensor | tuple[Tensor, ...] | None) -> Tensor | tuple[Tensor, ...] | None:
            if isinstance(value, tuple):
                return tuple(function(tensor) for tensor in value)
            return None if value is None else function(value)

        return Condition(**{f.name: apply(getattr(self, f.name)) for f in fields(self)})  # type: ignore[arg-type]


NO_CONDITION = Condition()


def concatenate(a: Condition, b: Condition) -> Condition:
    """Both conditions as one batch, ``a`` first.

    Raises ValueError unless they hold the same kinds.
    """

    def join(name: str) -> Tensor | tuple[Tensor, ...] | None:
        first, second = getattr(a, name), getattr(b, name)
        if (first is None) != (second is None):
            raise ValueError(f"only one of two conditions has {name}: they cannot be evaluated in one batch")
        if isinstance(first, tuple):
            return tuple(torch.cat(pair) for pair in zip(first, second, strict=True))
        return None if first is None else torch.cat([first, second])

    return Condition(**{f.name: join(f.name) for f in fields(Condition)})  # type: ignore[arg-type]
