"""The targets of a network's prediction as one table (docs/equations.md P4, L2, G2).

Every target is a combination of the two parts of x_t = a x_0 + s ε:

    prediction = (p ε + q x_0) / r

with p, q and r functions of (a, s): ε, x_0, v = a ε − s x_0 (Salimans & Ho 2022), the score −ε/s,
and the velocity ε − x_0 of rectified flow (Liu et al. 2023). Everything that depends on the target
follows from its row: the training target, x̂_0 and ε̂ of a prediction, the prediction for an x̂_0,
the ratio of squared errors, and the change of a prediction with its score. A new target is a row
here and its name in ``ldm.config.TARGETS``.

``a`` and ``s`` are passed by the caller, with the dtype and number of dimensions of the tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Coefficient = Tensor | float | int


class Row(NamedTuple):
    """The coefficients of a target at one (a, s).

    Those that do not depend on (a, s) are numbers: terms with 0 are left out, factors of 1 too.

    Attributes:
        p, q, r: prediction = (p ε + q x_0) / r.
        det: a p − s q, the determinant of (x_0, ε) → (x_t, r · prediction), simplified for v by
            a² + s² = 1.
    """

    p: Coefficient
    q: Coefficient
    r: Coefficient
    det: Coefficient


TABLE: dict[str, Callable[[Coefficient, Coefficient], Row]] = {
    "eps": lambda a, s: Row(p=1, q=0, r=1, det=a),
    "x0": lambda a, s: Row(p=0, q=1, r=1, det=-s),
    "v": lambda a, s: Row(p=a, q=-s, r=1, det=1),
    "score": lambda a, s: Row(p=1, q=0, r=-s, det=a),
    "flow": lambda a, s: Row(p=1, q=-1, r=1, det=a + s),
}

# (det / (s r))² as functions of the SNR alone, with a²/s² = SNR and 1/s² = SNR + 1. The weights of the loss are made of
# them, and computed from det, s and r they would differ in the last bit: runs would not resume exactly.
_ERROR_RATIOS: dict[str, Callable[[Tensor], Tensor]] = {
    "eps": lambda snr: snr,
    "x0": torch.ones_like,
    "v": lambda snr: snr + 1,
    "score": lambda snr: snr * (snr + 1),
    "flow": lambda snr: (snr.sqrt() + 1).square(),
}


def combine(
    name: str, x0: Float[Tensor, "b *d"], eps: Float[Tensor, "b *d"], a: Coefficient, s: Coefficient
) -> Float[Tensor, "b *d"]:
    """The prediction of a network that knows x_0 and ε: what it is trained towards."""
    row = TABLE[name](a, s)
    return _divided(_sum((row.p, eps), (row.q, x0)), row.r)


def to_x0(
    name: str, prediction: Float[Tensor, "b *d"], x_t: Float[Tensor, "b *d"], a: Coefficient, s: Coefficient
) -> Float[Tensor, "b *d"]:
    """x̂_0 of a prediction (P4). A multiple of ε says nothing of x_0 where a is 0 (``blind``)."""
    row = TABLE[name](a, s)
    if absent(row.p):  # x_0 itself
        return prediction
    if absent(row.q):
        return (x_t - s * to_eps(name, prediction, x_t, a, s)) / a
    return _divided(_sum((row.p, x_t), (-s * row.r, prediction)), row.det)


def to_eps(
    name: str, prediction: Float[Tensor, "b *d"], x_t: Float[Tensor, "b *d"], a: Coefficient, s: Coefficient
) -> Float[Tensor, "b *d"]:
    """ε̂ of a prediction (P4). An x_0 prediction needs s > 0."""
    row = TABLE[name](a, s)
    if absent(row.q):  # ε times a number
        return _sum((row.r, prediction))
    if absent(row.p):
        return (x_t - a * prediction) / s
    return _divided(_sum((a * row.r, prediction), (-row.q, x_t)), row.det)


def from_x0(
    name: str, x0: Float[Tensor, "b *d"], x_t: Float[Tensor, "b *d"], a: Coefficient, s: Coefficient
) -> Float[Tensor, "b *d"]:
    """The prediction that amounts to x̂_0: (p x_t − det x̂_0) / (s r) (P4).

    For all but x_0 it needs s > 0.
    """
    row = TABLE[name](a, s)
    if absent(row.p):
        return x0
    return _divided(_sum((row.p, x_t), (-row.det, x0)) / s, row.r)


def error_ratio(name: str, snr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """‖Δprediction‖² / ‖Δx_0‖² at one x_t (L2).

    SNR for ε, 1 for x_0, SNR + 1 for v, SNR (SNR + 1) for the score.
    """
    return _ERROR_RATIOS[name](snr)


def per_score(name: str, a: Float[Tensor, "*b"], s: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """dprediction/dscore at one x_t, −s det/(a r) (G2).

    −s for ε, s²/a for x_0, −s/a for v, 1 for the score.
    """
    row = TABLE[name](a, s)
    return -s / row.r if absent(row.q) else -s * row.det / a


def blind(name: str) -> bool:
    """True if a prediction says nothing of x_0 where no signal is left: det is 0 at a = 0."""
    return bool(TABLE[name](0.0, 1.0).det == 0)


def absent(coefficient: Coefficient) -> bool:
    """True for the number 0: its term is left out."""
    return not isinstance(coefficient, Tensor) and coefficient == 0


def _sum(*terms: tuple[Coefficient, Tensor]) -> Tensor:
    """Σ coefficient · tensor, without the terms of a 0 and without multiplying by 1."""
    kept = [_times(coefficient, x) for coefficient, x in terms if not absent(coefficient)]
    return kept[0] if len(kept) == 1 else kept[0] + kept[1]


def _times(coefficient: Coefficient, x: Tensor) -> Tensor:
    return x if not isinstance(coefficient, Tensor) and coefficient == 1 else coefficient * x


def _divided(x: Tensor, divisor: Coefficient) -> Tensor:
    return x if not isinstance(divisor, Tensor) and divisor == 1 else x / divisor
