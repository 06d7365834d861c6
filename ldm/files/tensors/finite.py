"""Checks of tensors for NaN and infinity, in one pass over their memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ldm.errors import NonFiniteError


def is_finite(tensor: Tensor) -> Tensor:
    """Boolean scalar on the tensor's device, true if all elements are finite; does not synchronise.

    Tests the minimum and maximum, which are NaN if any element is: much faster on a CPU than
    ``isfinite``.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return torch.stack(torch.aminmax(wide.detach())).isfinite().all()


def finite(tensor: Tensor, what: str) -> Tensor:
    """The tensor itself. Raises NonFiniteError if it holds NaN or infinity. Synchronises a GPU."""
    if not is_finite(tensor):
        raise NonFiniteError(f"{what}: not finite (NaN or infinite)")
    return tensor


def nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity. Synchronises a GPU once per dtype."""
    ends: dict[tuple[torch.device, torch.dtype], dict[str, tuple[Tensor, Tensor]]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() > 0:
            wide = (tensor.float() if tensor.dtype.itemsize == 1 else tensor).detach()
            least, greatest = torch.aminmax(wide)
            ends.setdefault((wide.device, wide.dtype), {})[name] = (least, greatest)
    found: set[str] = set()
    for named in ends.values():  # one transfer for all: each costs more than the test of a small tensor
        finite = torch.stack([end for pair in named.values() for end in pair]).isfinite().view(-1, 2).all(1).tolist()
        found |= {name for name, whole in zip(named, finite, strict=True) if not whole}
    return [name for name in tensors if name in found]


def counted(tensor: Tensor) -> str:
    """Numbers of NaN and infinite elements, as text."""
    nan, infinite = int(torch.isnan(tensor.float()).sum()), int(torch.isinf(tensor.float()).sum())
    parts = [f"{count:,} {what}" for count, what in ((nan, "NaN"), (infinite, "infinite")) if count]
    return f"{' and '.join(parts)} of {tensor.numel():,} values"
