"""Muon: momentum, orthogonalised, for the matrices of hidden layers; AdamW for all other parameters.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/), with the scale of Liu et al. 2025 (arXiv 2502.16982),
under which a learning rate means as much as AdamW's. A convolution counts as the matrix [o, i · k · k].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ADAMW_RMS = 0.2  # root mean square of AdamW's updates at rate 1, as Liu et al. found it
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan's coefficients: steep at 0, singular values end within 0.7 to 1.2
ITERATIONS = 5
MOMENTUM = 0.95
HIDDEN = {"down_blocks", "mid_block", "up_blocks", "layers"}  # of a U-Net or autoencoder, and of CLIP's towers


def hidden_matrices(network: nn.Module) -> list[nn.Parameter]:
    """Weights of ``network`` that lead from one hidden layer to another: not those of input, output, time and norms."""
    return [
        parameter
        for name, parameter in network.named_parameters()
        if parameter.ndim >= 2 and HIDDEN & set(name.split(".")) and "time_emb_proj" not in name
    ]


class Muon(torch.optim.Optimizer):
    """Two parameter groups: the ``matrices``, and ``others``, which a fused AdamW steps.

    Both skip a step where ``found_inf`` (set from outside, as on a fused AdamW) is 1, without a word to the host.

    Args:
        ratio: learning rate of the matrices over that of the others.
        settings: of the AdamW; its rate and weight decay are the matrices' too.
    """

    found_inf: Tensor

    def __init__(
        self, matrices: Iterable[Tensor], others: Iterable[Tensor], ratio: float, settings: Mapping[str, Any]
    ) -> None:
        self._adamw = torch.optim.AdamW(others, fused=True, **settings)
        of_matrices = {"params": list(matrices), "ratio": ratio, "moments": ("momentum_buffer",)}
        super().__init__([*self._adamw.param_groups, of_matrices], self._adamw.defaults)
        self._adamw.param_groups, self._adamw.state = self.param_groups[:1], self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        self._adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        self._adamw.step()
        group, finite = self.param_groups[1], self.found_inf == 0
        taking_part = [parameter for parameter in group["params"] if parameter.grad is not None]
        gradients = [torch.where(finite, parameter.grad, 0.0) for parameter in taking_part]
        momenta = [self._momentum(parameter) for parameter in taking_part]
        torch._foreach_mul_(momenta, torch.where(finite, MOMENTUM, 1.0))  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(momenta, gradients)  # pyright: ignore[reportPrivateImportUsage]
        directions = torch._foreach_add(gradients, momenta, alpha=MOMENTUM)  # pyright: ignore[reportPrivateImportUsage]
        rate = group["lr"] * finite
        torch._foreach_mul_(taking_part, 1 - rate * group["weight_decay"])  # pyright: ignore[reportPrivateImportUsage]
        for places in _equal_matrices(taking_part):
            updates = orthogonalised(torch.stack([directions[i].flatten(1) for i in places]))
            updates *= rate * ADAMW_RMS * max(updates.shape[1:]) ** 0.5
            for i, update in zip(places, updates, strict=True):
                taking_part[i].sub_(update.view(taking_part[i].shape))

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def orthogonalised(matrices: Tensor) -> Tensor:
    """U · S' · Vᵀ of each matrix U · S · Vᵀ: [b, m, n], with singular values S' near 1, by Newton and Schulz.

    The iteration multiplies X by a·1 + b·G + c·G² of G = X·Xᵀ. All these factors commute, so they are multiplied first,
    on the smaller side's square, and X once, at the end. This needs float32: rounded to TF32, eigenvalues of G near 0
    become negative, and those grow without bound.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalised(matrices.mT).mT
    a, b, c = NEWTON_SCHULZ
    x = matrices.float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    with _without_tf32():
        gram = x @ x.mT
        identity = torch.eye(gram.shape[1], device=gram.device).expand_as(gram)
        product = identity
        for i in range(ITERATIONS):
            factor = torch.baddbmm(a * identity + b * gram, gram, gram, beta=1, alpha=c)
            product = factor @ product if i else factor
            if i < ITERATIONS - 1:
                gram = factor @ gram @ factor
        return (product @ x).to(matrices.dtype)


@contextmanager
def _without_tf32() -> Iterator[None]:
    held = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = held


def _equal_matrices(parameters: list[Tensor]) -> Iterable[list[int]]:
    """Places of the parameters that are equal in shape once flattened to matrices."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, parameter in enumerate(parameters):
        groups.setdefault((len(parameter), parameter[0].numel()), []).append(i)
    return groups.values()
