"""One optimizer for each network of a task: learning rates, gradient norms, and a step of all or of none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config import TrainConfig
from ldm.training.muon import Muon, hidden_matrices


def learning_rate(config: TrainConfig, update: int) -> float:
    """The rate of update ``update`` (from 0): linear warm-up, then constant or a cosine down to ``lr_end``."""
    if update < config.warmup:
        return config.lr * (update + 1) / config.warmup
    if config.lr_schedule == "constant":
        return config.lr
    progress = (update - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * (config.lr_end + (1 - config.lr_end) * 0.5 * (1 + math.cos(math.pi * progress)))


class Optimizers:
    """Fused AdamW or Muon on ``networks``, and the loss scaler of float16 (None without it).

    ``each``: the optimizers by network.
    """

    def __init__(self, networks: Mapping[str, nn.Module], config: TrainConfig, scaler: Any) -> None:
        self.networks, self.config, self.scaler = networks, config, scaler
        self.each = {name: _optimizer(network, config) for name, network in networks.items()}

    def begin(self, update: int, scale: Callable[[str], float]) -> None:
        """Set each network's rate, ``scale`` times the run's, and drop the gradients of the last update."""
        for name, optimizer in self.each.items():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.config, update) * scale(name) * group.get("ratio", 1.0)
            optimizer.zero_grad(set_to_none=True)

    def norm(self, name: str) -> Tensor:
        """Clip a network's gradients; returns their norm before, 0 where it does not take part in this update."""
        parameters = list(self.networks[name].parameters())
        if self._idle(name):
            return torch.zeros((), device=parameters[0].device)
        if self.scaler is not None:
            self.scaler.unscale_(self.each[name])
        return nn.utils.clip_grad_norm_(
            parameters, self.config.clip if self.config.clip is not None else math.inf
        ).detach()

    def step(self, finite: Tensor) -> None:
        """Step all, or none of them where ``finite`` (a bool on the device) is false: they decide there."""
        taking_part = [name for name in self.each if not self._idle(name)]
        for name in taking_part:
            self.each[name].found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.each[name].step()
        if self.scaler is not None and taking_part:
            self.scaler.update()

    def _idle(self, name: str) -> bool:
        return self.each[name].param_groups[0]["lr"] == 0.0 or all(
            p.grad is None for p in self.networks[name].parameters()
        )


def _optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    settings = {"lr": config.lr, "betas": config.betas, "eps": config.adam_eps, "weight_decay": config.weight_decay}
    matrices = hidden_matrices(network) if config.optimizer == "muon" else []
    if not matrices:  # a discriminator, or a learned schedule
        return torch.optim.AdamW(network.parameters(), fused=True, **settings)  # type: ignore[arg-type]
    held = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in network.parameters() if id(parameter) not in held]
    return Muon(matrices, others, 1.0 if config.muon_lr is None else config.muon_lr / config.lr, settings)
