"""Compute a recorded update again, in one process, and find the first non-finite number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ldm.data.dataset import Batch, BatchPlan, collate
from ldm.errors import RunError, UserError
from ldm.training.diagnostics.nonfinite import Incident
from ldm.training.precision import accelerator_of
from ldm.training.task import Task


class NotReproducedError(UserError):
    """The update is finite here."""

    exit_code = 1


@dataclass
class Findings:
    """Names of what was not finite, in the order of computation."""

    samples: list[str] = field(default_factory=list)
    forward: str | None = None  # the first module
    losses: list[str] = field(default_factory=list)
    backward: str | None = None  # the first module that a gradient went through
    gradients: list[str] = field(default_factory=list)  # names of parameters

    def lines(self) -> list[str]:
        """Lines for the terminal; empty where everything is finite."""
        found = list(self.samples)
        if self.forward:
            found.append(f"forward: {self.forward}")
        if self.losses:
            found.append(f"not finite: {', '.join(dict.fromkeys(self.losses))}")
        if self.backward and not self.forward:
            found.append(f"backward: {self.backward}")
        if self.gradients:
            names = list(dict.fromkeys(self.gradients))
            found.append(f"{len(names)} gradients are not finite, such as {names[0]}")
        return found


def replay(
    task: Task, incident: Incident, weights: dict[str, dict[str, Tensor]], precision: str, whole: bool
) -> Findings:
    """Run the forward and backward passes of the incident's update.

    ``whole``: in one batch, because the loss is not a mean over samples.

    Raises RunError where the weights or the state do not fit.
    """
    accelerator = accelerator_of(precision)
    try:
        for name, network in task.networks.items():
            network.load_state_dict(weights[name])
            network.to(accelerator.device)
        task.to(accelerator.device)
        task.load_state(incident.task)
    except (RuntimeError, KeyError, TypeError, AttributeError, ValueError) as error:
        if hasattr(error, "exit_code"):
            raise
        raise RunError(f"update {incident.update} is not of this run: {' '.join(str(error).split())[:300]}") from None
    networks = {name: accelerator.prepare_model(network) for name, network in task.networks.items()}
    size = incident.batch_size if whole else incident.micro_batch
    findings = Findings()
    for positions in BatchPlan(incident.batch_size, size, 1, 0).positions(incident.update):
        batch = collate([task.stream[p] for p in positions])
        findings.samples += _broken_samples(batch, positions)
        on_device = {k: v.to(accelerator.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        with _watched(_modules(task), findings):
            metrics = task.micro_step(
                networks, on_device, incident.update, lambda loss: _backward(loss, size / incident.batch_size, findings)
            )
        findings.losses += [name for name, value in metrics.items() if not bool(torch.isfinite(value).all())]
        findings.gradients += [
            f"{name}.{key}"
            for name, network in task.networks.items()
            for key, p in network.named_parameters()
            if not _finite(p.grad)
        ]
    return findings


def _backward(loss: Tensor, share: float, findings: Findings) -> None:
    if not _finite(loss):
        findings.losses.append("the loss")
    (loss * share).backward()


def _broken_samples(batch: Batch, positions: list[int]) -> list[str]:
    """The non-finite inputs of each sample."""
    found = []
    for name, values in batch.items():
        if isinstance(values, Tensor) and values.is_floating_point():
            found += [
                f"sample at position {position} ({batch['text'][i]!r}): its {name} has {_count(values[i])} values"
                " that are not finite"
                for i, position in enumerate(positions)
                if not _finite(values[i])
            ]
    return found


def _modules(task: Task) -> dict[str, nn.Module]:
    """The trained networks and the task's frozen ones, each once."""
    codec = getattr(task, "codec", None)
    frozen = {name: value for name, value in vars(task).items() if isinstance(value, nn.Module)}
    if codec is not None:
        frozen["codec"] = codec.autoencoder
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in {**task.networks, **frozen}.items():
        found.setdefault(id(module), (name, module))
    return dict(found.values())


@contextmanager
def _watched(roots: dict[str, nn.Module], findings: Findings) -> Iterator[None]:
    """Check the output of every module as it is computed, and the gradient that reaches it."""
    handles, names = [], {}
    for root, network in roots.items():
        for name, module in network.named_modules():
            names.setdefault(id(module), f"{root}.{name}".rstrip("."))

    def look(module: nn.Module, arguments: Any, output: Any) -> None:
        name, made = names[id(module)], [t for t in _tensors(output) if t.is_floating_point()]
        if findings.forward is None and not all(_finite(t) for t in made):
            given = all(_finite(t) for t in _tensors(arguments) if t.is_floating_point())
            count, total = sum(_count(t) for t in made), sum(t.numel() for t in made)
            what = "from finite inputs" if given else "its input was not finite already"
            findings.forward = f"{name} ({type(module).__name__}): {count} of {total} values are not finite, {what}"
        for tensor in made:
            if tensor.requires_grad:
                handles.append(tensor.register_hook(lambda gradient: look_back(module, gradient)))

    def look_back(module: nn.Module, gradient: Tensor) -> None:
        if findings.backward is None and not _finite(gradient):
            name = f"{names[id(module)]} ({type(module).__name__})"
            findings.backward = (
                f"the gradient that reaches the output of {name} has {_count(gradient)} values that are not finite"
            )

    for network in roots.values():
        handles += [module.register_forward_hook(look) for module in network.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(values: Any) -> list[Tensor]:
    """The tensors in a module's arguments or output, to any depth.

    Includes the fields of small objects such as a posterior.
    """
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        return [t for value in values.values() for t in _tensors(value)]
    if isinstance(values, (list, tuple)):
        return [t for value in values for t in _tensors(value)]
    return [t for t in getattr(values, "__dict__", {}).values() if isinstance(t, Tensor)]


def _finite(tensor: Tensor | None) -> bool:
    return tensor is None or bool(torch.isfinite(tensor).all())


def _count(tensor: Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum())
