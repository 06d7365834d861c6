"""UniPC: a predictor and a corrector of any order in λ for x̂_0.

Zhao et al. 2023; docs/equations.md S3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.samplers.nodes import Callback, Nodes, Noise, after_step, check_start, no_noise
from ldm.diffusion.schedule import like

ORDERS = (1, 2, 3)
SOLVERS = ("bh1", "bh2")  # B(h) = h, or e^h − 1; of −h, since x̂_0 is predicted


def unipc(
    denoiser: Denoiser, x: Float[Tensor, "b *d"], grid: Float[Tensor, " nodes"], noise: Noise = no_noise, *,
    order: int = 2, solver: str = "bh2", corrector: bool = True, start: Sequence[Tensor] = (), lower_final: bool = True,
    callback: Callback | None = None,
) -> Float[Tensor, "b *d"]:  # fmt: skip
    """UniPC-p, p = ``order``: of order p + 1 with its corrector, of order p without it (UniP-p).

    One call a step. The call at a node serves twice: first to correct the sample there, then to
    predict the next one; so the last step is not corrected. ``callback`` sees samples as predicted;
    a sample that it replaces is not corrected. Deterministic.

    Args:
        solver: ``bh1`` or ``bh2``, the B(h) of the paper.
        start: exact samples at the nodes 1, 2, …, taken in place of the solver's own, to measure
            its order.
        lower_final: no step has a higher order than there are steps left. A step into clean data is
            of first order in any case.

    Raises:
        ValueError: unknown order or solver.
    """
    if order not in ORDERS or solver not in SOLVERS:
        raise ValueError(
            f"order must be one of 1, 2, 3 and solver one of {', '.join(SOLVERS)}, got {order!r} and {solver!r}"
        )
    nodes = Nodes.of(denoiser.schedule, grid, x)
    check_start(nodes, start)
    history: list[Tensor] = []  # x̂_0, the newest first
    before: Tensor | None = None  # the sample from which the step to be corrected began
    for i in range(nodes.steps):
        x0 = denoiser(x, nodes.t[i]).x0
        if before is not None:
            x = _updated(nodes, i - 1, before, history[: nodes.order(i - 1, order, lower_final)], solver, x0)
        history = [x0, *history[: order - 1]]
        if i < len(start):
            after = start[i]
        else:
            after = _updated(nodes, i, x, history[: nodes.order(i, order, lower_final)], solver)
        given = after_step(callback, i, after, x0)
        before = x if corrector and i >= len(start) and given is after else None
        x = given
    return x


def _updated(
    nodes: Nodes, i: int, x: Tensor, history: list[Tensor], solver: str, ahead: Tensor | None = None
) -> Tensor:
    """The sample at node i + 1 from that at node i and x̂_0 at the nodes i, i − 1, ….

    ``ahead``: x̂_0 at node i + 1, for the corrector.
    """
    h = nodes.lam[i + 1] - nodes.lam[i]
    kept, added = nodes.sigma[i + 1] / nodes.sigma[i], nodes.alpha[i + 1] * torch.expm1(-h)
    x_next = like(kept, x) * x - like(added, x) * history[0]
    # the other known x̂_0, and how far from node i they lie in units of the step
    others = list(history[1:])
    ratios = [(nodes.lam[i - k] - nodes.lam[i]) / h for k in range(1, len(history))]
    if ahead is not None:
        others.append(ahead)
        ratios.append(torch.ones_like(h))
    if not ratios:
        return x_next
    scale = -h if solver == "bh1" else torch.expm1(-h)  # B(h)
    for weight, r, data in zip(_weights(h, torch.stack(ratios), scale), ratios, others, strict=True):
        x_next = x_next - like(nodes.alpha[i + 1] * scale * weight / r, x) * (data - history[0])
    return x_next


def _weights(h: Float[Tensor, ""], ratios: Float[Tensor, " k"], scale: Float[Tensor, ""]) -> Float[Tensor, " k"]:
    """The solution ρ of Σ_m ρ_m r_m^{n−1} = n! φ_{n+1}(−h) (−h)/B(h), n = 1 … k.

    ½ if there is one unknown, as in the paper's code. φ_1(z) = (e^z − 1)/z and
    φ_{n+1}(z) = (φ_n(z) − 1/n!)/z.
    """
    if len(ratios) == 1:
        return torch.full_like(ratios, 0.5)
    z, right = -h, []
    phi = torch.expm1(z) / z
    for n in range(1, len(ratios) + 1):
        phi = (phi - 1 / math.factorial(n)) / z
        right.append(math.factorial(n) * phi * z / scale)
    rows = torch.stack([ratios.pow(n) for n in range(len(ratios))])
    return torch.linalg.solve(rows, torch.stack(right))
