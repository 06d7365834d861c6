"""Guidance wraps a denoiser: `model(x_t, t, cond)` in, `denoise(x_t, t)` out (math.md G1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.condition import Condition, concatenate
from ldm.diffusion.denoiser import Denoise

Model = Callable[[Tensor, Tensor, Condition], Tensor]  # model(x_t [b, …], t [b], cond) -> prediction [b, …]


def classifier_free(model: Model, cond: Condition, null_cond: Condition, scale: float) -> Denoise:
    """ε(∅) + γ (ε(c) − ε(∅)) (Ho & Salimans 2022; γ = their w + 1), the same for predictions of x_0 and v.

    Both halves are evaluated in one batch. γ = 1 is the conditional model and γ = 0 the unconditional one, each
    with the other evaluation left out. A negative prompt is a ``null_cond`` made from it. Channels beyond those of x_t
    (a learned variance) are the conditional model's.
    """
    if scale in (0.0, 1.0):
        return lambda x_t, t: model(x_t, t, cond if scale else null_cond)
    both = concatenate(null_cond, cond)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        without, with_ = model(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        c = x_t.shape[1]
        return torch.cat([without[:, :c] + scale * (with_ - without)[:, :c], with_[:, c:]], dim=1)

    return denoise
