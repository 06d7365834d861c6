"""Timesteps of a training step: uniform, stratified over an update, logit-normal, or by importance.

docs/equations.md T1, L7. Each t is made from a random number in [0, 1) that comes with the sample,
as a function of its position in the training stream. So t does not depend on how an update is split
over processes and micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ldm.config import TIMESTEPS

HISTORY = 10  # losses remembered of each t
UNIFORM_SHARE = 0.001  # of the importance distribution


def uniform_timesteps(uniform: Float[Tensor, " b"], num_steps: int) -> Int[Tensor, " b"]:
    """t uniform on 0 … T−1 from draws in [0, 1)."""
    return (uniform.double() * num_steps).long().clamp(max=num_steps - 1)


def in_strata(uniform: Float[Tensor, " b"], place: Int[Tensor, " b"], batch_size: int) -> Float[Tensor, " b"]:
    """Draws moved into part i of ``batch_size`` equal parts of [0, 1), i the sample's place in the update.

    Over an update they cover [0, 1) evenly, so that the mean loss varies less and has the same
    expectation.
    """
    return (place + uniform.double()) / batch_size


def logit_normal_timesteps(uniform: Float[Tensor, " b"], num_steps: int) -> Int[Tensor, " b"]:
    """t = T · sigmoid(n) of standard normal n: most in the middle (Esser et al. 2024, section 3.1).

    The losses are not reweighted: the distribution is the weighting.
    """
    return uniform_timesteps(torch.sigmoid(torch.special.ndtri(uniform.double())), num_steps)


class LossHistory:
    """Importance sampling by the second moment of the loss: p_t ∝ √E[L_t²].

    Nichol & Dhariwal 2021, section 3.3.

    E[L_t²] is over the last ``HISTORY`` losses of each t. A share of 0.001 stays uniform, and all
    of the distribution until every t has its losses. Nothing here waits for the device.
    """

    def __init__(self, num_steps: int, device: torch.device | str = "cpu") -> None:
        self.num_steps = num_steps
        # the last row takes losses that are not to be remembered
        self._losses = torch.zeros(num_steps + 1, HISTORY, dtype=torch.float64, device=device)
        self._seen = torch.zeros(num_steps + 1, dtype=torch.int64, device=device)  # losses ever met, of each t

    @property
    def probabilities(self) -> Float[Tensor, " T"]:
        """p_t, float64."""
        uniform = torch.full((self.num_steps,), 1 / self.num_steps, dtype=torch.float64, device=self._losses.device)
        size = self._losses[:-1].square().mean(1).sqrt()
        known = (self._seen[:-1] >= HISTORY).all() & (size.sum() > 0)
        return torch.where(known, (1 - UNIFORM_SHARE) * size / size.sum() + UNIFORM_SHARE * uniform, uniform)

    def draw(self, uniform: Float[Tensor, " b"]) -> tuple[Int[Tensor, " b"], Float[Tensor, " b"]]:
        """t by the inverse of its distribution function, and the weights 1/(T p_t).

        The weights keep the expected gradient that of uniform t.
        """
        p = self.probabilities
        t = torch.searchsorted(p.cumsum(0), uniform.double(), right=True).clamp(max=self.num_steps - 1)
        return t, 1 / (self.num_steps * p[t])

    def update(self, t: Int[Tensor, " b"], losses: Float[Tensor, " b"]) -> None:
        """Remember the losses of one update, in their order, without those that are not finite."""
        row = torch.where(losses.isfinite(), t, self.num_steps)
        same = row[:, None] == row[None, :]
        before, after = same.tril(-1).sum(1), same.triu(1).sum(1)  # samples of the same t: each gets a slot of its own
        slot = (self._seen[row] + before) % HISTORY
        self._seen.index_add_(0, row, torch.ones_like(row))
        kept = torch.where(after < HISTORY, row, self.num_steps)  # more than fit: the latest stay
        self._losses.index_put_((kept, slot), losses.to(self._losses.dtype))

    def state(self) -> dict[str, Any]:
        """JSON state."""
        return {"losses": self._losses[:-1].tolist(), "seen": self._seen[:-1].tolist()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Load ``state()``. Raises ValueError if it is that of another T."""
        if len(state["seen"]) != self.num_steps:
            raise ValueError(f"the history is of {len(state['seen'])} timesteps, not of {self.num_steps}")
        self._losses[:-1] = torch.tensor(state["losses"], dtype=torch.float64)
        self._seen[:-1] = torch.tensor(state["seen"])


class Timesteps:
    """The timesteps of the updates of one run; ``name`` is that of ``ObjectiveConfig.timesteps``.

    Importance sampling learns once an update, from the losses of the whole global batch in the
    order of their positions.
    """

    def __init__(self, name: str, num_steps: int, batch_size: int, device: torch.device | str = "cpu") -> None:
        if name not in TIMESTEPS:
            raise ValueError(f"timesteps must be one of {', '.join(TIMESTEPS)}, got {name!r}")
        self.name, self.num_steps, self.batch_size = name, num_steps, batch_size
        self.history = LossHistory(num_steps, device) if name == "importance" else None
        self._update = torch.zeros(3, batch_size, device=device)  # by place in the update: 1 if ours, t, loss

    def draw(
        self, uniform: Float[Tensor, " b"], position: Int[Tensor, " b"]
    ) -> tuple[Int[Tensor, " b"], Float[Tensor, " b"]]:
        """t of the samples at these positions, and the weight of each loss in the mean."""
        if self.history is not None:
            return self.history.draw(uniform)
        if self.name == "logit_normal":
            return logit_normal_timesteps(uniform, self.num_steps), torch.ones_like(uniform)
        if self.name == "stratified":
            uniform = in_strata(uniform, position % self.batch_size, self.batch_size)
        return uniform_timesteps(uniform, self.num_steps), torch.ones_like(uniform)

    def note(self, position: Int[Tensor, " b"], t: Int[Tensor, " b"], losses: Float[Tensor, " b"]) -> None:
        """Keep the losses of a micro-batch, without ``draw``'s weights, until its update is over."""
        if self.history is not None:
            rows = torch.stack([torch.ones_like(losses), t.to(losses.dtype), losses])
            self._update[:, position % self.batch_size] = rows.to(self._update.dtype)

    def after_update(self, reduce: Callable[[Tensor], Tensor], finite: Tensor | bool = True) -> None:
        """Remember the losses of the update, unless it was not ``finite``.

        ``reduce`` averages a tensor over processes.
        """
        if self.history is not None:
            # Each process knows its own places, so the mean over processes is a share of the value.
            share, t, losses = reduce(self._update)
            losses = losses / share / torch.as_tensor(finite).to(losses)  # x / 0 is not finite, so it is left out
            self.history.update((t / share).round().long(), losses)
            self._update = torch.zeros_like(self._update)

    def state(self) -> dict[str, Any]:
        """JSON state, empty where nothing is remembered."""
        return {} if self.history is None else self.history.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Load ``state()``."""
        if self.history is not None:
            self.history.load_state(state)
