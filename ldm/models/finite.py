"""Tensors that must hold numbers: which of them hold NaN or an infinity, found in one reading."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class NonFiniteError(RuntimeError):
    """A computation gave NaN or an infinity; the message names the part and the step."""

    exit_code = 5


def is_finite(tensor: Tensor) -> Tensor:
    """Whether every element is a number, as one element on the tensor's device, which is not waited for.

    By the least and the greatest element, of which NaN would be both: many times faster on a CPU than asking each element.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return torch.stack(torch.aminmax(wide.detach())).isfinite().all()


def finite(tensor: Tensor, what: str) -> Tensor:
    """The tensor itself. Raises NonFiniteError where it holds NaN or an infinity; a GPU is waited for."""
    if not is_finite(tensor):
        raise NonFiniteError(f"{what}: not finite (NaN or infinite)")
    return tensor


def nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those that hold NaN or an infinity. A GPU is waited for once."""
    flags = [is_finite(tensor) for tensor in tensors.values()]
    found: dict[torch.device, list[bool]] = {}
    for device in {flag.device for flag in flags}:
        found[device] = torch.stack([flag for flag in flags if flag.device == device]).tolist()
    answers = {device: iter(values) for device, values in found.items()}
    return [name for name, flag in zip(tensors, flags, strict=True) if not next(answers[flag.device])]


def counted(tensor: Tensor) -> str:
    """How many elements are NaN and how many infinite, in words."""
    nan, infinite = int(torch.isnan(tensor.float()).sum()), int(torch.isinf(tensor.float()).sum())
    parts = [f"{count:,} {what}" for count, what in ((nan, "NaN"), (infinite, "infinite")) if count]
    return f"{' and '.join(parts)} of {tensor.numel():,} values"
