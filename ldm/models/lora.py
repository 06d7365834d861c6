"""Low-rank changes of a network's layers, W + s (α/r) B A with W frozen.

LoRA, Hu et al. 2021, section 4.1.
"""

from __future__ import annotations

import copy
import difflib
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ldm.config import ConfigError, LoraConfig

Network = TypeVar("Network", bound=nn.Module)
_COMPILED = "_orig_mod"  # torch.compile's name for the module inside


class LowRank(nn.Module):
    """The change of one linear or convolutional layer.

    B starts at 0, so that training starts from the layer without a change. A convolution's A has
    its kernel, stride and padding, and B is 1×1.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, alpha: float) -> None:
        super().__init__()
        self.rank, self.alpha = rank, alpha
        if isinstance(layer, nn.Linear):
            self.lora_A: nn.Module = nn.Linear(layer.in_features, rank, bias=False)
            self.lora_B: nn.Module = nn.Linear(rank, layer.out_features, bias=False)
        else:
            kernel = layer.kernel_size, layer.stride, layer.padding, layer.dilation
            self.lora_A = nn.Conv2d(layer.in_channels, rank, *kernel, bias=False)  # type: ignore[arg-type]
            self.lora_B = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        nn.init.zeros_(self.lora_B.weight)  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """(α/r) B A x, in the precision of A."""
        return self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype))) * (self.alpha / self.rank)  # type: ignore[arg-type]

    @torch.no_grad()
    def with_alpha(self, alpha: float) -> tuple[Tensor, Tensor]:
        """A and B in float32, B scaled so that the change is the same with another α."""
        return self.lora_A.weight.float(), self.lora_B.weight.float() * (self.alpha / alpha)  # type: ignore[operator,union-attr]

    def matrix(self) -> Float[Tensor, "o i"]:
        """(α/r) B A in float32, a convolution's kernel flattened with its input channels."""
        a, b = (part.weight.detach().float().flatten(1) for part in (self.lora_A, self.lora_B))  # type: ignore[union-attr]
        return b @ a * (self.alpha / self.rank)


class Lora(nn.Module):
    """Changes of named layers of a network, which is not part of this module.

    So parameters, state and gradients of this module are those of the changes alone, named
    `<layer>.lora_A.weight` and `<layer>.lora_B.weight`.

    Args:
        network: the base.
        sizes: rank and α of the change of each layer, by the layer's name.
    """

    def __init__(self, network: nn.Module, sizes: Mapping[str, tuple[int, float]]) -> None:
        super().__init__()
        self._base = (network,)  # in a tuple, where torch does not look for parameters
        layers = changeable(network)
        for name, (rank, alpha) in sizes.items():
            _place(self, name, LowRank(layers[name], rank, alpha))

    @classmethod
    def fresh(cls, network: nn.Module, config: LoraConfig) -> Lora:
        """Changes to train, of all layers that the configuration names.

        Raises ConfigError for a name that no layer has.
        """
        alpha = float(config.rank) if config.alpha is None else config.alpha
        return cls(network, dict.fromkeys(named_layers(network, config.targets), (config.rank, alpha)))

    @property
    def network(self) -> nn.Module:
        """The base."""
        return self._base[0]

    @property
    def changes(self) -> dict[str, LowRank]:
        """The changes by the name of their layer."""
        return {name: module for name, module in self.named_modules() if isinstance(module, LowRank)}

    @property
    def gradient_checkpointing(self) -> bool:
        """The base's, whose blocks compute the activations that a backward pass needs."""
        return self.network.gradient_checkpointing  # type: ignore[return-value]

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.network.gradient_checkpointing = value  # type: ignore[assignment]

    def attach(self, scale: float = 1.0, network: nn.Module | None = None) -> Callable[[], None]:
        """Let the base compute with these changes, times ``scale``, on top of any attached already.

        Returns a function that detaches them. Every thread that uses the base sees them.
        ``network``: a ``shared_copy`` of the base that computes with them in its place.
        """
        layers = changeable(network or self.network)
        handles = [
            layers[name].register_forward_hook(partial(_add, change, scale)) for name, change in self.changes.items()
        ]
        if network is None:
            _forget_compiled()

        def detach() -> None:
            for handle in handles:
                handle.remove()
            _forget_compiled()

        return detach

    @torch.no_grad()
    def merge(self, scale: float = 1.0) -> None:
        """Add the changes, times ``scale``, to the base's weights, in float32 before rounding."""
        layers = changeable(self.network)
        for name, change in self.changes.items():
            weight = layers[name].weight
            weight.copy_(weight.float() + scale * change.matrix().view_as(weight))

    def forward(self, *inputs: Any) -> Any:
        """The base's output: with these changes while they are attached."""
        return self.network(*inputs)


def shared_copy(module: Network) -> Network:
    """A copy of all modules of a network that shares its tensors.

    Hooks attached to the copy change the copy alone. The copy of a compiled network is not
    compiled: torch copies no compiled code, and such code would not look at hooks again.
    """
    module = getattr(module, _COMPILED, module)
    copied = copy.copy(module)
    copied._modules = {name: child if child is None else shared_copy(child) for name, child in module._modules.items()}
    for hooks in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        setattr(copied, hooks, getattr(module, hooks).copy())
    return copied


def changeable(network: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that can be changed, by name.

    Names are the same where parts of the network are compiled.
    """
    return {
        ".".join(part for part in name.split(".") if part != _COMPILED): module
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }


def named_layers(network: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """The layers whose names are targets or end in `.<target>`, in the network's order.

    Raises ConfigError for a target without any.
    """
    layers = list(changeable(network))
    for target in targets:
        if not any(_is(name, target) for name in layers):
            known = sorted({".".join(name.split(".")[-i:]) for name in layers for i in (1, 2)})
            near = difflib.get_close_matches(target, known, n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"train.lora.targets: no linear or convolutional layer of the U-Net is called {target}{hint}"
            )
    return [name for name in layers if any(_is(name, target) for target in targets)]


def _is(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _forget_compiled() -> None:
    """Make torch.compile start again: it does not notice hooks that are added or removed."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _add(change: LowRank, scale: float, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + (scale * change(inputs[0])).to(output.dtype)


def _place(root: nn.Module, path: str, leaf: nn.Module) -> None:
    """Put ``leaf`` under a dotted name, making the modules on the way."""
    *parents, last = path.split(".")
    for part in parents:
        if part not in dict(root.named_children()):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, leaf)
