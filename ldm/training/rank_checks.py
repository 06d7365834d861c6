"""On start, check that all processes train one model: equal weights and gradients, different noise."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ldm.config import ConfigError
from ldm.data.dataset import Batch
from ldm.distributed.processes import Processes

TOLERANCE = 1e-6  # of the sum of magnitudes: the processes' devices may round differently


class ProcessesDifferError(ConfigError):
    """The processes would not train one model."""

    everywhere = True  # raised by all of them


class Probe:
    """Compares the processes once after each start; with one process it does nothing. Raises ProcessesDifferError."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._active = processes.count > 1
        self._draws_seen = False
        self._compared: set[str] = set()  # networks whose gradients have been found equal

    def weights(self, networks: Mapping[str, nn.Module]) -> None:
        """Require equal weights on all processes."""
        if self._active:
            for name, network in networks.items():
                self._compare(f"the weights of {name}", [p.detach() for p in network.parameters()])

    def draws(self, batch: Batch, names: Iterable[str]) -> None:
        """Require different positions, and different numbers for ``names`` at different positions."""
        if not self._active or self._draws_seen:
            return
        self._draws_seen = True
        positions = [p for share in self._processes.gather(batch["position"].tolist()) for p in share]
        if len(set(positions)) < len(positions):
            raise ProcessesDifferError(
                "processes read the same positions of the training stream: is each started with a rank of its own?"
            )
        for name in names:
            mine = [hashlib.sha256(row.cpu().numpy().tobytes()).hexdigest() for row in batch[name]]
            digests = [digest for share in self._processes.gather(mine) for digest in share]
            if len(set(digests)) < len(digests):
                raise ProcessesDifferError(
                    f"the draws {name!r} repeat at different positions: they must depend on the position"
                )

    def gradients(self, networks: Mapping[str, nn.Module]) -> None:
        """Require equal gradients after the first backward passes of a network."""
        if not self._active:
            return
        for name in sorted(set(networks) - self._compared):
            gradients = [p.grad.detach() for p in networks[name].parameters() if p.grad is not None]
            if gradients and self._compare(f"the gradients of {name}", gradients):
                self._compared.add(name)

    def _compare(self, what: str, tensors: list[Tensor]) -> bool:
        """Compare weighted sums of every tensor; False if they are not finite."""
        sums = torch.stack([_sums(tensor) for tensor in tensors]).cpu()  # [tensors, 3]
        everyone = [torch.tensor(other, dtype=torch.float64) for other in self._processes.gather(sums.tolist())]
        if any(other.shape != sums.shape for other in everyone):
            raise ProcessesDifferError(f"the processes differ in {what}: they have different numbers of tensors")
        if not all(bool(other.isfinite().all()) for other in everyone):
            return False
        scale = everyone[0][:, 2:].clamp(min=1e-30)
        deviation = max(float(((other - everyone[0]).abs() / scale).max()) for other in everyone)
        if deviation > TOLERANCE:
            raise ProcessesDifferError(
                f"the processes differ in {what} (by {deviation:.1e} of its magnitude): they would train"
                f" {len(everyone)} models, not one"
            )
        return True


def _sums(tensor: Tensor) -> Tensor:
    """Sum, sum weighted by place (a plain sum would hide a permutation), and sum of magnitudes, float64."""
    flat = tensor.flatten().double()
    place = torch.arange(flat.numel(), device=flat.device, dtype=torch.float64)
    return torch.stack([flat.sum(), (flat * torch.cos(place)).sum(), flat.abs().sum()])
