"""Tensors that must hold numbers: which of them hold NaN or an infinity, found in one reading."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ldm.errors import NonFiniteError


def is_finite(tensor: Tensor) -> Tensor:
    """One element, true if every element is a finite number, on the tensor's device without waiting for it.

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
    """The names of those that hold NaN or an infinity. A GPU is waited for once for each type of element."""
    ends: dict[tuple[torch.device, torch.dtype], dict[str, tuple[Tensor, Tensor]]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() > 0:
            wide = (tensor.float() if tensor.dtype.itemsize == 1 else tensor).detach()
            least, greatest = torch.aminmax(wide)
            ends.setdefault((wide.device, wide.dtype), {})[name] = (least, greatest)
    found: set[str] = set()
    for named in ends.values():  # asked of all together, for each question costs more than a small tensor's answer
        finite = torch.stack([end for pair in named.values() for end in pair]).isfinite().view(-1, 2).all(1).tolist()
        found |= {name for name, whole in zip(named, finite, strict=True) if not whole}
    return [name for name in tensors if name in found]


def counted(tensor: Tensor) -> str:
    """How many elements are NaN and how many infinite, in words."""
    nan, infinite = int(torch.isnan(tensor.float()).sum()), int(torch.isinf(tensor.float()).sum())
    parts = [f"{count:,} {what}" for count, what in ((nan, "NaN"), (infinite, "infinite")) if count]
    return f"{' and '.join(parts)} of {tensor.numel():,} values"
