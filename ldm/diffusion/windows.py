"""Overlapping windows fused into one prediction: samples larger than those of training (docs/equations.md C5).

MultiDiffusion (Bar-Tal et al. 2023) steps each window and averages the results. Every deterministic
solver is affine in the prediction, so this is one step with the averaged prediction: a model is
wrapped, and samplers, guidance and masks work as they are. A stochastic sampler draws one noise for
the whole sample, where an average of steps would draw too little.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ldm.diffusion.condition import Condition
from ldm.diffusion.guidance import Model


@dataclass(frozen=True)
class Windows:
    """Windows that cover a sample [h, w]; the last one along an axis ends at the edge.

    Attributes:
        side: of a window in diffused pixels, on both axes; an axis that is shorter has one window.
        stride: distance of two windows, at most ``side``.
        circular: whether the sample is closed, (top to bottom, left to right): windows continue at
            the other end.

    Raises ValueError for a stride outside 1 … ``side``.
    """

    side: int
    stride: int
    circular: tuple[bool, bool] = (False, False)

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.side:
            raise ValueError(f"the stride of windows must lie between 1 and their side {self.side}, got {self.stride}")

    def places(self, height: int, width: int) -> Iterator[tuple[Int[Tensor, " rows"], Int[Tensor, " columns"]]]:
        """Rows and columns of each window of a sample of this size."""
        down, across = (self._along(n, closed) for n, closed in zip((height, width), self.circular, strict=True))
        return ((rows, columns) for rows in down for columns in across)

    def _along(self, length: int, closed: bool) -> list[Int[Tensor, " positions"]]:
        side = min(self.side, length)
        if closed and length > side:
            starts = range(0, length, self.stride)
        else:
            starts = [*range(0, length - side, self.stride), length - side]
        return [(start + torch.arange(side)) % length for start in starts]


def windowed(model: Model, windows: Windows) -> Model:
    """The model whose prediction is the mean of its predictions of all windows, each evaluated as a batch of its own.

    A window counts less towards its edges (a tent), so that it fades into its neighbours. Further
    channels of the condition are cut like the sample.
    """

    def fused(x_t: Float[Tensor, "b c h w"], t: Tensor, cond: Condition) -> Float[Tensor, "b o h w"]:
        total: Tensor | None = None
        weights = x_t.new_zeros(x_t.shape[-2:])
        for rows, columns in windows.places(*x_t.shape[-2:]):
            place = (..., rows[:, None].to(x_t.device), columns.to(x_t.device))
            pred = model(x_t[place], t, _cut(cond, place))
            weight = _tent(len(rows), pred)[:, None] * _tent(len(columns), pred)
            if total is None:
                total = pred.new_zeros((*pred.shape[:2], *x_t.shape[-2:]))
            total[place] += weight * pred
            weights[place] += weight.to(weights.dtype)
        assert total is not None
        return total / weights.to(total.dtype)

    return fused


def _tent(side: int, like: Tensor) -> Float[Tensor, " side"]:
    """1, 2, …, 2, 1 divided by its highest value."""
    rising = torch.arange(1, side + 1, device=like.device, dtype=like.dtype)
    tent = torch.minimum(rising, rising.flip(0))
    return tent / tent.max()


def _cut(cond: Condition, place: tuple) -> Condition:
    """The condition of one window. Raises ValueError for residuals of a ControlNet, which cannot be cut."""
    if cond.control is not None:
        raise ValueError("windows cannot cut the residuals of a ControlNet: compute them for each window")
    return cond if cond.concat is None else dataclasses.replace(cond, concat=cond.concat[place])
